"""What the sampling options make of the samplers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.diffusion.dpm_solver import dpm_solver
from models.diffusion.samplers import ancestral, ddim
from models.diffusion.schedules import log_snr_grid, make_schedule, strided_grid
from models.diffusion_prior import diffusion_prior_denoise, diffusion_prior_variance
from models.draw import Draw
from models.reverse import Reverse, ignore
from models.sampling_config import DECODER_SAMPLERS, PRIOR_SAMPLERS, SamplingConfig
from models.tokens import tokenize
from tests.models.test_cascade import CAPTIONS, DIM, make

SCHEDULE = make_schedule("cosine", 1000)
STEPS = 8


@pytest.fixture(scope="module")
def unclip() -> Any:
    made = make()
    made.diffusion_prior.gamma = torch.linspace(0, 1, 1000)
    return made


@pytest.mark.parametrize("sampler", PRIOR_SAMPLERS)
def test_every_sampler_of_the_prior_is_the_one_that_its_name_says(unclip: Any, sampler: str) -> None:
    model, tokens = unclip.diffusion_prior, tokenize(CAPTIONS)
    denoise = diffusion_prior_denoise(model, tokens, unclip.clip.encode_text(tokens))
    grid, noise = strided_grid(1000, STEPS), torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))

    def draw() -> Draw:
        return Draw([(0, 3)])

    def sampled(variance: Tensor | str) -> Tensor:
        return ancestral(denoise, noise, grid, SCHEDULE, draw(), variance)

    expected = {
        "analytic": lambda: sampled(diffusion_prior_variance(model, grid)),
        "ddpm": lambda: sampled("small"),
        "ddim": lambda: ddim(denoise, noise, grid, SCHEDULE),
        "dpm": lambda: dpm_solver(denoise, noise, log_snr_grid(SCHEDULE, STEPS), SCHEDULE),
    }
    run = Reverse("diffusion_prior", sampler, "small", STEPS, ignore)
    assert torch.equal(run(model, denoise, noise, draw()), expected[sampler]())


@pytest.mark.parametrize(("option", "samplers"), [("prior", PRIOR_SAMPLERS), ("decoder", DECODER_SAMPLERS)])
def test_every_sampler_is_an_option_and_each_makes_something_of_its_own(
    unclip: Any, option: str, samplers: tuple[str, ...]
) -> None:
    heard: list[tuple[str, int, int]] = []
    options = {"size": 64, f"{option}_steps": 6}
    made = [
        unclip.generate(
            CAPTIONS[:1], [1], lambda *step: heard.append(step), **options, **{f"{option}_sampler": sampler}
        )
        for sampler in samplers
    ]
    results = {(out.embedding if option == "prior" else out.images[16]).numpy().tobytes() for out in made}
    assert len(results) == len(samplers)
    stage = "diffusion_prior" if option == "prior" else "decoder"
    assert [step for name, step, _ in heard if name == stage] == list(range(1, 7)) * len(samplers)


def test_a_prior_that_was_never_measured_samples_with_the_variance_of_ddpm(unclip: Any) -> None:
    old = replace(unclip, diffusion_prior=make().diffusion_prior)
    made = [old.generate(CAPTIONS, [1, 2, 3], size=64, prior_sampler=name).embedding for name in ("analytic", "ddpm")]
    assert torch.equal(*made)


def test_the_papers_sampler_of_the_prior_is_the_default() -> None:
    assert (SamplingConfig().prior_sampler, SamplingConfig().prior_steps) == ("analytic", 64)


@pytest.mark.parametrize(("field", "value"), [("prior_sampler", "euler"), ("decoder_sampler", "analytic")])
def test_an_unknown_sampler_is_refused_with_the_known_ones(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is '{value}': use one of .*ddpm, ddim, dpm"):
        SamplingConfig(**{field: value})
