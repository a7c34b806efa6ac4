import dataclasses
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.clip import Clip
from models.clip_loss import clip_loss, cropped, random_crops
from models.prior_configs import ClipConfig
from models.random_streams import RandomStreams
from models.tokens import text_ends, tokenize
from tests.models.clip_folders import VIT, views

RESNET = ClipConfig(
    embed_dim=24, image_size=32, tower="resnet", layers=(1, 1, 1, 1), width=4, text_width=16, text_layers=1,
    text_heads=2,
)  # fmt: skip


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_embeddings_equal_open_clips_and_have_norm_one(config: ClipConfig) -> None:
    clip = Clip.build(config, seed=0).eval()
    preprocess = open_clip.image_transform(32, is_train=False)
    image = views()
    theirs = torch.stack([preprocess(Image.fromarray(view.permute(1, 2, 0).numpy())) for view in image])
    expected = clip.model.encode_image(theirs, normalize=True)
    ours = clip.encode_image(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(4), rtol=0, atol=1e-6)
    tokens = tokenize(["a cat", "word " * 100])
    short = open_clip.tokenize(["a cat", "word " * 100], context_length=config.text_context)
    text = clip.encode_text(tokens)
    torch.testing.assert_close(text, clip.model.encode_text(short, normalize=True), rtol=0, atol=1e-6)
    assert (clip.embed_dim, clip.image_size, clip.context_length) == (24, 32, config.text_context)


def test_the_end_of_a_caption_does_not_see_what_comes_after_it() -> None:
    clip = Clip.build(dataclasses.replace(VIT, text_context=77), seed=0).eval()
    assert clip.text_lengths == (16, 32, 77)
    assert Clip.build(dataclasses.replace(VIT, text_context=32), seed=0).text_lengths == (16, 32)
    tokens = tokenize(["", "a cat", "cat " * 14, "cat " * 15, "cat " * 30, "cat " * 31])
    ends = text_ends(tokens)
    assert ends.tolist() == [2, 4, 16, 17, 32, 33]
    whole = clip.encode_text(tokens)
    for length in (16, 32):
        fit = ends <= length
        torch.testing.assert_close(clip.encode_text(tokens[fit, :length]), whole[fit], rtol=0, atol=1e-6)


def test_a_tower_that_sees_all_of_a_caption_gets_all_of_it() -> None:
    clip = Clip.build(VIT, seed=0)
    clip.model.attn_mask = None
    assert clip.text_lengths == (VIT.text_context,)


def test_a_row_is_embedded_alike_in_any_batch() -> None:
    clip = Clip.build(RESNET, seed=0).eval()
    alone = torch.cat([clip.encode_image(row[None]) for row in views()])
    torch.testing.assert_close(clip.encode_image(views()), alone, rtol=0, atol=1e-5)


def test_views_of_another_size_or_type_are_refused() -> None:
    clip = Clip.build(VIT, seed=0)
    with pytest.raises(ValueError, match=r"got torch.uint8 \(3, 64, 64\)"):
        clip.encode_image(views(size=64))
    with pytest.raises(ValueError, match=r"got torch.float32"):
        clip.encode_image(views() / 255)


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (Clip.build(VIT, seed).encode_image(views()) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    untouched = torch.rand(1)
    torch.manual_seed(0)
    Clip.build(VIT, seed=9)
    assert torch.equal(torch.rand(1), untouched)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_saved_folder_is_open_clips_local_dir(config: ClipConfig, tmp_path: Path) -> None:
    clip = Clip.build(config, seed=0).eval()
    clip.save(tmp_path)
    image, tokens = views(), tokenize(["a cat"] * 4)
    again = Clip.from_folder(tmp_path)
    assert not again.training
    assert torch.equal(again.encode_image(image), clip.encode_image(image))
    assert torch.equal(again.encode_text(tokens), clip.encode_text(tokens))
    peer = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert torch.equal(peer.visual.state_dict()["conv1.weight"], clip.model.visual.state_dict()["conv1.weight"])
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy/open_clip_config.json").read_bytes() == (tmp_path / "open_clip_config.json").read_bytes()


def test_loss_equals_open_clips() -> None:
    clip = Clip.build(VIT, seed=0)
    batch = {"image": views(), "tokens": tokenize(["a cat", "a dog", "a fox", "an owl"])}
    rng = RandomStreams([(0, 4)])
    losses = clip_loss(clip, batch, rng)
    image = clip.encode_pixels(cropped(batch["image"], random_crops(rng, 0.75)))
    text = clip.encode_text(batch["tokens"])
    expected = open_clip.ClipLoss()(image, text, clip.model.logit_scale.exp())
    torch.testing.assert_close(losses.total.mean(), expected, rtol=0, atol=1e-6)
    assert losses.total.shape == losses.parts["image_to_text"].shape == (4,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert clip_loss(clip, batch, rng).total.dtype == torch.float32


def test_gradients_of_parts_of_a_batch_are_those_of_the_whole() -> None:
    """In fp32 but for the order of sums; under autocast the parts' gradients are not added up in bf16."""
    batch = {"image": views(9), "tokens": tokenize([f"{n} cats" for n in range(9)])}

    def gradients(at_once: int, bf16: bool = False) -> tuple[Tensor, Tensor]:
        clip = Clip.build(VIT, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = clip_loss(clip, batch, RandomStreams([(0, 4), (1, 5)]), at_once=at_once).total
        losses.mean().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in clip.parameters() if p.grad is not None])

    exact = gradients(0)
    for at_once in (1, 4, 8):
        torch.testing.assert_close(gradients(at_once), exact, rtol=1e-4, atol=1e-6)
    whole, parts = (gradients(at_once, bf16=True)[1] for at_once in (0, 1))
    assert (parts - exact[1]).norm() < 1.2 * (whole - exact[1]).norm()


def test_temperature_stops_at_a_hundredth() -> None:
    clip = Clip.build(VIT, seed=0)
    batch = {"image": views(), "tokens": tokenize(["a cat", "a dog", "a fox", "an owl"])}
    totals = []
    for scale in (100.0, 1e6):
        clip.model.logit_scale.data = torch.tensor(scale).log()
        totals.append(clip_loss(clip, batch, RandomStreams([(0, 4)])).total)
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-3)


def test_augmentation_crops_but_never_flips() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(200, 3, 64, 64)
    pixels = cropped(ramp, random_crops(RandomStreams([(0, 200)]), 0.75))
    assert pixels.shape == ramp.shape
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert (pixels.diff(dim=-1) >= -1e-6).all()  # rises to the right as before
    torch.testing.assert_close(pixels[:, :, :1].expand_as(pixels), pixels, rtol=0, atol=1e-5)
    share = (pixels[..., -1] - pixels[..., 0])[:, 0, 0] * 255 / 63  # the ramp's rise is the crop's side
    assert 0.73 < share.min() < 0.77
    assert 0.97 < share.max() <= 1.001
    assert torch.equal(cropped(ramp, random_crops(RandomStreams([(0, 200)]), 1.0)), ramp / 255)


def test_temperature_begins_where_the_configuration_says() -> None:
    for config, scale in ((VIT, 1 / 0.07), (dataclasses.replace(VIT, temperature=0.025), 40.0)):
        assert float(Clip.build(config, 0).model.logit_scale.detach().exp()) == pytest.approx(scale, rel=1e-5)


def test_under_autocast_crops_lie_where_they_lie_without() -> None:
    """A coordinate in bf16 would be off by up to half a pixel."""
    waves = (127 + 127 * torch.sin(torch.arange(224) / 3)).to(torch.uint8).expand(4, 3, 224, 224)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cropped(waves, random_crops(RandomStreams([(0, 4)]), 0.75))
    torch.testing.assert_close(found, cropped(waves, random_crops(RandomStreams([(0, 4)]), 0.75)), rtol=0, atol=1e-6)


def test_it_learns_to_match_eight_pairs() -> None:
    clip = Clip.build(VIT, seed=0)
    colours = torch.tensor([[r, g, b] for r in (0, 220) for g in (0, 220) for b in (0, 220)], dtype=torch.uint8)
    batch = {
        "image": colours[:, :, None, None].expand(-1, -1, 32, 32),
        "tokens": tokenize(["black", "blue", "green", "cyan", "red", "magenta", "yellow", "white"]),
    }
    embedding = clip.model.token_embedding.weight
    others = [parameter for parameter in clip.parameters() if parameter is not embedding]
    optimiser = torch.optim.AdamW([{"params": others}, {"params": [embedding], "weight_decay": 0}], 3e-3)
    for step in range(60):
        optimiser.zero_grad()
        loss = clip_loss(clip, batch, RandomStreams([(step, 8)])).total.mean()
        loss.backward()
        optimiser.step()
    similarity = clip.encode_image(batch["image"]) @ clip.encode_text(batch["tokens"]).T
    assert similarity.argmax(1).tolist() == list(range(8))

    said = clip.encode_text(batch["tokens"])
    clip.silence_unread_tokens()
    assert torch.equal(clip.encode_text(batch["tokens"]), said)
    assert embedding.any(1).nonzero().flatten().tolist() == batch["tokens"].unique().tolist()[1:]  # but for the padding
