"""The decoder against diffusers' own classes, through folders that each side wrote."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UnCLIPScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from safetensors.torch import load_file
from torch import Tensor

from models.decoder import Decoder, decoder_denoise
from models.diffusion.schedules import make_schedule
from models.interchange import export_decoder, import_decoder
from tests.models import karlo
from tests.models.karlo import (
    CONFIG,
    DIM,
    NORM,
    TOKENS,
    assert_same,
    captions,
    clip_text_tower,
    lively,
    text_features,
    write_text_encoder,
)
from tests.models.small_models import normal


class Theirs(NamedTuple):
    unet: UNet2DConditionModel
    text_proj: UnCLIPTextProjModel
    clip: open_clip.CLIP

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, image: Tensor, tokens: Tensor, guided: bool = False) -> Tensor:
        """UnCLIPPipeline's call of its decoder, with unconditional rows before the others if ``guided``."""
        if guided:
            empty = captions()[2:].expand(len(tokens), -1)
            tokens, x, t = torch.cat([empty, tokens]), x.repeat(2, 1, 1, 1), t.repeat(2)
        states, embedding, shown = text_features(self.clip, tokens)
        context, added = self.text_proj(
            image_embeddings=image,
            prompt_embeds=embedding,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=guided,
        )
        mask = F.pad(shown, (TOKENS, 0), value=True)
        return self.unet(x, t, encoder_hidden_states=context, class_labels=added, attention_mask=mask).sample


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    network = karlo.unet(16, 2, (32, 64), 20, 16, dropout=0.1)
    text_proj = UnCLIPTextProjModel(
        clip_extra_context_tokens=TOKENS, clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=20
    )
    return Theirs(lively(network, 1), lively(text_proj, 2), clip_text_tower())


@pytest.fixture(scope="module")
def folder(theirs: Theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers' pipeline writes it, with Karlo's parts."""
    folder = tmp_path_factory.mktemp("karlo")
    theirs.unet.save_pretrained(folder / "decoder")
    theirs.text_proj.save_pretrained(folder / "text_proj")
    UnCLIPScheduler(variance_type="learned_range").save_pretrained(folder / "decoder_scheduler")
    write_text_encoder(theirs.clip, folder / "text_encoder")
    return folder


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, unit-norm image embeddings and captions; the image is no square."""
    return normal(3, 3, 16, 24), torch.tensor([0, 421, 999]), F.normalize(normal(3, DIM, seed=2), dim=1), captions()


@torch.no_grad()
def ours(decoder: Decoder, keep: bool = True) -> Tensor:
    kept = torch.full((3,), keep)
    return decoder(*inputs(), kept, kept)


def test_karlos_decoder_opens_here(folder: Path, theirs: Theirs) -> None:
    decoder = import_decoder(folder, NORM)
    assert dataclasses.replace(decoder.config, drop_image=0.1, drop_text=0.5) == CONFIG
    assert decoder.null_image.requires_grad
    assert not decoder.training
    x, t, image, tokens = inputs()
    expected = theirs(x, t, NORM * image, tokens)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(ours(decoder), expected, atol=1e-4, rtol=0)


def test_its_unconditional_branch_and_guidance_are_karlos(folder: Path, theirs: Theirs) -> None:
    decoder = import_decoder(folder, NORM)
    x, _, image, tokens = inputs()
    t = torch.full((3,), 300)
    both = theirs(x, t, NORM * image, tokens, guided=True)
    kept = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(decoder(x, t, image, tokens, kept, kept), both[:3], atol=1e-4, rtol=0)
    # diffusers: uncond + scale (cond - uncond), with the conditional branch's variance; the weight here is scale - 1.
    noise = both[:3, :3] + 8 * (both[3:, :3] - both[:3, :3])
    level = make_schedule("cosine", 1000).at(t).float().view(-1, 1, 1, 1)
    expected = ((x - (1 - level).sqrt() * noise) / level.sqrt()).clamp(-1, 1)
    prediction = decoder_denoise(decoder, image, tokens, guidance=7.0)(x, t)
    torch.testing.assert_close(prediction.x0, expected, atol=1e-3, rtol=0)  # the difference, eight times over
    torch.testing.assert_close(prediction.variance_fraction, (both[3:, 3:] + 1) / 2, atol=1e-4, rtol=0)


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_theirs_to_ours_to_theirs_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    export_decoder(import_decoder(folder, NORM), tmp_path)
    before, after = tensors(folder), tensors(tmp_path)
    before["text_encoder/model.safetensors"].pop("text_model.embeddings.position_ids")
    assert not after.pop("ours/decoder/model.safetensors")
    assert before.keys() == after.keys()
    for part in before:
        assert_same(before[part], after[part])
    assert UnCLIPScheduler.from_pretrained(tmp_path / "decoder_scheduler").config.variance_type == "learned_range"


@pytest.mark.parametrize(
    "changes",
    [
        {"null_image": "zero", "drop_text": 0.3},
        {"text_encoder": "glide", "context_width": 0, "embedding_norm": 0.0, "text_width": 20},
        {"patch": 2, "image_size": 32},
        {"multipliers": (1, 1, 3), "attention_resolutions": (16, 4), "depth": 1, "clip_tokens": 4},
        {"patch": 2, "image_size": 32, "layout_channels": 3, "pixel_channels": 5},
    ],
)
def test_ours_opens_in_diffusers_and_comes_back_to_the_bit(changes: dict, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    decoder = lively(Decoder(config, DIM))
    export_decoder(decoder, tmp_path)
    network = UNet2DConditionModel.from_pretrained(tmp_path / "decoder").eval()
    x, t, image, tokens = inputs()
    width = config.image_size * (1 if config.layout_channels else 2)
    x, kept = normal(3, 3, config.image_size, width), torch.tensor([True, True, False])
    with torch.no_grad():
        condition = decoder.condition(image, tokens, kept, kept)
        patches = F.pixel_unshuffle(x, config.patch)
        zeros = [torch.zeros(1)] * len(config.multipliers) * (config.depth + 1)
        layout = {"mid_block_additional_residual": condition.layout, "down_block_additional_residuals": zeros}
        layout = {} if condition.layout is None else layout
        output = network(
            patches,
            t,
            encoder_hidden_states=condition.context,
            class_labels=condition.added,
            attention_mask=condition.shown,
            **layout,
        ).sample
        output = F.pixel_shuffle(output, config.patch)
        output = output if decoder.pixels is None else decoder.pixels(output, x, decoder.unet.timestep(t))
        expected = decoder(x, t, image, tokens, kept, kept)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    back = import_decoder(tmp_path)
    assert back.config == config
    assert_same(decoder.state_dict(), back.state_dict())


@pytest.mark.parametrize(("schedule", "prediction"), [("cosine", "eps"), ("cosine", "v"), ("linear", "eps")])
def test_the_diffusion_process_goes_along(schedule: str, prediction: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule, prediction=prediction, steps=500)
    export_decoder(Decoder(config, DIM), tmp_path)
    kind = UnCLIPScheduler if (schedule, prediction) == ("cosine", "eps") else DDPMScheduler
    scheduler = kind.from_pretrained(tmp_path / "decoder_scheduler")
    expected = make_schedule(schedule, 500).alpha_bar.float()
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, atol=1e-6, rtol=0)
    assert scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[prediction]
    for file in (tmp_path / "ours").rglob("*"):
        if file.is_file():
            file.unlink()
    (tmp_path / "ours/decoder").rmdir()
    found = import_decoder(tmp_path, NORM).config
    assert (found.schedule, found.steps, found.prediction) == (schedule, 500, prediction)
