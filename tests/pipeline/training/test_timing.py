"""Where the time of a training goes, and what its rate is measured against."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import Losses
from models.random_streams import RandomStreams
from pipeline.training import stage
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.timing import PHASES, StepTimer, forward_flops, shares_of
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import MODEL


def test_a_step_is_cut_into_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr("pipeline.training.timing.time.perf_counter", lambda: next(clock))
    timer = StepTimer({"wait": 1.0}, torch.device("cpu"))
    timer.start(0)
    timer("wait")
    timer("forward")
    timer.start(1)
    timer("wait")
    assert timer.seconds == {"wait": 6.0, "forward": 2.0}


def test_on_a_gpu_the_first_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer, timed = StepTimer({}, torch.device("cuda")), []
    for step in range(15, 50):
        timer.start(step)
        timer("forward")
        timed += [step] * (timer.last is not None)
    assert timed == [30, 45]


def test_shares_add_up_to_the_whole_time() -> None:
    seconds = {"wait": 1.0, "forward": 3.0, "backward": 4.0, "pause": 5.0}
    shares = shares_of(seconds, 20.0)
    assert set(shares) == {*PHASES, "pause"}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert (shares["pause"], shares["forward"], shares["ema"]) == (0.25, pytest.approx(0.75 * 3 / 8), 0.0)
    assert shares_of({}, 0.0) == {}


class Attention(nn.Module):
    """A linear layer of 8 to 24 columns, and one head of attention over 5 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


def test_operations_are_those_on_paper() -> None:
    class Task:
        def loss(self, model: nn.Module, batch: dict[str, Tensor], rng: RandomStreams) -> Losses:
            return Losses(model(batch["image"]).sum((1, 2, 3)), {})

    task: Any = Task()
    flops = forward_flops(task, Attention(), {"image": torch.randn(3, 5, 8)}, RandomStreams([(0, 3)]))
    assert flops == 3 * (2 * 5 * 8 * 24 + 2 * 2 * 5 * 5 * 8)


def test_the_record_says_where_the_time_went(shared_world: World) -> None:
    recipe = DiffusionPriorRecipe(samples=48, batch=16, lanes=8, model=MODEL, seed=9)
    times = stage.train(shared_world.context("diffusion_prior", recipe)).times
    shares = {name: value for name, value in times.items() if name.startswith("share_")}
    assert set(shares) == {f"share_{phase}" for phase in (*PHASES, "pause")}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(value > 0 for value in shares.values())
    rate = times["samples_per_second"] * times["model_flops_per_sample"] / times["matmul_flops_per_second"]
    assert times["utilisation"] == pytest.approx(rate)
