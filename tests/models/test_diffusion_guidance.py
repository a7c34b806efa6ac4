from typing import Any

import torch
from torch import Tensor

from models.diffusion.guidance import guidance_rows, guided_output


def test_the_second_half_of_a_guided_pass_has_no_condition() -> None:
    assert guidance_rows(2, 0.0, torch.device("cpu")).tolist() == [True, True]
    assert guidance_rows(2, 1.5, torch.device("cpu")).tolist() == [True, True, False, False]


def test_guidance_is_one_plus_w_times_the_conditional_minus_w_times_the_unconditional() -> None:
    g = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 4, 4, generator=g), torch.tensor([3, 5])
    conditional, empty = torch.randn(2, 2, 6, 4, 4, generator=g).unbind()
    for weight in (0.0, 0.25, 3.0):
        passes: list[Any] = []

        def network(x: Tensor, times: Tensor, passes: list[tuple[Tensor, Tensor]] = passes) -> Tensor:
            passes.append((x, times))
            return torch.cat([conditional, empty])[: len(x)]

        output = guided_output(network, x_t, t, weight)
        torch.testing.assert_close(output[:, :3], (1 + weight) * conditional[:, :3] - weight * empty[:, :3])
        assert torch.equal(output[:, 3:], conditional[:, 3:])
        [(xs, times)] = passes
        assert all(torch.equal(part, x_t) for part in xs.split(2))
        assert all(torch.equal(part, t) for part in times.split(2))
