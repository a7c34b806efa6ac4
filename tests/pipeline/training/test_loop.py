"""The loop: what a step does to weights, averages and the journal."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.ar_prior import SmoothEmbedding
from models.clip import Clip
from models.folder import KINDS
from models.losses import Losses
from models.random_streams import RandomStreams, StreamsSlice
from pipeline.config import preset_config
from pipeline.cost.flops import text_tower
from pipeline.errors import UserError
from pipeline.graph.device import OutOfMemory, memory_for
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.process_group import CHECK_EVERY, ProcessGroup
from pipeline.training.feed.feed import Feed, LocalBatch
from pipeline.training.memory import fitting_rows
from pipeline.training.optimizer import make_optimizer
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.state import TrainState, begin, learning_rate, update_ema
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.timing import StepTimer
from pipeline.training.train import backward, fit, line_due
from tests.pipeline.training import conftest
from tests.pipeline.training.conftest import EMBED_DIM
from tests.pipeline.training.trainings import MODEL

RECIPE = DiffusionPriorRecipe(samples=64, batch=16, lanes=8, precision="fp32", model=MODEL, ema_half_life=32)


@pytest.fixture
def share(shared_world: conftest.World) -> LocalBatch:
    feed = Feed(shared_world.store, shared_world.inputs, task(), RECIPE)
    shares = feed.batches(0)
    first = next(shares)
    shares.close()
    return first


def task() -> DiffusionPriorTask:
    return DiffusionPriorTask(MODEL, EMBED_DIM)


def timer() -> StepTimer:
    return StepTimer({}, torch.device("cpu"))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 15])
def test_micro_batches_add_up_to_the_batch(share: LocalBatch, size: int) -> None:
    """Pieces that cut lanes in two as well: gradient and loss agree within 1e-6."""
    whole, pieces = (begin(task(), RECIPE, ProcessGroup()).objective for _ in range(2))
    rows, values = backward(whole, share, RECIPE, 16, ProcessGroup(), timer())
    cut_rows, cut_values = backward(pieces, share, RECIPE, size, ProcessGroup(), timer())
    assert torch.allclose(rows, cut_rows, atol=1e-6)
    assert {n: float(v) for n, v in cut_values.items()} == pytest.approx(
        {n: float(v) for n, v in values.items()}, abs=1e-6
    )
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradient, gradients(pieces)[name], atol=1e-6)


def test_a_part_of_a_draw_has_the_numbers_of_the_whole() -> None:
    rng = RandomStreams([(1, 2), (2, 3), (3, 1)])
    for start in range(6):
        for stop in range(start + 1, 7):
            part = StreamsSlice(rng, start, stop)
            assert part.rows == stop - start
            assert torch.equal(part.normal("a", 2, 3), rng.normal("a", 2, 3)[start:stop])
            assert torch.equal(part.uniform("b"), rng.uniform("b")[start:stop])
            assert torch.equal(part.integers("c", 9, 2), rng.integers("c", 9, 2)[start:stop])
            assert torch.equal(part.keep("d", 0.5), rng.keep("d", 0.5)[start:stop])


def test_ema_without_half_life_is_the_model_and_statistics_are_copied() -> None:
    averaged, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model(torch.randn(8, 3))
    nn.init.normal_(model.weight)
    update_ema(averaged, model, samples=16, half_life=0)
    assert all(
        torch.equal(a, b) for a, b in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("half_life", [0, 8, 1 << 40])
def test_weights_are_averaged_with_at_most_a_tenth_of_the_samples_as_half_life(
    share: LocalBatch, half_life: int
) -> None:
    """Counted from the first step of the training, so that one which stops in between and goes on does the same."""
    recipe = replace(RECIPE, samples=16 * 10, ema_half_life=half_life, learning_rate=0.1)
    spiked: Any = Spiked(share, None)
    state = begin(spiked, recipe, ProcessGroup())
    seen: list[tuple[Tensor, Tensor]] = []

    def pause(state: TrainState) -> None:
        seen.append((state.ema.state_dict()["bias"].clone(), state.model.state_dict()["bias"].clone()))

    for stop in (6, 10):
        fit("decoder", spiked, replace(recipe, samples=16 * stop), TrainingSettings(), ProcessGroup(), state, pause)
    del seen[6]  # paused twice there: at the stop, and where it goes on
    assert len(seen) == 11
    expected = seen[0][0]
    for before, (average, weights) in enumerate(seen[1:]):
        effective = min(half_life, 16 * before / 10)
        expected = weights + (expected - weights) * (0.5 ** (16 / effective) if effective else 0.0)
        assert torch.allclose(average, expected, atol=1e-6)
    assert torch.equal(seen[-1][0], seen[-1][1]) == (half_life == 0)


def test_warm_up_rises_then_stays() -> None:
    recipe = replace(RECIPE, warmup_steps=4, learning_rate=1.0)
    assert [learning_rate(recipe, samples) for samples in (16, 32, 64, 80)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(replace(recipe, warmup_steps=0), 16) == 1.0
    assert learning_rate(replace(recipe, batch=32), 64) == 0.5  # the second step of four, however many rows it has


def test_the_rate_falls_to_the_stop() -> None:
    """Full at the first step of the fall, one part of the steps that are left at each, and never zero."""
    recipe = replace(
        RECIPE, samples=150, decay=64, warmup_steps=2, learning_rate=1.0
    )  # ten batches of 16, the last four
    assert recipe.fork == 96
    assert [learning_rate(recipe, samples) for samples in range(16, 161, 16)] == [0.5, *[1.0] * 6, 0.75, 0.5, 0.25]
    assert replace(recipe, decay=0).fork == 160


@pytest.mark.parametrize("preset", ["nano", "tiny"])
@pytest.mark.parametrize("name", ["clip", "ar_prior", "diffusion_prior", "decoder", "karlo's decoder", "upsampler_256"])
def test_weight_decay_takes_nothing_but_weights_of_layers(preset: str, name: str) -> None:
    """Not positions, and not the padding that stands for "no text", of any network that is trained. What decays beside
    the weights of linear layers and convolutions is named here: open_clip's projections."""
    whole = preset_config(preset)
    config = getattr(whole, name.removeprefix("karlo's ")).model
    if name == "karlo's decoder":
        config = replace(config, text_encoder="clip")
    if name == "clip":
        model: nn.Module = Clip.build(config, 0)
    else:
        kind = KINDS[name.removeprefix("karlo's ").removesuffix("_256")]
        sizes = {"embed_dim": 64, "codes": 8, "text_tower": text_tower(config, whole.clip)}
        with torch.device("meta"):  # only names and kinds are looked at
            model = kind.model(config, **{size: sizes.get(size) for size in kind.sizes})
        model.to_empty(device="cpu")
    groups = make_optimizer(model, replace(RECIPE, weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    decayed, rest = ({id(p) for p in group["params"]} for group in groups)
    assert decayed | rest == trained
    assert not decayed & rest
    modules = dict(model.named_modules())
    odd = set()
    for path, parameter in model.named_parameters():
        owner, _, own = path.rpartition(".")
        is_layer = isinstance(modules[owner], (nn.Linear, nn.Conv2d)) and own == "weight"
        is_layer &= not isinstance(modules[owner], SmoothEmbedding)
        assert (is_layer and parameter.requires_grad) <= (id(parameter) in decayed) <= parameter.requires_grad
        if id(parameter) in decayed and not is_layer:
            odd.add(own)
    assert odd <= ({"in_proj_weight", "text_projection", "proj"} if name == "clip" else set())


def test_lines_become_rarer_and_do_not_depend_on_the_stop() -> None:
    due = [step for step in range(1, 2049) if line_due(step)]
    assert due[:128] == list(range(1, 129))
    for doubling in (256, 512, 1024):
        assert sum(doubling < step <= 2 * doubling for step in due) == 64


class Spiked:
    """A task that spoils the loss of one row, or the gradient. It is its feed, too."""

    def __init__(self, share: LocalBatch, bad: int | None, gradient: float = 1.0, step: int = 0):
        self.share, self.bad, self.gradient, self.step = share, bad, gradient, step
        self.steps = 0

    def model(self, seed: int) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], rng: RandomStreams) -> Losses:
        rows = model(torch.ones(len(batch["image_embedding"]), 1))[:, 0]
        if self.bad is not None and self.steps == self.step:
            rows = rows * torch.ones(len(rows)).index_fill(0, torch.tensor(self.bad), float("nan"))
        rows.register_hook(lambda gradient: gradient * self.gradient)
        self.steps += 1
        return Losses(rows, {})

    def batches(self, samples: int) -> Iterator[LocalBatch]:
        while True:
            yield self.share


@pytest.mark.parametrize(
    ("bad", "gradient", "words"), [(3, 1.0, "the loss of rows"), (None, float("inf"), "the gradient")]
)
def test_what_is_not_finite_ends_the_training(share: LocalBatch, bad: int | None, gradient: float, words: str) -> None:
    spiked: Any = Spiked(share, bad, gradient)
    state = begin(spiked, RECIPE, ProcessGroup())
    with pytest.raises(UserError) as caught:
        fit("decoder", spiked, RECIPE, TrainingSettings(), ProcessGroup(), state, lambda _: None)
    message = str(caught.value)
    assert message.startswith(f"decoder: {words}")
    assert "after sample 0" in message
    assert "\n" not in message
    if bad is not None:
        assert share.keys[bad] in message


def test_a_bad_step_is_noticed_later_and_known_from_then_on(share: LocalBatch) -> None:
    """Nobody waits for a step's loss: the state says at once that it has failed, and the message names the first."""
    spiked: Any = Spiked(share, bad=3, step=5)
    recipe = replace(RECIPE, samples=1 << 40)
    state = begin(spiked, recipe, ProcessGroup())
    start = state.samples = 2**14 * recipe.batch  # where the journal has a line in 256 steps
    failed: list[bool] = []

    def pause(state: TrainState) -> None:
        failed.append(bool(state.failed))

    with pytest.raises(UserError) as caught:
        fit("decoder", spiked, recipe, TrainingSettings(), ProcessGroup(), state, pause)
    assert failed == [False] * 6 + [True] * (CHECK_EVERY - 6)
    said = f"the loss of rows {share.keys[3]} is not finite after sample {start + 5 * recipe.batch:,};"
    assert said in str(caught.value)


class Hungry(Spiked):
    """A task that asks for 2^50 bytes for more than ``most`` rows. It has one validation row."""

    prepare, most = None, 3

    def validation(self, rows: int, size: int) -> list[LocalBatch]:
        row = {name: column[:1] for name, column in self.share.batch.items()}
        return [LocalBatch(row, self.share.keys[:1], [(0, 1)])]

    def loss(self, model: nn.Module, batch: dict[str, Tensor], rng: RandomStreams) -> Losses:
        if len(batch["image_embedding"]) > self.most:
            torch.empty(1 << 50, dtype=torch.uint8)
        return super().loss(model, batch, rng)


def test_as_many_rows_are_computed_at_once_as_fit(share: LocalBatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of 16 rows two. The trial leaves neither gradients nor moments."""
    hungry: Any = Hungry(share, None)
    state = begin(hungry, RECIPE, ProcessGroup())
    before = state.model.state_dict()["weight"].clone()
    with caplog.at_level(logging.INFO):
        assert fitting_rows("decoder", hungry, RECIPE, 16, ProcessGroup(), state) == 2
    assert [int(n) for n in re.findall(r"micro-batch of (\d+) rows", caplog.text)] == [8, 4, 2]
    assert fitting_rows("decoder", hungry, RECIPE, 3, ProcessGroup(), state) == 3
    assert torch.equal(state.model.state_dict()["weight"], before)
    assert not gradients(state.model)
    assert not state.optimizer.state
    with pytest.raises(OutOfMemory) as caught:
        fit("decoder", hungry, RECIPE, TrainingSettings(micro_batch=5), ProcessGroup(), state, lambda _: None)
    assert caught.value.args == ("5 rows at once", 5)
    hungry.most = 0
    with pytest.raises(OutOfMemory):  # in words that may be those of something else than a lack of memory
        fitting_rows("decoder", hungry, RECIPE, 4, ProcessGroup(), state)
    assert "decoder: one row: [enforce fail" in caplog.text


@pytest.mark.parametrize(
    ("said", "lacking"),
    [
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", False),
    ],
)
def test_too_little_memory_is_told_from_other_failures(said: str, lacking: bool) -> None:
    with pytest.raises(OutOfMemory if lacking else RuntimeError) as caught, memory_for("a step", 3):
        raise RuntimeError(said)
    assert caught.value.args == (("a step", 3) if lacking else (said,))
