"""A training whose layers are compiled is the same training, on any kind of workers."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.training import compiling, stage
from pipeline.training.compiling import compile_layers, compiles
from pipeline.training.distributed.process_group import HUNG_S, LONG_S, ProcessGroup
from pipeline.training.timing import Speed
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import (
    MODEL,
    PRIOR_RECIPE,
    SETTINGS,
    assert_equal_trainings,
    made,
    train_together,
)

COMPILED = replace(SETTINGS, compile=True, micro_batch=3)  # the last of a share has another number of rows
CUDA = ProcessGroup(device=torch.device("cuda"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """The graphs that the compiler is given. They run as they are: what a compiler makes of them is its own affair."""
    given: list[fx.GraphModule] = []

    def note(graph: fx.GraphModule, _: Any) -> Any:
        given.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", note)
    yield given
    torch._dynamo.reset()


def test_it_goes_on_from_a_checkpoint_that_was_not_compiled_and_leaves_one_to_it(
    world: World, straight: tuple[World, Artifact], graphs: list[fx.GraphModule]
) -> None:
    stage.train(world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=16), SETTINGS))
    assert not graphs
    stage.train(world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=32), COMPILED))
    assert len(graphs) == MODEL.depth * 2  # of three rows and of one
    artifact = stage.train(world.context("diffusion_prior", PRIOR_RECIPE, SETTINGS))
    assert len(graphs) == MODEL.depth * 2
    assert_equal_trainings((world, artifact), straight)


def test_workers_wait_long_for_each_other_in_the_step_that_compiles(
    world: World, graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may have to compile what another has in its cache. That step is none by which the length of steps is told."""
    told = []

    def wait_at_most(group: ProcessGroup, seconds: float, _: nn.Module) -> None:
        told.append((seconds, len(graphs), group.pulse.steps))

    monkeypatch.setattr(ProcessGroup, "wait_at_most", wait_at_most)
    stage.train(world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=32), COMPILED))
    assert told == [(LONG_S, 0, 0), (HUNG_S, MODEL.depth * 2, 0)]


@pytest.mark.integration  # with a compiler, which takes half a minute
def test_a_restarted_attempt_finds_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder that docs/cluster.md names, without the memory of a process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        model = nn.Sequential(nn.ModuleList([nn.Linear(8, 8)]))
        compile_layers(model)
        model[0][0](torch.ones(3, 8)).sum().backward()
        found.append({kind: counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("miss", "hit")})
    torch._dynamo.reset()
    first, again = found
    assert first["miss"] > 0
    assert again == {"miss": 0, "hit": first["miss"]}


def by_aot_autograd(rank: int) -> None:
    """Compiles as on a GPU, up to the making of kernels."""
    compiling.BACKEND = "aot_eager"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"sharded": True, "recompute": True}, {"recompute": True}])
def test_so_do_two_workers(kind: Any, world: World, straight: tuple[World, Artifact], tmp_path: Path) -> None:
    ctx = world.context("diffusion_prior", PRIOR_RECIPE, replace(COMPILED, workers=2, **kind))
    train_together(ctx, tmp_path, by_aot_autograd)
    assert_equal_trainings((world, made(world, ctx)), straight)


@pytest.mark.parametrize(
    ("wanted", "group", "seconds", "expected"),
    [
        ("auto", CUDA, 3600, True),
        ("auto", CUDA, 60, False),
        ("auto", ProcessGroup(), 3600, False),
        (True, ProcessGroup(), 0, True),
        (False, CUDA, 3600, False),
    ],
)
def test_long_trainings_on_gpus_are_compiled(wanted: Any, group: ProcessGroup, seconds: int, expected: bool) -> None:
    speed = Speed(model_flops=compiling.UTILISATION, matmul_flops=1)  # a second a sample
    assert compiles("decoder", wanted, speed, seconds, group) == expected


def test_without_a_c_compiler_only_who_asks_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiles("decoder", "auto", Speed(1, 1), 10000, CUDA)
    with pytest.raises(UserError, match=r"^run\.decoder\.compile: gcc, which .* install it, or set it to false$"):
        compiles("decoder", True, Speed(1, 1), 0, CUDA)
