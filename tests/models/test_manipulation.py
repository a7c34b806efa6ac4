"""Latents: interpolation on the sphere, differences of captions, principal components."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.codec import Codec
from models.codec_fit import fit_codec
from models.manipulation import Inversion, first_components, slerp, text_difference


def _rows(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=50)
def test_slerp_turns_unit_vectors_by_its_share_of_the_angle(seed: int, share: float) -> None:
    a, b = (F.normalize(x, dim=1) for x in (_rows(3, 7, seed=seed), _rows(3, 7, seed=seed + 5000)))
    c = slerp(a, b, torch.full((3,), share))
    whole, part = ((a * x).sum(1).clamp(-1, 1).acos() for x in (b, c))
    torch.testing.assert_close(c.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(part, share * whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(c, slerp(b, a, torch.full((3,), 1 - share)))


def test_slerp_ends_at_both_and_keeps_dtype_and_shape() -> None:
    a, b = _rows(2, 3, 4, 4).float(), _rows(2, 3, 4, 4, seed=1).float()
    torch.testing.assert_close(slerp(a, b, torch.zeros(2)), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(2)), b)
    mixed = slerp(a, b, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(mixed, torch.stack([a[0], b[1]]))
    # Noise stays as loud as noise is, where a mean would be quieter.
    loud, half = _rows(1, 3, 64, 64), _rows(1, 3, 64, 64, seed=1)
    assert slerp(loud, half, torch.tensor([0.5])).std() == pytest.approx(1, abs=0.02)
    assert ((loud + half) / 2).std() < 0.75


def test_slerp_of_parallel_rows_is_straight() -> None:
    a = F.normalize(_rows(2, 5), dim=1)
    torch.testing.assert_close(slerp(a, 3 * a, torch.tensor([0.5, 0.25])), a * torch.tensor([[2.0], [1.5]]))


def test_text_difference_is_a_direction() -> None:
    before, after = _rows(3, 8), _rows(3, 8, seed=1)
    difference = text_difference(before, after)
    torch.testing.assert_close(difference.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(difference, -text_difference(after, before))
    with pytest.raises(ValueError, match="both captions have the same embedding"):
        text_difference(before, torch.cat([before[:1], after[1:]]))


def _codec() -> tuple[Codec, torch.Tensor]:
    z = F.normalize(_rows(200, 12) * torch.linspace(3, 0.3, 12) + 1, dim=1)
    return fit_codec(z, (z * z.flip(0)).sum(1), 12, 8).codec, z


def test_more_components_come_closer_and_all_are_exact() -> None:
    codec, z = _codec()
    cosine = [(first_components(codec, z, n).double() * z).sum(1).mean() for n in range(codec.codes + 1)]
    assert all(low < high for low, high in pairwise(cosine))
    torch.testing.assert_close(first_components(codec, z, codec.codes).double(), z, rtol=0, atol=1e-6)
    mean = F.normalize(codec.mean, dim=0).float()
    torch.testing.assert_close(first_components(codec, z, 0), mean.expand(200, -1))
    with pytest.raises(ValueError, match="cannot keep 13 principal components: this codec has 12"):
        first_components(codec, z, 13)


def test_one_image_serves_many_seeds() -> None:
    one = Inversion(_rows(1, 8), _rows(1, 3, 4, 4), torch.ones(1, 77, dtype=torch.int64))
    many = one.repeated(3)
    assert many.tokens is not None
    assert (len(many), many.noise.shape, many.tokens.shape) == (3, (3, 3, 4, 4), (3, 77))
    assert many.repeated(3) is many
    with pytest.raises(ValueError, match="got 3 images and 2 seeds"):
        many.repeated(2)
