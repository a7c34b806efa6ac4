"""The losses, samplers and encoders that run on the fake device."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from models.ar_prior import ARPrior, ar_prior_loss
from models.ar_prior import sample as sample_codes
from models.clip import Clip
from models.clip_loss import clip_loss
from models.decoder import decoder_denoise, decoder_loss
from models.diffusion import samplers
from models.diffusion.process import log_variance_range
from models.diffusion.schedules import Schedule, make_schedule
from models.diffusion_prior import DiffusionPrior, best_of, diffusion_prior_denoise, diffusion_prior_loss
from models.losses import Losses
from models.precision import autocast
from models.random_streams import RandomStreams, StreamsSlice
from models.reverse import Progress, ReverseProcess
from models.tokens import END
from models.upsampler import Upsampler, sampling_low, upsampler_denoise, upsampler_loss
from pipeline.config import preset_config
from pipeline.data.embeddings.encoder import Encoder
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import LocalBatch
from pipeline.training.optimizer import make_optimizer
from pipeline.training.state import TrainState
from pipeline.training.task import Objective
from pipeline.training.train import fit
from tests.models.fake_cuda.build import (
    CODES,
    CUDA,
    DIM,
    ROWS,
    STREAMS,
    Sampling,
    Step,
    batch,
    build,
    clip,
    codec,
    config,
    decoder,
    prior,
    zeros,
)
from tests.models.fake_cuda.watch import Watch, pretend

# --- losses: forward and backward under autocast ----------------------------------------------------------------------


class Training:
    """A micro-batch: the rows' loss and its gradient, as the training loop computes them."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, dict[str, Tensor], RandomStreams], Losses],
        columns: dict[str, Tensor],
    ):
        self.model, self.loss, self.columns = model, loss, columns

    def __call__(self) -> None:
        with autocast(CUDA, "bf16"):
            total = self.loss(self.model, self.columns, StreamsSlice(RandomStreams(STREAMS, CUDA), 0, ROWS)).total
        assert (total.device.type, total.dtype, total.shape) == ("cuda", torch.float32, (ROWS,))
        total.sum().backward()
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        assert len(gradients) > 0.9 * len(learning)
        assert {(x.device.type, x.dtype) for x in gradients} == {("cuda", torch.float32)}
        for parameter in learning:
            parameter.grad = None

    def compile_whole(self) -> None:
        """Compiles the network. Raises in a call where the compiler would break its graph.

        The graph runs as it is: breaks are found when it is traced, and compiling it takes minutes.
        """
        for name in ("encode_pixels", "encode_text") if isinstance(self.model, Clip) else ("forward",):
            whole = torch.compile(getattr(self.model, name), fullgraph=True, backend="eager")
            setattr(self.model, name, whole)


def upsampler_training(stage: str, **changes: Any) -> Training:
    """With crops and small images, as the feed makes them; the damage of BSR, whose sizes are drawn, is for the CPU."""
    sizes = replace(config("nano", stage), **changes)
    crop, low = (zeros(ROWS, 3, side, side) for side in (sizes.crop_size, sizes.crop_size // sizes.scale))
    made = {"crop": crop.to(torch.uint8), "low": low}
    columns = batch(sizes.image_size) if sizes.corruption == "blur" else made
    return Training(build(lambda: Upsampler(sizes)), upsampler_loss, columns)


def clip_training(changes: dict[str, Any]) -> Training:
    chosen = replace(preset_config("nano").clip.model, **changes)
    return Training(build(lambda: clip(chosen)), clip_loss, batch(chosen.image_size))


RESNET = {"tower": "resnet", "layers": (1, 1, 1, 1), "image_size": 64, "width": 16}
LOSSES: dict[str, Callable[[], Training]] = {
    "clip": lambda: clip_training({}),
    "clip, resnet": lambda: clip_training(RESNET),
    "decoder, frozen text, layout and pixels": lambda: Training(
        decoder(text_encoder="frozen", layout_channels=4, pixel_channels=8), decoder_loss, batch(64)
    ),
    "diffusion_prior": lambda: Training(prior("diffusion_prior", DiffusionPrior), diffusion_prior_loss, batch(64)),
    "ar_prior": lambda: Training(
        prior("ar_prior", ARPrior, CODES), lambda model, b, rng: ar_prior_loss(model, b, rng, codec()), batch(64)
    ),
    "upsampler_256, pixels": lambda: upsampler_training("upsampler_256", pixel_channels=8),
    "upsampler_1024": lambda: upsampler_training("upsampler_1024"),
}


# --- samplers: what the steps after the first cost --------------------------------------------------------------------


def steps(grid: Tensor, schedule: Schedule, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """Does what ``grid_steps`` does, for a grid whose values are known: fake ones have none."""
    visited = (999, 400, 3)
    for i, (t, previous) in enumerate(zip(visited, (*visited[1:], -1), strict=True)):
        rows = x.new_ones(len(x), dtype=torch.int64)
        yield i, rows * t, rows * previous, previous < 0


def rng() -> RandomStreams:
    return RandomStreams(STREAMS, CUDA)


def decoding(sampler: str, guidance: float = 0.0, eta: float = 0.0, **options: Any) -> Sampling:
    model, given = decoder().eval(), batch(64)
    denoise = decoder_denoise(model, given["image_embedding"], given["tokens"], guidance, **options)

    def sample(progress: Progress) -> Tensor:
        run = ReverseProcess("decoder", sampler, "learned", 3, progress, eta)
        return run(model, denoise, rng().normal("x_T", 3, 64, 64), rng())

    return sample


def priming(progress: Progress) -> Tensor:
    model, given = prior("diffusion_prior", DiffusionPrior).eval(), batch(64)
    model.gamma = zeros(model.config.steps)
    denoise = diffusion_prior_denoise(model, given["tokens"], given["text_embedding"], 1.0)
    run = ReverseProcess("diffusion_prior", "analytic", "small", 3, progress)
    made = model.image_embedding(run(model, denoise, rng().normal("x_T", DIM), rng()))
    return best_of(torch.stack([made, made]), given["text_embedding"])


def upsampling(tile: int = 0, **changes: Any) -> Sampling:
    sizes = config("nano", "upsampler_256", **changes)
    model = build(lambda: Upsampler(sizes)).eval()
    low = sampling_low(sizes, zeros(ROWS, 3, sizes.low_size, sizes.low_size), rng())
    denoise = upsampler_denoise(model, low, tile)

    def sample(progress: Progress) -> Tensor:
        noise = rng().normal("x_T", 3, sizes.image_size, sizes.image_size)
        return ReverseProcess("upsampler_256", "ddim", "small", 3, progress)(model, denoise, noise, rng())

    return sample


def inverting(progress: Progress) -> Tensor:
    model, given = decoder().eval(), batch(64)
    denoise = decoder_denoise(model, given["image_embedding"], None, 0.0)
    schedule = make_schedule("cosine", model.config.steps)
    image = given["image"].float()
    return samplers.ddim_inversion(denoise, image, zeros(3), schedule, lambda done, _: progress("inversion", done, 3))


def coding(progress: Progress) -> Tensor:
    model, given = prior("ar_prior", ARPrior, CODES).eval(), batch(64)
    arguments = (given["tokens"], given["text_embedding"], codec().sample_upper_dot(rng()), rng())
    codes = sample_codes(model, *arguments, 1.0, 1.0, lambda done: progress("ar_prior", done, CODES))
    return codec().decode(codes)


SAMPLERS: dict[str, Callable[[], Sampling]] = {
    "decoder, ddpm, guided": lambda: decoding("ddpm", 2.0),
    "decoder, ddim, eta 1, thresholded": lambda: decoding("ddim", eta=1.0, threshold=0.99),
    "decoder, dpm": lambda: decoding("dpm"),
    "decoder, guided in an interval": lambda: decoding("ddim", 2.0, interval=(0.2, 0.9)),
    "decoder, inversion": lambda: inverting,
    "diffusion_prior, analytic": lambda: priming,
    "ar_prior": lambda: coding,
    "upsampler_256, tiles": lambda: upsampling(tile=128),
    "upsampler_256, a network for the last step": lambda: upsampling(last_unet=True),
}


def encoding() -> Step:
    model = build(lambda: clip(preset_config("nano").clip.model)).eval()

    @torch.no_grad()
    def step() -> None:
        images, texts = model.encode_image(batch(64)["image"]), model.encode_text(batch(64)["tokens"])
        assert {(x.device.type, x.dtype) for x in (images, texts)} == {("cuda", torch.float32)}

    return step


def embedding() -> Step:
    """The embeddings stage's encoder until its results are fetched, on images and on captions of two lengths."""
    model = build(lambda: clip(preset_config("nano").clip.model)).eval()
    with unset_fake_temporarily():  # it makes tokens of an empty caption
        encoder = Encoder(model, ROWS, bf16=True)
    side = model.image_size
    views, tokens = np.zeros((2 * ROWS + 1, side, side, 3), np.uint8), np.zeros((2 * ROWS + 1, 77), np.int64)
    tokens[::2, 3] = tokens[1::2, 20] = END

    def step() -> None:
        encoder.images(views)
        encoder.texts(tokens)

    return step


# --- the loop of a training -------------------------------------------------------------------------------------------


class Finished(Exception):
    """Ends a training after the steps that are looked at."""


def fitting(watch: Watch) -> None:
    """A step of two micro-batches after another, between two lines of the journal, from batches on the CPU."""
    chosen = preset_config("nano").decoder
    recipe = replace(chosen, precision="bf16", optimizer="muon", lanes=2, window=1, batch=ROWS, samples=ROWS * 10_000)
    model, ema = decoder(text_encoder="glide", context_width=0), decoder(text_encoder="glide", context_width=0)
    task: Any = SimpleNamespace(loss=decoder_loss)
    optimizer = make_optimizer(model, recipe, half=True)
    state = TrainState(Objective(task, model), ema.requires_grad_(False), optimizer)
    first = 513  # the journal has a line every eighth step there, and none of the next is timed
    state.samples = first * ROWS
    host = {name: column.cpu() for name, column in batch(64).items()}
    local = LocalBatch(host, [str(i) for i in range(ROWS)], STREAMS)
    feed: Any = SimpleNamespace(batches=lambda samples: (local.pinned() for _ in count()))

    def between(state: TrainState) -> None:
        done = state.samples // ROWS - first
        if done == 1:
            watch.clear()
        elif done == 2:
            raise Finished

    with watch, contextlib.suppress(Finished):
        fit("decoder", feed, recipe, TrainingSettings(micro_batch=2), ProcessGroup(device=CUDA), state, between)
    assert state.samples == (first + 2) * ROWS
    assert {x.device.type for moments in state.optimizer.state.values() for x in moments.values()} == {"cuda"}


STEPS = {**{f"loss: {name}": case for name, case in LOSSES.items()}, "clip encodes": encoding, "embeddings": embedding}
SAMPLERS = {f"sampler: {name}": case for name, case in SAMPLERS.items()}
COMPILED = {f"compiled: {name}": case for name, case in LOSSES.items()}
FIT = "the loop of a training"
LARGE: dict[str, Callable[[], Step]] = {
    "loss: decoder, small": lambda: Training(decoder("small", layers=12), decoder_loss, batch(64)),
}
FAULTS: dict[str, Callable[[], Step]] = {
    "fault: devices mix": lambda: lambda: zeros(2) + torch.zeros(2),
    "fault: a blocking copy": lambda: lambda: torch.zeros(2).to(CUDA),
    "fault: a question": lambda: lambda: bool(zeros(2).any()),
}


def measure(name: str, watch: Watch) -> None:
    """Runs a case; what ``watch`` holds then is what it costs once everything is warm."""
    if name == FIT:
        fitting(watch)
        return
    if name in COMPILED:  # of which nothing is counted: compilers run a network their own way
        case = COMPILED[name]()
        case.compile_whole()
        case()
        return
    if name not in SAMPLERS:
        step = (STEPS | LARGE | FAULTS)[name]()
        with watch:
            step()
            watch.clear()
            step()
        return
    sampling = SAMPLERS[name]()
    kept: list[Any] = []

    def progress(_: str, done: int, of: int, *__: object) -> None:
        if done == 1:
            watch.clear()
        elif done == of:
            kept.append((watch.kernels, watch.copies, watch.asked))

    with watch, torch.no_grad():
        made = sampling(progress)
        assert (made.device.type, made.dtype) == ("cuda", torch.float32)
    [(watch.kernels, watch.copies, watch.asked)] = kept


def run(names: list[str]) -> dict[str, Any]:
    """Returns what was found of each case: kernels, copies, asked, or the error."""
    pretend()
    for steps_of in {config("nano", stage).steps for stage in ("decoder", "diffusion_prior", "upsampler_256")}:
        for schedule in ("cosine", "linear"):
            made = make_schedule(schedule, steps_of)  # a table of real values, which outlives a case
            log_variance_range(made, torch.tensor([1]), torch.tensor([0]))  # and so does its smallest variance
    samplers.grid_steps = steps
    found: dict[str, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for name in names:
        watch = Watch()
        try:
            with mode, torch.autograd.set_multithreading_enabled(False):
                measure(name, watch)
        except Exception:  # what it says is the finding
            found[name] = {"error": traceback.format_exc()}
            continue
        found[name] = {"kernels": watch.kernels, "copies": watch.copies, "asked": watch.asked}
    return found
