import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Decoder, decoder_denoise, decoder_loss
from models.diffusion.process import error_weight
from models.diffusion.schedules import make_schedule
from models.image_configs import DecoderConfig
from models.nn.text_encoder import TextEncoder
from models.prior_configs import TextTower
from models.random_streams import RandomStreams

CONFIG = DecoderConfig(
    image_size=8, channels=32, depth=1, multipliers=(1, 2), head_channels=16, attention_resolutions=(4,), dropout=0.0,
    text_context=12, text_width=32, text_depth=1, text_heads=2, vocabulary=50, prediction="v",
)  # fmt: skip
DIM = 10
TOWER = TextTower(24, 1, 2, context=12, vocabulary=50)


def make(seed: int = 0, **changes: object) -> Decoder:
    """A decoder whose weights are no longer at their zero start."""
    torch.manual_seed(seed)
    model = Decoder(dataclasses.replace(CONFIG, **changes), DIM, TOWER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Plain coloured squares; captions of 77 tokens with the end token (49) at position 5."""
    g = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (rows, 3, 2, 2), generator=g, dtype=torch.uint8)
    tokens = torch.zeros(rows, 77, dtype=torch.int64)
    tokens[:, :5] = torch.randint(1, 49, (rows, 5), generator=g)
    tokens[:, 5] = 49
    return {
        "image": colours.repeat_interleave(4, 2).repeat_interleave(4, 3),
        "image_embedding": F.normalize(torch.randn(rows, DIM, generator=g), dim=1),
        "tokens": tokens,
    }


def forward(model: Decoder, batch: dict[str, Tensor], keep_image: bool = True, keep_text: bool = True) -> Tensor:
    rows = len(batch["tokens"])
    x_t = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(rows, dtype=torch.bool)
    with torch.no_grad():
        t, image, tokens = torch.arange(rows) * 100, batch["image_embedding"], batch["tokens"]
        return model(x_t, t, image, tokens, keep & keep_image, keep & keep_text)


def test_both_conditions_matter_unless_they_are_dropped() -> None:
    """An embedding has three ways into the network, and a dropped one takes none."""
    model, batch = make(layout_channels=3), make_batch(2)
    other_image = batch | {"image_embedding": batch["image_embedding"].flip(0)}
    other_text = batch | {"tokens": batch["tokens"].flip(0)}
    for other, dropped in ((other_image, {"keep_image": False}), (other_text, {"keep_text": False})):
        assert not torch.allclose(forward(model, batch), forward(model, other), atol=1e-4)
        assert torch.equal(forward(model, batch, **dropped), forward(model, other, **dropped))
        assert not torch.allclose(forward(model, batch), forward(model, batch, **dropped), atol=1e-4)


def test_what_follows_the_end_of_a_caption_and_what_is_cut_does_not_matter() -> None:
    model, batch = make(), make_batch(2)
    longer = batch["tokens"].clone()
    longer[:, 6:] = 17
    assert torch.equal(forward(model, batch), forward(model, batch | {"tokens": longer}))
    endless = batch["tokens"].clone()
    endless[:, 5:] = 17
    cut = endless.clone()
    cut[:, 12:] = 23
    assert torch.equal(forward(model, batch | {"tokens": endless}), forward(model, batch | {"tokens": cut}))


@pytest.mark.parametrize("null_image", ["zero", "learned"])
def test_a_dropped_embedding_is_zeros_or_a_learned_vector(null_image: str) -> None:
    model, batch = make(null_image=null_image), make_batch(1)
    assert model.null_image.requires_grad == (null_image == "learned")
    assert model.null_image.any() == (null_image == "learned")
    null = batch | {"image_embedding": model.null_image.detach()[None] / DIM**0.5}
    torch.testing.assert_close(forward(model, batch, keep_image=False), forward(model, null), atol=1e-5, rtol=1e-5)


CLIP_TEXT = {"text_encoder": "clip", "context_width": 24}


def test_with_clips_text_encoder_padding_is_hidden() -> None:
    model, batch = make(**CLIP_TEXT).eval(), make_batch(2)
    longer = batch["tokens"].clone()
    longer[:, 6:] = 17
    torch.testing.assert_close(forward(model, batch), forward(model, batch | {"tokens": longer}), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="12 tokens or more, got 4"):
        forward(model, batch | {"tokens": batch["tokens"][:, :4]})


def test_a_caption_that_is_cut_has_a_vector_of_its_own() -> None:
    model = make(**CLIP_TEXT)
    endless = torch.randint(1, 48, (2, 77), generator=torch.Generator().manual_seed(0))
    endless[:, 0] = 48  # the start
    pooled = model.text(endless, torch.ones(2, dtype=torch.bool)).pooled
    assert (pooled[0] - pooled[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("share", "other"), [("drop_text", "tokens"), ("drop_image", "image_embedding")])
def test_what_every_row_of_a_training_dropped_says_nothing_in_drawing(share: str, other: str) -> None:
    """Else untrained weights would speak."""
    model, batch = make(**{share: 1.0}), make_batch(4)
    changed = batch | {other: batch[other].flip(0)}
    assert torch.equal(forward(model, batch), forward(model, changed))
    assert not torch.allclose(forward(make(), batch), forward(make(), changed), atol=1e-4)


def test_with_clips_text_encoder_every_parameter_learns() -> None:
    model, batch = make(**CLIP_TEXT, null_image="learned", drop_image=0.5), make_batch(4)
    decoder_loss(model, batch, RandomStreams([(0, 4)])).total.sum().backward()
    unused = {"text.token.weight", "text.position"}  # rows of tokens and positions that no caption has
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() if name in unused else (parameter.grad != 0).float().mean() > 0.5, name


def test_whitened_embeddings_are_centred_and_spread_alike_in_all_directions_but_the_least() -> None:
    """A variance of v becomes v / (v + a four-hundredth of the mean); once fitted it comes back with the weights."""
    g, batch, keep = torch.Generator().manual_seed(0), make_batch(2), torch.ones(2, dtype=torch.bool)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=g)).Q
    spread = torch.logspace(0, -4, DIM)
    z = torch.randn(20_000, DIM, generator=g) * spread @ basis.T + 1.0
    model, plain = make(whiten=True), make()
    assert model.whitening is not None
    identity = model.condition(batch["image_embedding"], batch["tokens"], keep, keep)
    torch.testing.assert_close(
        identity.added, plain.condition(batch["image_embedding"] / DIM**0.5, batch["tokens"], keep, keep).added
    )
    model.whitening.fit(z)
    white = model.whitening(z)
    assert white.mean(0).abs().max() < 1e-4
    variances = (white @ basis).var(0)
    floor = 0.0025 * (spread**2).mean()
    torch.testing.assert_close(variances, spread**2 / (spread**2 + floor), rtol=0.05, atol=1e-6)
    alone = make(whiten=True)
    alone.whitening.fit(z[:1])  # no variance at all
    assert torch.equal(alone.whitening(z[:1]), torch.zeros(1, DIM))
    other = make(1, whiten=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(forward(other, batch), forward(model, batch))


def kept(model: Decoder, rows: int) -> Tensor:
    """bool [rows, 2]: which rows keep image and text in one loss."""
    seen = []
    condition = model.condition

    def spy(image: Tensor, tokens: Tensor, keep_image: Tensor, keep_text: Tensor) -> object:
        seen.append(torch.stack([keep_image, keep_text], dim=1))
        return condition(image, tokens, keep_image, keep_text)

    model.condition = spy
    with torch.no_grad():
        decoder_loss(model, make_batch(rows), RandomStreams([(0, rows)]))
    return seen[0]


def test_embedding_and_caption_are_dropped_independently_at_the_stated_rates_in_training_alone() -> None:
    keep = kept(make(channels=4, head_channels=8, text_width=4).train(), 4000)
    dropped = ~keep
    assert dropped[:, 0].float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert dropped[:, 1].float().mean().item() == pytest.approx(0.5, abs=0.025)
    assert dropped.all(1).float().mean().item() == pytest.approx(0.05, abs=0.011)
    assert kept(make().eval(), 200).all()


def test_a_row_s_loss_does_not_depend_on_the_other_rows() -> None:
    model, batch = make().eval(), make_batch(3)
    with torch.no_grad():
        together = decoder_loss(model, batch, RandomStreams([(5, 1), (6, 1), (7, 1)]))
        alone = decoder_loss(model, {name: value[[2]] for name, value in batch.items()}, RandomStreams([(7, 1)]))
    assert together.total.shape == (3,)
    torch.testing.assert_close(alone.total, together.total[[2]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.total, together.parts["mse"] + together.parts["vb"])


def test_autocast_changes_the_loss_by_rounding_only() -> None:
    model, batch = make().eval(), make_batch(8)
    with torch.no_grad():
        full = decoder_loss(model, batch, RandomStreams([(0, 8)])).total
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = decoder_loss(model, batch, RandomStreams([(0, 8)])).total
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.02, rtol=0.02)


def test_max_snr_weighs_the_squared_error_alone() -> None:
    model, batch, rng = make().eval(), make_batch(8), RandomStreams([(3, 8)])
    assert model.config.prediction == "v"
    with torch.no_grad():
        plain = decoder_loss(model, batch, rng).parts
        model.config = dataclasses.replace(model.config, max_snr=5.0)
        bounded = decoder_loss(model, batch, rng).parts
    weight = error_weight("v", make_schedule("cosine", 1000).at(rng.integers("t", 1000)), 5.0).float()
    assert (weight < 1).any()
    torch.testing.assert_close(bounded["mse"], weight * plain["mse"])
    assert torch.equal(bounded["vb"], plain["vb"])


def test_guidance_moves_away_from_the_empty_condition() -> None:
    model, batch = make().eval(), make_batch(2)
    x_t, t = 0.1 * torch.randn(2, 3, 8, 8), torch.tensor([20, 20])
    plain, guided = (decoder_denoise(model, batch["image_embedding"], batch["tokens"], weight) for weight in (0.0, 0.5))
    empty = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        first, second = plain(x_t, t), guided(x_t, t)
        unconditional = model(x_t, t, batch["image_embedding"], batch["tokens"], empty, empty)[:, :3]
        conditional = model(x_t, t, batch["image_embedding"], batch["tokens"], ~empty, ~empty)[:, :3]
    level = make_schedule("cosine", 1000).at(t).float().view(-1, 1, 1, 1)
    for prediction, v in ((first, conditional), (second, 1.5 * conditional - 0.5 * unconditional)):
        expected = (level.sqrt() * x_t - (1 - level).sqrt() * v).clamp(-1, 1)
        torch.testing.assert_close(prediction.x0, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first.variance_fraction, second.variance_fraction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.7)])
def test_outside_of_its_interval_nothing_is_guided_and_a_step_costs_one_pass(interval: tuple[float, float]) -> None:
    model, batch = make().eval(), make_batch(2)
    arguments = (model, batch["image_embedding"], batch["tokens"])
    plain, always, within = (
        decoder_denoise(*arguments, 0.0), decoder_denoise(*arguments, 2.0), decoder_denoise(*arguments, 2.0, interval)
    )  # fmt: skip
    rows = []
    model.unet.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    x_t = 0.1 * torch.randn(2, 3, 8, 8)
    for step in (0, 299, 301, 499, 501, 699, 701, 999):
        t = torch.full((2,), step)
        expected = always if interval[0] <= step / 1000 <= interval[1] else plain
        with torch.no_grad():
            ours, theirs = within(x_t, t), expected(x_t, t)
        assert rows[-2] == rows[-1] == (4 if expected is always else 2)
        torch.testing.assert_close(ours.x0, theirs.x0, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.variance_fraction, theirs.variance_fraction, atol=1e-5, rtol=1e-5)


def test_what_is_added_for_layout_and_pixels_starts_as_nothing() -> None:
    torch.manual_seed(0)
    plain = Decoder(CONFIG, DIM)
    torch.manual_seed(0)
    added = Decoder(dataclasses.replace(CONFIG, layout_channels=3, pixel_channels=5), DIM)
    added.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(plain.unet.conv_out.weight)
    torch.nn.init.normal_(plain.unet.norm_out.weight)
    added.unet.load_state_dict(plain.unet.state_dict())
    batch = make_batch(2)
    assert torch.equal(forward(plain, batch), forward(added, batch))


def test_a_layout_says_what_is_where() -> None:
    """Of two positions that see the same all around them, only a layout can make different things."""
    model, batch = make(layout_channels=3).eval(), make_batch(2)
    keep = torch.ones(2, dtype=torch.bool)
    layout = model.condition(batch["image_embedding"], batch["tokens"], keep, keep).layout
    assert layout.shape == (2, 64, 4, 4)
    assert not torch.allclose(layout[0], layout[1], atol=1e-3)
    assert layout.std(dim=(2, 3)).min() > 1e-3
    weight, bias = model.layout.positions.weight.view(3, 4, 4, DIM), model.layout.positions.bias.view(3, 4, 4)
    hidden = F.silu(torch.einsum("bd,chwd->bchw", batch["image_embedding"] * DIM**0.5, weight) + bias)
    out = model.layout.out
    expected = torch.einsum("bchw,oc->bohw", hidden, out.weight[:, :, 0, 0]) + out.bias.view(-1, 1, 1)
    torch.testing.assert_close(layout, expected, atol=1e-4, rtol=1e-4)


def test_a_layout_with_clips_own_text_tower_reads_the_words_of_captions_that_are_not_dropped() -> None:
    model, batch = make(layout_channels=3, text_encoder="frozen").eval(), make_batch(2)
    keep = torch.ones(2, dtype=torch.bool)
    same = batch["image_embedding"][:1].expand(2, -1)
    layout = model.condition(same, batch["tokens"], keep, keep).layout
    assert not torch.allclose(layout[0], layout[1], atol=1e-3)
    words = batch["tokens"].clone()
    words[:, 1:5] = words[:, 1:5].flip(1)  # in another order
    torch.testing.assert_close(model.condition(same, words, keep, keep).layout, layout)
    dropped = model.condition(same, batch["tokens"], keep, ~keep).layout
    torch.testing.assert_close(dropped[0], dropped[1])


def test_glides_caption_vector_is_the_last_positions() -> None:
    """Not the first's, which all positions of a network that is not causal could serve as well."""
    torch.manual_seed(0)
    encoder = TextEncoder(vocabulary=50, context=6, width=8, depth=1, heads=2).eval()
    encoded = encoder(torch.randint(1, 50, (3, 9)), torch.tensor([True, True, False]))
    assert torch.equal(encoded.pooled, encoded.states[:, 5])
    assert not torch.equal(encoded.pooled, encoded.states[:, 0])
