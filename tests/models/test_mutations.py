"""The tool that tests the tests."""

import pytest
import torch

from models.diffusion import process, schedules
from models.diffusion.process import posterior_variance, q_sample
from models.diffusion.samplers import ddim
from models.diffusion.schedules import Schedule, make_schedule
from tests.models.mutations import fails_under, mutated

LEVEL = torch.tensor([0.25])


def noised() -> float:
    return q_sample(torch.ones(1, 1), torch.zeros(1, 1), LEVEL).item()


@pytest.mark.parametrize("target", [q_sample, process])
def test_a_fault_is_there_within_the_block_only_and_in_every_import(target: object) -> None:
    with mutated(
        target, "per_row(alpha_bar.sqrt(), x0) * x0 + per_row((1 -", "per_row(alpha_bar, x0) * x0 + per_row((1 -"
    ):
        assert noised() == 0.25
        assert process.q_sample is q_sample
    assert noised() == 0.5
    with pytest.raises(RuntimeError), mutated(q_sample, "alpha_bar.sqrt(), x0) *", "alpha_bar, x0) *"):
        raise RuntimeError("whatever a test may raise")
    assert noised() == 0.5


def test_methods_properties_and_decorated_functions_can_be_faulty() -> None:
    schedule = make_schedule("linear", 4)
    for target in (schedules, Schedule, Schedule.at):
        with mutated(target, "torch.where(t < 0, 1.0, values)", "values"):
            assert schedule.at(torch.tensor(-1)) < 1
    with mutated(Schedule, "len(self.alpha_bar)", "0"):
        assert schedule.steps == 0
    assert (schedule.at(torch.tensor(-1)), schedule.steps) == (1, 4)
    with mutated(ddim, "x = noise", "return None"):
        assert ddim(None, torch.ones(1), torch.tensor([0]), schedule) is None


@pytest.mark.parametrize(
    ("target", "old", "new", "message"),
    [
        (posterior_variance, "previous", "x", "'previous' occurs 4 times in posterior_variance"),
        (posterior_variance, "absent", "x", "'absent' occurs 0 times"),
        (posterior_variance, "(1 - previous)", "(1\n - previous)", "not as many lines"),
        (posterior_variance, "(1 - alpha_bar / previous)", "(1  -  alpha_bar / previous)", "changes no code"),
        (schedules, "NOISIEST = -3.0", "NOISIEST = -4.0", "changes no code of a function"),
    ],
)
def test_a_fault_that_is_none_is_refused(target: object, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")), mutated(target, old, new):
        pass


def test_a_test_that_notices_nothing_fails() -> None:
    fault = (q_sample, "x0 + per_row((1 - alpha_bar).sqrt(), x0) * noise", "x0")

    @fails_under(fault)
    def blind() -> None:
        assert noised() == 0.5

    with pytest.raises(pytest.fail.Exception, match="blind does not notice"):
        blind()
    assert noised() == 0.5
