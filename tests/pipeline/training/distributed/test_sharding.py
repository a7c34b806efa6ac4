"""A sharded model trains what one device trains; any number of workers reads the checkpoints of any other."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context
from pipeline.settings import TrainingSettings
from pipeline.store.records import peek_record
from pipeline.training import stage
from pipeline.training.distributed import process_group
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.distributed.sharding import (
    first_row,
    full_tensor,
    is_saved,
    layers,
    local,
    rows_of,
    shard_module,
)  # fmt: skip
from pipeline.training.feed.feed import Feed
from pipeline.training.recipes import DecoderRecipe
from pipeline.training.records import CheckpointRecord
from pipeline.training.state import begin
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.timing import StepTimer
from pipeline.training.train import backward
from tests.pipeline.training.conftest import EMBED_DIM, World, make_world
from tests.pipeline.training.distributed.notes import lines, noting
from tests.pipeline.training.trainings import (
    DECODER,
    PRIOR_RECIPE,
    SETTINGS,
    assert_equal_trainings,
    made,
    train_together,
)

PRIOR = replace(PRIOR_RECIPE, samples=64, optimizer="muon")  # and AdamW for what it does not take
PICTURES = DecoderRecipe(
    samples=32, batch=8, lanes=4, precision="fp32", learning_rate=1e-3, ema_half_life=32,
    eps=1e-6,  # a smaller one makes steps of what is only rounding, in biases whose gradients are hardly more than that
    model=replace(DECODER, dropout=0.0),  # its masks follow the workers
)  # fmt: skip
Run = tuple[int, int]  # a stop and how many workers, 0 for this process


def settings(workers: int, **changes: Any) -> TrainingSettings:
    shared = {"sharded": True, "offload": workers == 2, "micro_batch": 3, "recompute": True} if workers else {}
    values: dict[str, Any] = {"workers": workers, "keep_checkpoints": 9}
    return replace(SETTINGS, **(values | shared | changes))


def trained(
    world: World, name: str, recipe: Any, runs: list[Run], folder: Path, around: Callable[..., None] | None = None
) -> Artifact:
    """What a training of one stage leaves that was stopped and went on with other workers."""
    for samples, workers in runs:
        ctx: Context = world.context(name, replace(recipe, samples=samples), settings(workers))
        if workers:
            before = partial(noting, folder)
            train_together(ctx, folder, partial(around, before) if around and workers == 4 else before)
        else:
            stage.train(ctx)
    return made(world, ctx)


def check_equal(world: World, name: str, recipe: Any, runs: list[Run], folder: Path) -> None:
    """The training equals a straight run in this process."""
    found = trained(world, name, recipe, runs, folder)
    straight = make_world(folder / "straight")
    expected = trained(straight, name, recipe, [(runs[-1][0], 0)], folder)
    assert_equal_trainings((world, found), (straight, expected))
    assert found.metrics["validation_loss"] == pytest.approx(expected.metrics["validation_loss"], abs=1e-5)


def test_two_and_three_workers_train_what_one_process_trains(world: World, tmp_path: Path) -> None:
    """From a checkpoint of this process, and back to it: every kind of tensor goes both ways.

    Of 5, 5 and 6 rows, 3 at once, all are taken in two passes: a sharded model computes only with all workers."""
    check_equal(world, "diffusion_prior", PRIOR, [(16, 0), (32, 2), (48, 3), (64, 0)], tmp_path)
    assert [set(lines(tmp_path / f"rows-{rank}")) for rank in range(3)] == [{"2", "3"}, {"2", "3"}, {"3"}]
    # One in each of two runs to begin with, and one whose operations are counted: the others get rows alone.
    assert [len(lines(tmp_path / f"models-{rank}")) for rank in range(3)] == [4, 0, 0]
    # Of the checkpoints at 16 and 32: what is not sharded is in the blobs of the first worker, and of two workers'
    # rows the first of three has none of the second's.
    assert [len(lines(tmp_path / f"read-{rank}")) for rank in range(3)] == [3 + 3, 3 + 6, 6]
    records = [peek_record(world.store, entry.path, CheckpointRecord) for entry in world.store.list("checkpoints/")]
    blobs = {record.samples: sorted(record.blobs) for record in records if record}
    assert blobs[16] == blobs[64] == ["ema", "model", "optimizer"]
    assert blobs[32] == sorted([*blobs[16], *(f"{part}.00001" for part in blobs[16])])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), [("diffusion_prior", PRIOR), ("decoder", PICTURES)])
def test_four_workers_leave_to_two_and_to_one_what_they_know(
    name: str, recipe: Any, world: World, tmp_path: Path
) -> None:
    runs = [(2 * recipe.batch, 4), (4 * recipe.batch, 2), (6 * recipe.batch, 1), (8 * recipe.batch, 3)]
    check_equal(world, name, recipe, runs, tmp_path)


def two_nodes(before: Callable[[int], None], rank: int) -> None:
    """Two workers on each of two machines."""
    nodes = [0, 0, 1, 1]
    place = ProcessGroup.place

    def placed(group: ProcessGroup, *given: Any) -> None:
        place(replace(group, node=nodes[rank]), *given)

    ProcessGroup.place = placed
    before(rank)


@pytest.mark.slow
def test_two_nodes_that_each_hold_the_model_train_it_and_save_one_copy(world: World, tmp_path: Path) -> None:
    """To a checkpoint of two nodes, from it, and from one of two workers."""
    found = trained(world, "diffusion_prior", PRIOR, [(16, 4), (32, 2), (48, 4)], tmp_path, two_nodes)
    straight = make_world(tmp_path / "straight")
    expected = trained(straight, "diffusion_prior", PRIOR, [(48, 0)], tmp_path)
    assert_equal_trainings((world, found), (straight, expected))
    records = [peek_record(world.store, entry.path, CheckpointRecord) for entry in world.store.list("checkpoints/")]
    blobs = [len(record.blobs) for record in records if record]
    assert set(blobs) == {6}  # three parts of two workers


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(("nodes", "room", "rows"), [([0] * 4, 1e9, 2), ([0, 0, 1, 1], 1e9, 4), ([0, 0, 1, 1], 1e3, 2),
                                                    ([0, 1, 1, 1], 1e9, 2), ([0, 1, 0, 1], 1e9, 2)])  # fmt: skip
def test_each_node_holds_the_model_where_it_has_room(
    nodes: list[int], room: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessGroup, "collect", lambda self, items: nodes if type(items[0]) is int else items)
    monkeypatch.setattr(process_group, "node_memory", lambda *given: room)
    group = ProcessGroup(rank=3, size=4, node=1, sharded=True)
    layer = nn.Linear(8, 8, bias=False)
    group.place(layer)
    assert local(layer.weight).shape == (rows, 8)
    assert first_row(layer.weight) == (6 if rows == 2 else 4)
    assert is_saved(layer.weight) == (rows == 2)


def test_a_node_has_the_memory_of_its_container(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = process_group.node_memory(torch.device("cpu"), 2, offload=True)
    monkeypatch.setattr(process_group, "container_memory", lambda: 1000)
    assert process_group.node_memory(torch.device("cpu"), 2, offload=True) == 1000 < whole


@pytest.fixture
def four() -> Iterator[None]:
    """The last of four workers, without the others."""
    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@given(rows=st.integers(1, 50), workers=st.integers(1, 12))
def test_a_sharded_tensor_is_cut_as_torch_cuts_it(rows: int, workers: int) -> None:
    parts: Iterable[Tensor] = torch.arange(rows).chunk(workers)
    expected = [part.tolist() for part in parts]
    expected += [[]] * (workers - len(expected))
    assert [list(rows_of(worker, workers, rows)) for worker in range(workers)] == expected


class Seen(nn.Module):
    """A linear layer that notes the kinds of its input and its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.kinds: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.kinds |= {x.dtype, self.linear.weight.dtype}
        return x + self.linear(x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Seen(), Seen()])
        self.last = Seen()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers[1](self.layers[0](x)))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sharded", [False, True])
def test_gpus_wait_for_each_other_as_long_as_they_are_told(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and those that hold one copy of a model."""

    def limits() -> list[float]:
        return [found._get_backend(torch.device("cpu")).options._timeout.seconds for found in (dist.group.WORLD, copy)]

    model, copy, ended = nn.Linear(2, 2), dist.new_group([0]), []
    if sharded:
        fully_shard(model, mesh=DeviceMesh.from_group(copy, "cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: ended.append(limits()))
    before = limits()
    ProcessGroup(size=2).wait_at_most(7, model)
    ProcessGroup(device=torch.device("cuda")).wait_at_most(7, model)
    assert (limits(), ended) == (before, [])
    ProcessGroup(size=2, device=torch.device("cuda")).wait_at_most(7, model)
    assert (limits(), ended) == ([7, 7 if sharded else before[1]], [before])


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("error")
def test_a_module_is_wrapped_without_a_warning() -> None:
    assert isinstance(ProcessGroup(size=2).wrap(nn.Linear(2, 2)), DistributedDataParallel)


@pytest.mark.usefixtures("alone")
def test_weights_are_gathered_in_bf16_and_gradients_are_added_in_fp32() -> None:
    torch.manual_seed(0)
    plain = Small()
    sharded = deepcopy(plain)
    shard_module(sharded, torch.device("cpu"), 1, offload=False, bf16=True)
    x = torch.randn(5, 6)
    for model in (plain, sharded):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().sum().backward()
    assert [layer.kinds for layer in sharded.layers] == [{torch.float32, torch.bfloat16}] * 2
    assert sharded.last.kinds == {torch.float32}
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        gradient = full_tensor(ours.grad)
        assert gradient.dtype == ours.dtype == torch.float32
        assert torch.allclose(gradient, theirs.grad, rtol=0.05, atol=0.05 * float(theirs.grad.abs().max()))


def test_layers_are_computed_again_with_the_same_dropout(shared_world: World) -> None:
    recipe = replace(PICTURES, model=replace(DECODER, dropout=0.5))
    task = DecoderTask(recipe.model, EMBED_DIM)
    with closing(Feed(shared_world.store, shared_world.inputs, task, recipe).batches(0)) as shares:
        share = next(shares)
    gradients = []
    for again in (False, True):
        state = begin(task, recipe, ProcessGroup(), recomputing=again)
        torch.manual_seed(0)
        for parameter in state.model.parameters():  # layers that begin at zero would hide the others
            nn.init.normal_(parameter, std=0.05)
        backward(state.objective.train(), share, recipe, 3, ProcessGroup(), StepTimer({}, torch.device("cpu")))
        gradients.append({name: p.grad for name, p in state.model.named_parameters() if p.grad is not None})
    assert len(list(layers(state.model))) > 5
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert any(gradient.any() for gradient in plain.values())
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 0}, r"sharded: without workers"),
        ({"min_workers": 3, "sharded": False, "offload": False}, r"min_workers: 3 is above workers, 2"),
        ({"sharded": False}, r"offload: only sharded weights"),
    ],
)
def test_what_cannot_be_sharded_is_refused(shared_world: World, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"run\.diffusion_prior\.{said}"):
        stage.train(shared_world.context("diffusion_prior", PRIOR, replace(settings(2), **changes)))
