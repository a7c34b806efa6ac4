"""The diffusion prior against diffusers' own classes, through folders that each side wrote."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UnCLIPScheduler
from safetensors.torch import load_file
from torch import Tensor

from models.clip_prior import ClipPrior
from models.decoder import Decoder
from models.diffusion.samplers import ancestral
from models.diffusion.schedules import make_schedule, strided_grid
from models.diffusion_prior import DiffusionPrior, diffusion_prior_denoise
from models.interchange import export_decoder, export_prior, import_decoder, import_prior, prior_inputs
from models.prior_configs import DiffusionPriorConfig
from models.random_streams import RandomStreams
from tests.models import karlo
from tests.models.karlo import (
    CLIP_PRIOR,
    CONTEXT,
    DIM,
    VOCABULARY,
    assert_same,
    captions,
    clip_text_tower,
    lively,
    precise,
    text_features,
    write_text_encoder,
)
from tests.models.karlo import CONFIG as DECODER_CONFIG
from tests.models.small_models import normal

CONFIG = DiffusionPriorConfig(text_context=CONTEXT, width=32, depth=2, heads=2, vocabulary=VOCABULARY)
T = torch.tensor([0, 421, 999])


@pytest.fixture(scope="module")
def theirs() -> PriorTransformer:
    return lively(karlo.prior(), seed=6)


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    return clip_text_tower()


@pytest.fixture(scope="module")
def folder(theirs: PriorTransformer, clip: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers' pipeline writes it, with Karlo's prior."""
    folder = tmp_path_factory.mktemp("karlo")
    theirs.save_pretrained(folder / "prior")
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=1000.0)  # predictions stay below
    scheduler.save_pretrained(folder / "prior_scheduler")
    write_text_encoder(clip, folder / "text_encoder")
    return folder


@torch.no_grad()
def karlos(theirs: PriorTransformer, clip: open_clip.CLIP, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """UnCLIPPipeline's call of its prior."""
    states, embedding, shown = text_features(clip, tokens)
    return theirs(x, t, embedding, states, shown).predicted_image_embedding


def test_karlos_prior_opens_here(folder: Path, theirs: PriorTransformer, clip: open_clip.CLIP) -> None:
    prior = import_prior(folder)
    assert isinstance(prior, ClipPrior)
    assert prior.config == CLIP_PRIOR
    x, unused = normal(3, DIM), torch.full((3, DIM), torch.nan)
    expected = karlos(theirs, clip, x, T, captions())
    assert expected.abs().mean() > 0.1
    with torch.no_grad():
        out = prior(x, T, captions(), unused, torch.tensor([True, True, False]))  # the third caption is empty
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_four_steps_of_its_guided_sampling_are_karlos(
    folder: Path, theirs: PriorTransformer, clip: open_clip.CLIP
) -> None:
    """UnCLIPPipeline's loop at guidance scale 4; both sides get the same noise."""
    scheduler = precise(UnCLIPScheduler.from_pretrained(folder / "prior_scheduler"))
    scheduler.set_timesteps(4)
    x, noises = normal(3, DIM), torch.Generator().manual_seed(4)
    tokens = torch.cat([captions()[2:].expand(3, -1), captions()])
    for i, t in enumerate(scheduler.timesteps):
        empty, conditional = karlos(theirs, clip, x.repeat(2, 1), t, tokens).chunk(2)
        guided = empty + 4 * (conditional - empty)
        following = scheduler.timesteps[i + 1] if i < 3 else None
        x = scheduler.step(guided, t, x, prev_timestep=following, generator=noises).prev_sample
    assert x.abs().max() < 1000

    prior = import_prior(folder)
    noises, rng = torch.Generator().manual_seed(4), RandomStreams([(0, 3)])
    rng.normal = lambda purpose, *shape: torch.randn(3, *shape, generator=noises)
    denoise = diffusion_prior_denoise(prior, captions(), torch.zeros(3, DIM), guidance=3.0)
    samples = ancestral(denoise, normal(3, DIM), strided_grid(1000, 4), make_schedule("cosine", 1000), rng, "small")
    torch.testing.assert_close(samples, x, atol=1e-4, rtol=0)
    with torch.no_grad():
        expected = F.normalize(theirs.post_process_latents(x), dim=-1)
        torch.testing.assert_close(prior.image_embedding(samples), expected, atol=1e-5, rtol=0)


def test_theirs_to_ours_to_theirs_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    export_prior(import_prior(folder), tmp_path)
    for file in ("prior/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        before = load_file(folder / file)
        before.pop("text_model.embeddings.position_ids", None)
        assert_same(before, load_file(tmp_path / file))
    assert import_prior(tmp_path).config == CLIP_PRIOR


def own() -> DiffusionPrior:
    return lively(DiffusionPrior(CONFIG, DIM))


@torch.no_grad()
def exported(prior: DiffusionPrior, folder: Path, x: Tensor, *text: Tensor) -> Tensor:
    """What diffusers' network, opened from the folder, says."""
    network = PriorTransformer.from_pretrained(folder / "prior").eval()
    return network(x, T, **prior_inputs(prior, *text)).predicted_image_embedding


def test_our_prior_opens_in_diffusers(tmp_path: Path) -> None:
    prior, x = own(), normal(3, DIM)
    text = captions(), F.normalize(normal(3, DIM, seed=2), dim=1), torch.tensor([True, False, True])
    export_prior(prior, tmp_path)
    with torch.no_grad():
        expected = prior(x, T, *text)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(exported(prior, tmp_path, x, *text), expected, atol=1e-5, rtol=0)


def test_a_clip_prior_opens_in_diffusers(folder: Path, tmp_path: Path) -> None:
    prior, x = import_prior(folder), normal(3, DIM)
    text = captions(), normal(3, DIM), torch.tensor([True, False, True])
    export_prior(prior, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(exported(prior, tmp_path, x, *text), prior(x, T, *text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("measured", [False, True])
def test_ours_comes_back_to_the_bit(measured: bool, tmp_path: Path) -> None:
    prior = own()
    if measured:
        prior.gamma = torch.rand(1000)
    export_prior(prior, tmp_path)
    back = import_prior(tmp_path)
    assert type(back) is DiffusionPrior
    assert back.config == CONFIG
    assert ("gamma" in back.state_dict()) == measured
    assert_same(prior.state_dict(), back.state_dict())


def test_an_exported_prior_makes_embeddings_as_an_exported_decoder_takes_them(tmp_path: Path) -> None:
    prior = own()
    export_prior(prior, tmp_path)
    samples = F.normalize(normal(3, DIM), dim=1) * prior.scale
    embeddings = PriorTransformer.from_pretrained(tmp_path / "prior").post_process_latents(samples)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.full((3,), DIM**0.5))
    torch.testing.assert_close(F.normalize(embeddings, dim=1), F.normalize(samples, dim=1))


def test_the_prior_tells_the_decoder_how_long_embeddings_are(folder: Path, tmp_path: Path) -> None:
    """Standard normal samples have this root mean square length after the prior's post-processing."""
    export_prior(import_prior(folder), tmp_path)
    decoder = import_clip_decoder(tmp_path)
    network = PriorTransformer.from_pretrained(folder / "prior")
    embeddings = network.post_process_latents(torch.randn(20000, DIM, generator=torch.Generator().manual_seed(0)))
    measured = embeddings.square().sum(1).mean().sqrt().item()
    assert decoder.config.embedding_norm == pytest.approx(measured, rel=0.01)


def import_clip_decoder(folder: Path) -> Decoder:
    """A decoder whose text encoder is the prior's, written into its folder and opened as if it were Karlo's."""
    decoder = Decoder(DECODER_CONFIG, DIM)
    decoder.text = import_prior(folder).text
    export_decoder(decoder, folder)
    for file in (folder / "ours/decoder").iterdir():
        file.unlink()
    (folder / "ours/decoder").rmdir()
    return import_decoder(folder)


def test_a_second_text_encoder_is_refused_and_nothing_is_replaced(folder: Path, tmp_path: Path) -> None:
    export_prior(import_prior(folder), tmp_path)
    before = load_file(tmp_path / "text_encoder/model.safetensors")
    with pytest.raises(ValueError, match=r"text_encoder holds another text encoder: export this model into a folder"):
        export_decoder(Decoder(DECODER_CONFIG, DIM), tmp_path)
    assert_same(before, load_file(tmp_path / "text_encoder/model.safetensors"))
    assert not (tmp_path / "decoder").exists()
