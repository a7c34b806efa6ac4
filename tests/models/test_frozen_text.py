"""The text tower of a CLIP in the decoder and the priors: read as CLIP reads it, never trained, and kept with them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ar_prior import ARPrior, ar_prior_loss
from models.clip import Clip, config_named
from models.codec import Codec
from models.codec_fit import fit_codec
from models.decoder import Decoder, decoder_denoise, decoder_loss
from models.diffusion_prior import DiffusionPrior, diffusion_prior_denoise, diffusion_prior_loss
from models.folder import load_model, save_model
from models.frozen_text import FrozenCaption, FrozenText, FrozenTower
from models.image_configs import DecoderConfig
from models.interchange import export_decoder, export_prior, import_decoder, import_prior
from models.interchange.prior import prior_inputs
from models.losses import Losses
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig, TextTower
from models.random_streams import RandomStreams
from models.tokens import tokenize
from tests.models.karlo import lively

DIM, CONTEXT, WIDTH = 16, 12, 32
CLIP = ClipConfig(
    embed_dim=DIM, image_size=32, layers=(1,), width=32, patch=16, text_width=WIDTH, text_layers=2, text_heads=2,
    text_context=CONTEXT,
)  # fmt: skip
DECODER = DecoderConfig(
    image_size=8, channels=32, depth=1, multipliers=(1, 2), head_channels=16, attention_resolutions=(4,), dropout=0.0,
    text_width=24, text_depth=1, text_heads=2, text_encoder="frozen", steps=50,
)  # fmt: skip
PRIOR = DiffusionPriorConfig(text_context=20, width=32, depth=1, heads=2, text_encoder="frozen", steps=50)
AR_PRIOR = ARPriorConfig(
    text_context=20, prefix=8, text_width=24, text_depth=1, text_heads=2, width=32, depth=1, heads=2, buckets=8,
    text_encoder="frozen",
)  # fmt: skip
CAPTIONS = ["a red heart", "", "a woman who is running with a dog on a pale green background", "an owl!"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    made = Clip.build(CLIP, 0)
    lively(made.model)
    return made.eval()


@pytest.fixture(scope="module")
def tower(clip: Clip) -> FrozenTower:
    return FrozenTower.of(clip.model_config, clip.model.state_dict())


def codec() -> Codec:
    z = F.normalize(torch.randn(200, DIM, generator=torch.Generator().manual_seed(0)), dim=1).double()
    return fit_codec(z, z[:, 0], 6, 8).codec


def make(kind: str, tower: FrozenTower) -> Any:
    """A model whose weights are no longer at their zero start."""
    builds: dict[str, Callable[[], nn.Module]] = {
        "decoder": lambda: Decoder(DECODER, DIM, tower.sizes),
        "diffusion_prior": lambda: DiffusionPrior(PRIOR, DIM, tower.sizes),
        "ar_prior": lambda: ARPrior(AR_PRIOR, DIM, 6, tower.sizes),
    }
    model = lively(builds[kind]())
    tower.put_into(model)
    return model


def make_batch(captions: list[str]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = len(captions)
    image, text = F.normalize(torch.randn(2, rows, DIM, generator=g), dim=-1)
    pixels = torch.randint(0, 256, (rows, 3, 8, 8), generator=g, dtype=torch.uint8)
    return {"image": pixels, "tokens": tokenize(captions), "image_embedding": image, "text_embedding": text}


def loss(kind: str, model: Any, batch: dict[str, Tensor]) -> Losses:
    rng = RandomStreams([(0, len(batch["tokens"]))])
    if kind == "ar_prior":
        return ar_prior_loss(model, batch, rng, codec())
    return {"decoder": decoder_loss, "diffusion_prior": diffusion_prior_loss}[kind](model, batch, rng)


def states_of(clip: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """open_clip's own states of all tokens."""
    vectors = clip.token_embedding(tokens) + clip.positional_embedding
    return clip.ln_final(clip.transformer(vectors, attn_mask=clip.attn_mask))


KINDS = ("decoder", "diffusion_prior", "ar_prior")


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_states_and_embedding_are_open_clips(quick_gelu: bool, custom_text: bool) -> None:
    """Of both ways in which open_clip holds a text tower, and of both activations."""
    config = CLIP.model_config() | {"quick_gelu": quick_gelu} | ({"custom_text": True} if custom_text else {})
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    sizes = {name: value for name, value in config.items() if name != "custom_text"}
    theirs: Any = lively(kind(**sizes))
    tower = FrozenTower.of(config, theirs.state_dict())
    assert tower.sizes == TextTower(WIDTH, 2, 2, CONTEXT, quick_gelu=quick_gelu)
    ours = FrozenText(tower.sizes, DIM, 77)
    tower.put_into(nn.ModuleList([ours]))
    tokens = tokenize(["a red heart", "", "an owl!"])
    with torch.no_grad():
        found = ours(tokens, torch.ones(3, dtype=torch.bool))
        expected = states_of(theirs.text if custom_text else theirs, tokens[:, :CONTEXT])
        torch.testing.assert_close(found.pooled, theirs.encode_text(tokens[:, :CONTEXT]), atol=1e-5, rtol=1e-5)
    assert found.shown.tolist() == [[place < end for place in range(CONTEXT)] for end in (5, 2, 5)]
    torch.testing.assert_close(found.states[found.shown], expected[found.shown], atol=1e-5, rtol=1e-5)


def test_a_caption_that_clip_cuts_is_cut_as_clip_cuts_it(clip: Clip, tower: FrozenTower) -> None:
    ours = FrozenText(tower.sizes, DIM, 77)
    tower.put_into(nn.ModuleList([ours]))
    tokens = tokenize(CAPTIONS)
    assert (tokens[2] == 49407).int().argmax() >= CONTEXT
    with torch.no_grad():
        pooled = ours(tokens, torch.ones(4, dtype=torch.bool)).pooled
        torch.testing.assert_close(F.normalize(pooled, dim=-1), clip.encode_text(tokens), atol=1e-5, rtol=1e-5)


def test_how_long_other_captions_of_a_batch_are_does_not_matter(tower: FrozenTower) -> None:
    """In sampling to the last bit; a training may leave out what no caption of its batch needs."""
    caption = FrozenCaption(tower.sizes, DIM, 20, 24)
    tower.put_into(caption)
    keep = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        together = caption(tokenize(CAPTIONS), keep)
        alone = torch.cat([caption(tokenize([one]), keep[:1]) for one in CAPTIONS])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        caption.eval()
        pairs = (tokenize(["a cat", other]) for other in ("an owl", "an owl on a red roof"))
        short, long = (caption(pair, keep[:2])[0] for pair in pairs)
    assert torch.equal(short, long)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_tower_and_everything_else_learns(kind: str, tower: FrozenTower) -> None:
    model = make(kind, tower).train()
    loss(kind, model, make_batch(CAPTIONS)).total.sum().backward()
    frozen = [name for name, parameter in model.named_parameters() if ".text." in f".{name}"]
    assert len(frozen) == len(tower.weights)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen or name == "null_image"), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_matters_unless_it_is_dropped_and_what_follows_its_end_never_does(
    kind: str, tower: FrozenTower
) -> None:
    model, batch = make(kind, tower), make_batch(CAPTIONS)
    padded = batch["tokens"].clone()
    padded[0, 7:] = 17

    def seen(tokens: Tensor, keep: bool = True) -> Tensor:
        kept = torch.full((4,), keep)
        if kind == "decoder":
            condition = model.condition(batch["image_embedding"], tokens, kept, kept)
            return torch.cat([condition.added.flatten(), condition.context[condition.shown].flatten()])
        return model.caption(tokens, kept)

    with torch.no_grad():
        as_it_is, other = seen(batch["tokens"]), seen(batch["tokens"].roll(1, 0))
        assert not torch.allclose(as_it_is, other, atol=1e-3)
        torch.testing.assert_close(seen(padded), as_it_is, atol=1e-4, rtol=1e-4)
        assert torch.equal(seen(batch["tokens"], keep=False), seen(batch["tokens"].roll(1, 0), keep=False))
        if kind != "decoder":
            assert torch.equal(seen(batch["tokens"], keep=False), model.caption.padding.expand(4, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_opens_by_itself(kind: str, tower: FrozenTower, tmp_path: Path) -> None:
    model = make(kind, tower)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert (again.config, again.text_tower) == (model.config, tower.sizes)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    batch = make_batch(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(loss(kind, model, batch).total, loss(kind, again, batch).total)
    with pytest.raises(ValueError, match="pass its sizes as text_tower"):
        type(model)(model.config, DIM, *([6] if kind == "ar_prior" else []))


def test_sampling_has_the_condition_of_training(tower: FrozenTower) -> None:
    """A sampler's model predicts what the loss's does, and without a caption what the loss's does of a dropped one."""
    decoder, prior, batch = make("decoder", tower), make("diffusion_prior", tower), make_batch(CAPTIONS)
    g, t, kept = torch.Generator().manual_seed(1), torch.tensor([20, 5, 30, 40]), torch.ones(4, dtype=torch.bool)
    x, z = torch.randn(4, 3, 8, 8, generator=g), torch.randn(4, DIM, generator=g)
    with torch.no_grad():
        trained = prior(z, t, batch["tokens"], batch["text_embedding"], kept)
        sampled = diffusion_prior_denoise(prior, batch["tokens"], batch["text_embedding"])(z, t).x0
        torch.testing.assert_close(sampled, trained, atol=1e-5, rtol=1e-5)
        for tokens, keep in ((batch["tokens"], kept), (None, ~kept)):
            output = decoder(x, t, batch["image_embedding"], batch["tokens"], kept, keep)
            sampled = decoder_denoise(decoder, batch["image_embedding"], tokens, guidance=0.0)(x, t).x0
            torch.testing.assert_close(sampled, _x0(output, x, t), atol=1e-4, rtol=1e-4)


def _x0(output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The clipped image in a prediction of noise, by the cosine schedule's closed form (Nichol & Dhariwal 2021)."""
    steps = torch.arange(51, dtype=torch.float64) / 50
    share = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    alpha_bar = torch.cumprod(1 - (1 - share[1:] / share[:-1]).clamp(max=0.999), 0)[t].float().view(-1, 1, 1, 1)
    return ((x - (1 - alpha_bar).sqrt() * output[:, :3]) / alpha_bar.sqrt()).clamp(-1, 1)


def test_exported_models_come_back_to_the_bit(tower: FrozenTower, tmp_path: Path) -> None:
    """Where CLIP's text tower is as wide as its embeddings; the prior keeps its copy in "ours"."""
    clip = Clip.build(replace(CLIP, text_width=DIM), 0)
    narrow = FrozenTower.of(clip.model_config, clip.model.state_dict())
    decoder, prior = make("decoder", narrow), make("diffusion_prior", narrow)
    export_decoder(decoder, tmp_path)
    export_prior(prior, tmp_path)
    text = (tmp_path / "text_encoder/config.json").read_text()
    assert '"hidden_act": "gelu"' in text
    assert f'"max_position_embeddings": {CONTEXT}' in text
    for model, again in ((decoder, import_decoder(tmp_path)), (prior, import_prior(tmp_path))):
        assert (again.config, again.text_tower) == (model.config, model.text_tower)
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = make_batch(CAPTIONS)
    given = prior_inputs(prior, batch["tokens"], batch["text_embedding"], torch.ones(4, dtype=torch.bool))
    assert given["encoder_hidden_states"].shape == (4, PRIOR.text_context, PRIOR.width)
    with pytest.raises(ValueError, match="text_width is 32 and CLIP's embeddings have 16 dimensions"):
        export_decoder(make("decoder", tower), tmp_path / "other")


def test_the_sizes_are_those_that_open_clip_names() -> None:
    assert TextTower.of(config_named("ViT-B-32")) == TextTower(512, 12, 8)
    assert TextTower.of(config_named("ViT-L-14-quickgelu")) == TextTower(768, 12, 12, quick_gelu=True)
    with pytest.raises(ValueError, match=r"this CLIP's has hf_tokenizer_name, no_causal_mask, .*choose another CLIP"):
        TextTower.of(open_clip.get_model_config("ViT-B-16-SigLIP"))


def test_words_are_the_same_in_any_order_each_counts_once_and_padding_is_none(tower: FrozenTower) -> None:
    model = make("diffusion_prior", tower)
    text = model.caption.text
    words = text.words(tokenize(["a red owl", "owl red a", "a red owl!", "", "a red red owl a owl"]))
    torch.testing.assert_close(words[0], words[1])
    torch.testing.assert_close(words[0], words[4])
    assert (words[2] - words[0]).norm() == pytest.approx(1.0, abs=1e-4)
    assert not words[3].any()


def test_with_a_ridge_the_prior_begins_as_the_line_and_a_hidden_caption_as_the_mean(tower: FrozenTower) -> None:
    """By both ways through the network; what ``out`` learns is added."""
    model = DiffusionPrior(replace(PRIOR, ridge=True), DIM, tower.sizes).eval()
    tower.put_into(model)
    batch, g = make_batch(CAPTIONS), torch.Generator().manual_seed(1)
    said = model.line.inputs(model.caption.text, batch["tokens"], batch["text_embedding"])
    assert said.shape == (4, DIM + WIDTH)
    weight, mean, image_mean = (
        torch.randn(*shape, generator=g) for shape in ((DIM, DIM + WIDTH), said.shape[1:], (DIM,))
    )
    model.line.start_from(weight, mean, image_mean)
    keep = torch.tensor([True, False, True, True])
    line = image_mean + torch.where(keep[:, None], (said - mean) @ weight.T, 0.0)
    x_t, t = torch.randn(4, DIM, generator=g), torch.tensor([40, 20, 3, 0])
    captions = (batch["tokens"], batch["text_embedding"], keep)
    torch.testing.assert_close(model(x_t, t, *captions), model.scale * line, rtol=1e-4, atol=1e-4)
    torch.nn.init.normal_(model.out.weight)
    learned = model(x_t, t, *captions)
    assert (learned - model.scale * line).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(model.predict(x_t, t, model.condition(*captions)), learned, rtol=1e-4, atol=1e-4)
    assert not {name for name, _ in model.named_parameters() if name.startswith("line")}  # nothing trains it
