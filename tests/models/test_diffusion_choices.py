"""What the sampling options make of the samplers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from models import cascade
from models.decoder import Decoder
from models.diffusion.samplers import ancestral, ddim, dpm_solver
from models.diffusion.schedules import fast27_grid, log_snr_grid, make_schedule, strided_grid, trailing_grid
from models.diffusion_prior import diffusion_prior_denoise, diffusion_prior_variance
from models.random_streams import RandomStreams
from models.reverse import ReverseProcess, sampling_grid, silent
from models.sampling_config import STEPS as STEPS_OPTION
from models.sampling_config import SamplingConfig
from models.tokens import tokenize
from models.upsampler import Upsampler
from tests.models.closed_form import ring
from tests.models.small_models import CAPTIONS, DIM, make

PRIOR_SAMPLERS = get_args(get_type_hints(SamplingConfig)["prior_sampler"])
DECODER_SAMPLERS = get_args(get_type_hints(SamplingConfig)["decoder_sampler"])
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
    grid, noise = trailing_grid(1000, STEPS), torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))

    def rng() -> RandomStreams:
        return RandomStreams([(0, 3)])

    def sampled(variance: Tensor | str) -> Tensor:
        return ancestral(denoise, noise, grid, SCHEDULE, rng(), variance)

    expected = {
        "analytic": lambda: sampled(diffusion_prior_variance(model, grid)),
        "ddpm": lambda: sampled("small"),
        "ddim": lambda: ddim(denoise, noise, grid, SCHEDULE),
        "dpm": lambda: dpm_solver(denoise, noise, log_snr_grid(SCHEDULE, STEPS), SCHEDULE),
    }
    run = ReverseProcess("diffusion_prior", sampler, "small", STEPS, silent)
    assert torch.equal(run(model, denoise, noise, rng()), expected[sampler]())


def test_every_sampler_of_the_decoder_is_an_option_and_each_makes_something_of_its_own(unclip: Any) -> None:
    heard: list[tuple[str, int, int]] = []
    options = {"size": 64, "decoder_steps": 6}
    made = [
        unclip.generate(CAPTIONS[:1], [1], lambda *step: heard.append(step[:3]), **options, decoder_sampler=sampler)
        for sampler in DECODER_SAMPLERS
    ]
    assert len({out.images[16].numpy().tobytes() for out in made}) == len(DECODER_SAMPLERS)
    assert [step for name, step, _ in heard if name == "decoder"] == list(range(1, 7)) * len(DECODER_SAMPLERS)


@pytest.mark.parametrize(("field", "value"), [("prior_sampler", "euler"), ("decoder_sampler", "analytic")])
def test_an_unknown_sampler_is_refused_with_the_known_ones(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is '{value}': use .*'ddpm', 'ddim' or 'dpm'"):
        SamplingConfig(**{field: value})


GRIDS = [
    ("diffusion_prior", 14, trailing_grid),
    ("decoder", 16, strided_grid),
    ("upsampler_256", 27, lambda steps, _: fast27_grid(steps)),
    ("upsampler_1024", 27, strided_grid),
]
OPTIONS = {"decoder_sampler": "ddim", "prior_steps": 2, "decoder_steps": 2, "upsampler_256_steps": 2}


@pytest.mark.parametrize(("stage", "steps", "grid"), GRIDS)
def test_the_cascade_visits_the_timesteps_of_its_grid(
    unclip: Any, stage: str, steps: int, grid: Callable[[int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLIDE's 27 for the first upsampler and nothing else, and below 15 steps none is spent on timestep 0."""
    name = f"{stage.removesuffix('_256').removesuffix('_1024')}_denoise"
    visited: dict[int, list[int]] = {}
    original = getattr(cascade, name)

    def recording(model: Any, *rest: Any) -> Callable[..., Any]:
        denoise, times = original(model, *rest), visited.setdefault(id(model), [])

        def recorded(x: Tensor, t: Tensor) -> Any:
            times.append(int(t[0]))
            return denoise(x, t)

        return recorded

    monkeypatch.setattr(cascade, name, recording)
    options = OPTIONS | {"upsampler_1024_steps": 2, STEPS_OPTION[stage]: steps}
    unclip.generate(CAPTIONS[:1], [1], candidates=1, **options)
    assert visited[id(getattr(unclip, stage))] == grid(1000, steps).tolist()


def test_few_steps_end_early_but_for_a_network_of_the_last_timestep() -> None:
    made = make()
    last = Upsampler(replace(made.upsampler_256.config, last_unet=True))
    assert torch.equal(sampling_grid("upsampler_256", last, 7), strided_grid(1000, 7))
    assert torch.equal(sampling_grid("upsampler_256", made.upsampler_256, 7), trailing_grid(1000, 7))
    assert torch.equal(sampling_grid("upsampler_256", made.upsampler_256, 27), fast27_grid(1000))
    assert torch.equal(sampling_grid("decoder", made.decoder, 27), strided_grid(1000, 27))
    images = Upsampler(replace(made.upsampler_256.config, prediction="x0"))
    assert torch.equal(sampling_grid("upsampler_256", images, 26), strided_grid(1000, 26))
    of_images = Decoder(replace(made.decoder.config, prediction="x0"), made.decoder.embed_dim, made.decoder.text_tower)
    assert torch.equal(sampling_grid("decoder", of_images, 27), trailing_grid(1000, 27))
    of_v = Decoder(replace(made.decoder.config, prediction="v"), made.decoder.embed_dim, made.decoder.text_tower)
    assert torch.equal(sampling_grid("decoder", of_v, 27), strided_grid(1000, 27))
    assert torch.equal(sampling_grid("decoder", of_images, 27, inverted=True), trailing_grid(1000, 27))
    assert torch.equal(sampling_grid("decoder", made.decoder, 7, inverted=True), strided_grid(1000, 7))
    assert torch.equal(sampling_grid("diffusion_prior", made.diffusion_prior, 14), trailing_grid(1000, 14))
    assert torch.equal(sampling_grid("diffusion_prior", made.diffusion_prior, 15), strided_grid(1000, 15))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_few_steps_come_nearer_to_many_when_they_end_early(schedule: str) -> None:
    """DDIM on a mixture whose best prediction is known, against its own result in 200 steps."""
    made = make_schedule(schedule, 1000)
    best, noise = ring(made), torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit = ddim(best, noise, strided_grid(1000, 200), made)
    for count in (3, 4, 6):
        far, near = (
            (ddim(best, noise, grid(1000, count), made) - limit).norm() for grid in (strided_grid, trailing_grid)
        )
        assert near < far


@pytest.mark.parametrize("name", STEPS_OPTION.values())
def test_a_number_of_steps_that_sampling_would_refuse_is_refused_before_anything_is_drawn(
    unclip: Any, name: str
) -> None:
    def told(*_: object) -> None:
        pytest.fail("something was drawn")

    for steps, said in ((1, "use 2 or more"), (1001, "use 2 to 1000")):
        with pytest.raises(ValueError, match=f"{name} is {steps}.*{said}"):
            unclip.generate(CAPTIONS[:1], [1], told, **{name: steps})
    with pytest.raises(ValueError, match=r"tile is 10: upsampler_1024 takes multiples of \d+ px"):
        unclip.generate(CAPTIONS[:1], [1], told, tile=10)
