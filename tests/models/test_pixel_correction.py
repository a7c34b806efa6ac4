import torch

from models.nn.pixel_correction import PixelCorrection


def test_it_crosses_the_borders_of_patches() -> None:
    torch.manual_seed(0)
    correction = PixelCorrection(3, 5, 6, 7)
    torch.nn.init.normal_(correction.conv_out.weight)
    seen, output, embedding = torch.randn(1, 3, 8, 8), torch.randn(1, 6, 8, 8), torch.randn(1, 7)
    changed = output.clone()
    changed[..., 4] += 1  # of the patch to the right
    moved = (correction(output, seen, embedding) != correction(changed, seen, embedding)).any(dim=(0, 1, 2))
    assert moved.tolist() == [False] + 7 * [True]
    assert not torch.equal(correction(output, -seen, embedding), correction(output, seen, embedding))


def test_the_timestep_modulates_what_is_between_the_convolutions_twice() -> None:
    for half in (slice(0, 10), slice(10, 20)):
        torch.manual_seed(0)
        correction = PixelCorrection(3, 5, 6, 7)
        torch.nn.init.normal_(correction.conv_out.weight)
        seen, output = torch.randn(1, 3, 8, 8), torch.randn(1, 6, 8, 8)
        first, second = (torch.randn(1, 7) for _ in range(2))
        assert torch.equal(correction(output, seen, first), correction(output, seen, second))
        torch.nn.init.normal_(correction.scale_shift.weight[half])
        assert not torch.allclose(correction(output, seen, first), correction(output, seen, second), atol=1e-3)
