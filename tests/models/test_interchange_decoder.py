"""The decoder against diffusers' own classes, through folders that each side wrote."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UnCLIPScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.decoder import Decoder, decoder_denoise
from models.diffusion.schedules import make_schedule
from models.image_configs import DecoderConfig
from models.interchange import export_decoder, import_decoder, unet
from models.interchange.decoder import swap_tokens
from models.nn.text_encoder import ClipTextEncoder
from models.nn.transformer import Block, Transformer, quick_gelu
from models.nn.unet import Attention, ResBlock, UNet
from tests.models.mutations import fails_under
from tests.models.test_unet import normal

DIM, CONTEXT, VOCABULARY = 24, 11, 50
START, END = VOCABULARY - 2, VOCABULARY - 1
TOKENS = 3
NORM = 7.5
CONFIG = DecoderConfig(
    image_size=16, channels=32, depth=2, multipliers=(1, 2), head_channels=16, attention_resolutions=(8,), dropout=0.1,
    text_context=CONTEXT, text_width=DIM, text_depth=2, text_heads=2, vocabulary=VOCABULARY, clip_tokens=TOKENS,
    null_image="learned", text_encoder="clip", context_width=20, embedding_norm=NORM,
)  # fmt: skip


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module, all of whose weights matter: none are zero, and signals keep their size."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.ndim > 1 and "embed" not in name and "position" not in name and "token" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def precise(scheduler: UnCLIPScheduler) -> UnCLIPScheduler:
    """The same scheduler in double precision: in single, the first step's 1 - (1 - alpha) keeps no digit of alpha."""
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def captions() -> Tensor:
    """Three of 77 tokens: a short one, one that fills the context, and an empty one."""
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    tokens[0, :5] = torch.tensor([START, 3, 17, 9, END])
    tokens[1, :CONTEXT] = torch.tensor([START, *range(20, 20 + CONTEXT - 2), END])
    tokens[2, :2] = torch.tensor([START, END])
    return tokens


def clip_text_tower(seed: int = 5, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> open_clip.CLIP:
    """A small CLIP of open_clip with OpenAI's activation; its text tower is the reference for ours."""
    text = {"context_length": context, "vocab_size": vocabulary, "width": DIM, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64}
    return lively(open_clip.CLIP(DIM, vision, text, quick_gelu=True), seed)


def text_features(clip: open_clip.CLIP, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """open_clip's states of all tokens, its embedding of the caption, not of unit norm, and which are no padding."""
    tokens = tokens[:, :CONTEXT]
    states = clip.ln_final(clip.transformer(clip.token_embedding(tokens) + clip.positional_embedding, clip.attn_mask))
    return states, clip.encode_text(tokens), torch.arange(CONTEXT) <= (tokens == END).int().argmax(1)[:, None]


def write_text_encoder(clip: open_clip.CLIP, folder: Path) -> None:
    """The tower in the layout of transformers' CLIPTextModelWithProjection."""
    vocabulary, context = len(clip.token_embedding.weight), len(clip.positional_embedding)
    weights = {
        "text_model.embeddings.token_embedding.weight": clip.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": clip.positional_embedding,
        "text_model.embeddings.position_ids": torch.arange(context)[None],  # as old versions wrote
        "text_model.final_layer_norm.weight": clip.ln_final.weight,
        "text_model.final_layer_norm.bias": clip.ln_final.bias,
        "text_projection.weight": clip.text_projection.T,
    }
    for i, block in enumerate(clip.transformer.resblocks):
        prefix = f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            weights |= {f"{prefix}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            for name, module in (
                ("self_attn.out_proj", block.attn.out_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):
                weights[f"{prefix}.{name}.{kind}"] = getattr(module, kind)
    folder.mkdir(parents=True)
    save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    config = {"vocab_size": vocabulary, "hidden_size": DIM, "intermediate_size": 4 * DIM, "projection_dim": DIM,
              "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": context}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


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
    network = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        dropout=0.1,
        cross_attention_dim=20,
        attention_head_dim=16,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
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


def difference(decoder: Decoder, theirs: Theirs) -> float:
    x, t, image, tokens = inputs()
    return (ours(decoder) - theirs(x, t, NORM * image, tokens)).abs().max().item()


@fails_under(
    (ResBlock, "* (1 + scale)", "* scale"),
    (ResBlock, "modulation.chunk(2, dim=1)", "modulation.chunk(2, dim=1)[::-1]"),
    (Attention, "torch.cat([context_values, values], dim=2)", "torch.cat([values, context_values], dim=2)"),
    (UNet, "embedding = embedding + added", "embedding = embedding"),
    (UNet, "timestep_embedding(t, ", "timestep_embedding(t + 1, "),
    (Decoder, "value=True)", "value=False)"),
    (Block, "causal=masked", "causal=False"),
    (Transformer, "return self.norm(x)", "return x"),
    (quick_gelu, "torch.sigmoid(1.702 * x)", "torch.sigmoid(1.6 * x)"),
    (ClipTextEncoder, "tokens.argmax(1)", "tokens.argmax(1) - 1"),
    (swap_tokens, ".transpose(0, 1)", ""),
    (unet, 'f"{theirs}.to_{part}" for part in "qkv"', 'f"{theirs}.to_{part}" for part in "qvk"'),
    (unet, 'f"{theirs}.add_{part}_proj" for part in "kv"', 'f"{theirs}.add_{part}_proj" for part in "vk"'),
)
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


def test_the_comparison_sees_the_length_of_embeddings(folder: Path, theirs: Theirs) -> None:
    assert difference(import_decoder(folder, 0.99 * NORM), theirs) > 1e-3


def test_the_four_tokens_and_the_time_are_karlos(folder: Path, theirs: Theirs) -> None:
    decoder = import_decoder(folder, NORM)
    _, _, image, tokens = inputs()
    kept = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        condition = decoder.condition(image, tokens, kept, kept)
        states, embedding, shown = text_features(theirs.clip, tokens)
        context, added = theirs.text_proj(
            image_embeddings=NORM * image,
            prompt_embeds=embedding,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=False,
        )
    torch.testing.assert_close(condition.context[:, :TOKENS], context[:, :TOKENS], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(condition.context, context, atol=1e-5, rtol=0)
    torch.testing.assert_close(condition.added, added, atol=1e-5, rtol=0)
    assert torch.equal(condition.shown, F.pad(shown, (TOKENS, 0), value=True))


def test_the_text_encoder_is_clips(theirs: Theirs, folder: Path) -> None:
    encoded = import_decoder(folder, NORM).text(captions(), torch.tensor([True, True, False]))
    states, embedding, shown = text_features(theirs.clip, captions())
    torch.testing.assert_close(encoded.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.pooled, embedding, atol=1e-5, rtol=0)
    assert torch.equal(encoded.shown, shown)


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_theirs_to_ours_to_theirs_is_the_same_to_the_bit(folder: Path, theirs: Theirs, tmp_path: Path) -> None:
    export_decoder(import_decoder(folder, NORM), tmp_path)
    before, after = tensors(folder), tensors(tmp_path)
    before["text_encoder/model.safetensors"].pop("text_model.embeddings.position_ids")
    assert not after.pop("ours/decoder/model.safetensors")
    assert before.keys() == after.keys()
    for part in before:
        assert_same(before[part], after[part])
    again = Theirs(
        UNet2DConditionModel.from_pretrained(tmp_path / "decoder"),
        UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj"),
        theirs.clip,
    )
    assert difference(import_decoder(tmp_path), again) < 1e-4
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
        output = output if decoder.pixels is None else decoder.pixels(x, output)
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
