"""A folder as Karlo's becomes a generator, and a bundle."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer

from models.cascade import UnCLIP
from models.clip import Clip
from models.decoder import decoder_denoise
from models.diffusion.samplers import ancestral
from models.diffusion.schedules import make_schedule, trailing_grid
from models.diffusion_prior import diffusion_prior_denoise, diffusion_prior_gamma, diffusion_prior_loss
from models.interchange import import_decoder, import_prior, import_unclip
from models.pixels import to_uint8
from models.prior_configs import ClipConfig
from models.random_streams import RandomStreams, derive_seed
from models.sampling_config import SamplingConfig
from models.tokens import tokenize
from tests.models.karlo import DIM, assert_same
from tests.models.small_models import normal

CAPTIONS, SEEDS = ["a portrait of an old monk", ""], [3, 4]
SCHEDULE = make_schedule("cosine", 1000)


def clip(dim: int = DIM) -> Clip:
    """A CLIP with the tokens and the dimension of the folder, which says nothing else of it."""
    config = ClipConfig(embed_dim=dim, layers=(1,), width=dim, patch=16, text_width=dim, text_layers=1, text_heads=2)
    return Clip.build(config, seed=0).eval()


@pytest.fixture(scope="module")
def unclip(karlo_folder: Path) -> UnCLIP:
    return import_unclip(karlo_folder, clip())


def test_it_samples_as_karlo_does_unless_told_otherwise(unclip: UnCLIP, karlo_folder: Path) -> None:
    theirs = SamplingConfig(
        candidates=1, prior_steps=25, prior_sampler="ddpm", prior_guidance=3.0, decoder_steps=50, decoder_guidance=7.0,
        upsampler_256_steps=7, size=256,
    )  # fmt: skip
    assert unclip.sampling == theirs
    other = SamplingConfig(candidates=3)
    assert import_unclip(karlo_folder, clip(), other).sampling == other


def test_the_prior_in_the_cascade_is_karlos(unclip: UnCLIP, karlo_folder: Path) -> None:
    """Against the imported prior and a sampler by hand, and diffusers' own post-processing."""
    tokens = tokenize(CAPTIONS)
    text, sampling = unclip.clip.encode_text(tokens), dataclasses.replace(unclip.sampling, prior_steps=4)
    embedding = unclip.draw_embedding(tokens, text, SEEDS, sampling)
    prior, rng = import_prior(karlo_folder), RandomStreams([(derive_seed(seed, "prior", 0), 1) for seed in SEEDS])
    kept, unused = torch.ones(2, dtype=torch.bool), torch.full((2, DIM), torch.nan)
    denoise = diffusion_prior_denoise(prior, tokens, unused, guidance=3.0)
    noise = rng.normal("x_T", DIM)
    first = denoise(noise, torch.tensor([999, 999])).x0
    with torch.no_grad():
        t = torch.tensor([999, 999])
        shown, hidden = (prior(noise, t, tokens, unused, keep) for keep in (kept, ~kept))
    torch.testing.assert_close(first, 4 * shown - 3 * hidden, rtol=0, atol=1e-5)
    samples = ancestral(denoise, noise, trailing_grid(1000, 4), SCHEDULE, rng, "small")
    with torch.no_grad():
        theirs = PriorTransformer.from_pretrained(karlo_folder / "prior").post_process_latents(samples)
    torch.testing.assert_close(embedding, F.normalize(theirs, dim=-1), rtol=0, atol=1e-6)


def test_the_decoder_in_the_cascade_is_karlos(unclip: UnCLIP, karlo_folder: Path) -> None:
    pictures = unclip.generate(CAPTIONS, SEEDS, prior_steps=2, decoder_steps=3, upsampler_256_steps=2)
    rng = RandomStreams([(derive_seed(seed, "decoder"), 1) for seed in SEEDS])
    denoise = decoder_denoise(import_decoder(karlo_folder), pictures.embedding, tokenize(CAPTIONS), guidance=7.0)
    low = ancestral(denoise, rng.normal("x_T", 3, 16, 16), trailing_grid(1000, 3), SCHEDULE, rng, "learned")
    assert torch.equal(pictures.images[16], to_uint8(low).permute(0, 2, 3, 1))
    assert list(pictures.images) == [16, 64]
    assert pictures.image.float().std() > 10


def test_as_a_bundle_it_is_the_same_generator(unclip: UnCLIP, tmp_path: Path) -> None:
    unclip.save(tmp_path)
    again = UnCLIP.from_folder(tmp_path)
    assert again.sampling == unclip.sampling
    for name in ("decoder", "diffusion_prior", "upsampler_256"):
        before, after = getattr(unclip, name), getattr(again, name)
        assert (type(after), after.config) == (type(before), before.config)
        assert_same(before.state_dict(), after.state_dict())


def test_without_an_upsampler_images_stay_small(karlo_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(karlo_folder, tmp_path / "copy"))
    for name in ("super_res_first", "super_res_last", "super_res_scheduler"):
        shutil.rmtree(copy / name)
    unclip = import_unclip(copy, clip())
    assert list(unclip.generate(["a cat"], [0], prior_steps=2, decoder_steps=2).images) == [16]


def test_another_clip_is_refused(karlo_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"prior was trained on 24-dimensional embeddings, this CLIP makes 16: pass"):
        import_unclip(karlo_folder, clip(16))


def test_a_clip_prior_is_sampled_only(unclip: UnCLIP) -> None:
    prior = unclip.diffusion_prior
    assert prior is not None
    unit = F.normalize(normal(2, DIM), dim=-1)
    batch = {"tokens": tokenize(CAPTIONS), "text_embedding": unit, "image_embedding": unit}
    for use in (
        lambda rng: diffusion_prior_loss(prior, batch, rng),
        lambda rng: diffusion_prior_gamma(prior, [(batch, rng)]),
    ):
        with pytest.raises(ValueError, match="can be sampled, but neither trained nor measured"):
            use(RandomStreams([(0, 2)]))
