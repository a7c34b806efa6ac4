from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from models.codec import Codec, digitize
from models.codec_fit import fit_codec
from models.random_streams import RandomStreams
from tests.models.small_models import rows


def make_codec(z: Tensor, k: int, buckets: int = 64) -> Codec:
    dots = (z.double() * z.flip(0).double()).sum(-1)
    return fit_codec(z, dots, k, buckets).codec


def test_digitize_equals_numpy_also_on_edges_and_outside() -> None:
    generator = torch.Generator().manual_seed(1)
    edges = torch.randn(3, 31, generator=generator, dtype=torch.float64).sort(-1).values
    edges[1, 4:9] = edges[1, 4]
    x = torch.cat([torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2, edges.T, torch.full((1, 3), 99)])
    ours = digitize(x, edges)
    for column in range(3):
        assert np.array_equal(ours[:, column], np.digitize(x[:, column], edges[column]))
    assert ours.min() == 0
    assert ours.max() == 31


def test_round_trip() -> None:
    z = rows()
    codec = make_codec(z, k=24)
    lost = z.double() - codec.mean - codec.project(z) @ codec.components
    assert lost.square().sum(-1).max() < 1e-20  # all components: PCA alone is exact
    error = (z - codec.decode(codec.encode(z))).double().square().sum(-1).mean()
    assert 0 < error < 0.01 * codec.variance.sum()
    finer = make_codec(z, k=24, buckets=128)
    assert (z - finer.decode(finer.encode(z))).double().square().sum(-1).mean() < error / 2


def test_codes_do_not_depend_on_the_batch_or_on_autocast() -> None:
    z = rows()
    codec = make_codec(z, k=24, buckets=1024)
    codes = codec.encode(z)
    assert torch.equal(codes, torch.cat([codec.encode(row[None]) for row in z]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(z), codes)
        assert codec.decode(codes).dtype == torch.float32


def test_unseen_values_clamp() -> None:
    codec = make_codec(rows(), k=5)
    far = codec.mean + 100 * codec.components[:1]
    assert codec.encode(far)[0, 0] == 63
    assert codec.encode(codec.mean - 100 * codec.components[:1])[0, 0] == 0
    assert codec.encode_dot(torch.tensor([-1e9, 1e9])).tolist() == [0, 63]


def test_a_dot_product_falls_into_the_bucket_that_numpy_counts_in_fp64_also_on_edges() -> None:
    codec = make_codec(rows(), k=5, buckets=8)
    s = torch.linspace(-0.5, 0.5, 7)
    for shift in (0.0, 1e-12, -1e-12):  # in fp32 all three are one number
        edges = s.double() + shift
        assert replace(codec, dot_edges=edges).encode_dot(s).tolist() == np.digitize(s.double(), edges).tolist()


def test_upper_dots_are_compared_in_fp64_and_the_median_belongs_to_the_upper_half() -> None:
    codec = make_codec(rows(), k=5, buckets=8)
    total = 2**40

    def drawn(uniform: float, edge: float) -> int:
        """The bucket, of two with an edge between them, that a uniform number leads to."""
        below = round(edge * total)
        two = replace(codec, dot_counts=torch.tensor([below, total - below]))
        with mock.patch.object(RandomStreams, "uniform", return_value=torch.tensor([uniform])):
            return int(two.sample_upper_dot(RandomStreams([(0, 1)])))

    assert drawn(0.0, 0.5) == 1
    uniform = float(torch.tensor(0.1))
    exact = 0.5 + 0.5 * uniform
    assert float(torch.tensor(exact)) > exact + 1e-8  # what fp32 would make of the number, and of an edge beside it
    assert drawn(uniform, exact + 1e-9) == 0
    assert drawn(uniform, exact - 1e-9) == 1


def test_a_codec_moves_whole_and_knows_its_sizes() -> None:
    codec = make_codec(rows(), k=5)
    assert (codec.codes, codec.buckets) == (5, 64)
    assert {tensor.device.type for tensor in codec.to("meta").tensors().values()} == {"meta"}
    assert {name: id(tensor) for name, tensor in vars(codec).items()} == {n: id(x) for n, x in codec.tensors().items()}


def test_upper_dots_have_the_distribution_of_the_upper_half() -> None:
    codec = make_codec(rows(), k=5, buckets=8)
    drawn = codec.sample_upper_dot(RandomStreams([(0, 40_000)]))
    upper = torch.bincount(drawn, minlength=8).double() / 40_000
    cdf = codec.dot_counts.cumsum(0).double() / codec.dot_counts.sum()
    expected = torch.cat([torch.zeros(1), 2 * (cdf - 0.5).clamp(min=0)]).diff()
    torch.testing.assert_close(upper, expected, rtol=0, atol=0.01)
