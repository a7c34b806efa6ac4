"""The drift between two CLIPs and between two codecs: cases worked out by hand, and what must change nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.codec import Codec, fit_codec, fit_pca, moments
from pipeline.release.drift import Embedded, clip_drift, codec_drift, explained, neighbours_kept

N, D = 400, 12


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def on_circle(*degrees: float) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1)


IMAGE, TEXT = normal(N, D, seed=0), normal(N, D, seed=1)
TEXT = IMAGE + 0.5 * TEXT


# --- CLIPs


def test_neighbours_by_hand() -> None:
    """Two pairs of near rows, of which the second space parts one: the rows of the other keep their neighbour."""
    before = on_circle(0, 1, 90, 91)
    after = on_circle(0, 1, 90, 180)
    assert neighbours_kept(before, after, 1).tolist() == [1, 1, 0, 1]  # that of 90 is 1 now, that of 180 still 90
    assert neighbours_kept(before, before.flip(0), 1).tolist() == [1, 1, 1, 1]
    assert neighbours_kept(before, after, 3).tolist() == [1, 1, 1, 1]  # there are no others


def test_a_rotation_a_scale_and_more_dimensions_change_no_neighbour() -> None:
    other = torch.cat([3 * IMAGE @ rotation(D, 2), torch.zeros(N, 5, dtype=torch.float64)], 1)
    assert neighbours_kept(IMAGE, other, 10).tolist() == [1] * N
    turned = clip_drift(Embedded(IMAGE, TEXT), Embedded(other, torch.nn.functional.pad(TEXT @ rotation(D, 2), (0, 5))))
    assert turned.kept == turned.neighbours == 10
    assert turned.rank[0] == turned.rank[1]
    assert turned.similarity[0] == pytest.approx(turned.similarity[1])


def test_rows_in_another_order_have_chance_neighbours() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    drift = clip_drift(Embedded(IMAGE, TEXT), Embedded(IMAGE[order], TEXT[order]))
    assert drift.chance == pytest.approx(100 / (N - 1))
    assert drift.kept == pytest.approx(drift.chance, abs=0.08)  # 3 standard errors of 0.025
    assert drift.rank[0] == drift.rank[1]  # every caption is still with its picture


def test_the_more_noise_the_fewer_neighbours() -> None:
    kept = [
        clip_drift(Embedded(IMAGE, TEXT), Embedded(IMAGE + noise * normal(N, D, seed=4), TEXT)).kept
        for noise in (0.0, 0.1, 0.5, 5.0)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 10
    assert kept[-1] < 2


def test_rows_that_are_equal_count_in_their_order() -> None:
    assert neighbours_kept(IMAGE[:1].expand(5, D), torch.ones(5, 3), 2).tolist() == [1] * 5


def test_rank_and_similarity_by_hand() -> None:
    pictures = on_circle(0, 90, 180)
    drift = clip_drift(Embedded(pictures, on_circle(0, 90, 180)), Embedded(pictures, on_circle(90, 180, 0)))
    assert drift.rank == (1, 2.5)  # by angle to 0, 90 and 180: 90 is between two that are as far, 180 the last
    assert drift.similarity == (pytest.approx(1), pytest.approx(-1 / 3, abs=1e-6))
    assert drift.neighbours == 2


# --- codecs


def fitted(z: Tensor, k: int, buckets: int = 8) -> Codec:
    pca = fit_pca(*moments(z), k)
    return fit_codec(pca, (z - pca.mean) @ pca.components.T, z[:, 0], buckets)


def along(axis: int, edges: list[float], values: list[float]) -> Codec:
    """One component of two, with these inner edges and values of buckets."""
    component = torch.eye(2, dtype=torch.float64)[axis : axis + 1]
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (edges, values)]
    zero = torch.zeros(1, dtype=torch.float64)
    return Codec(torch.zeros(2, dtype=torch.float64), component, zero, *tensors, zero, zero.long())


CROSS = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])


def test_a_codec_by_hand() -> None:
    """Along x lie 8 of the squared length of 10, along y 2; each bucket stands for a value at which some rows lie."""
    first, second = along(0, [0.0], [-2.0, 2.0]), along(1, [0.0], [-1.0, 1.0])
    drift = codec_drift(first, second, CROSS)
    assert drift.explained == (pytest.approx(0.8), pytest.approx(0.2))
    # Rows at x = 0 are decoded as x = 2 (0 is not below the edge): errors (0, 0, 2+1, 2+1) and (2+1, 2+1, 0, 0), of 8.
    assert drift.error == (pytest.approx(6 / 8), pytest.approx(6 / 8))
    # Codes by x are 1 0 1 1, by y 1 1 1 0.
    assert drift.changed == 0.5
    assert drift.moved == 0.5
    assert drift.codes == (1, 1)
    assert codec_drift(first, first, CROSS)[3:] == (0, 0)


def test_how_far_codes_move() -> None:
    edges = [-1.5, -0.5, 0.5, 1.5]
    first, second = along(0, edges, [-2.0, -1, 0, 1, 2]), along(0, [1.0, 1.1, 1.2, 1.3], [-2.0, 1, 1, 1, 2])
    drift = codec_drift(first, second, CROSS)  # codes 4 0 2 2 and 4 0 0 0
    assert (drift.changed, drift.moved) == (0.5, 1.0)


def test_more_components_explain_more_and_all_of_them_all() -> None:
    z = IMAGE * torch.arange(1, D + 1)
    shares = [explained(fitted(z, k), z) for k in (1, 4, D)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    drift = codec_drift(fitted(z, 4), fitted(z, D, 8), z)
    assert drift.codes == (4, D)
    assert drift.changed == 0  # of the four that both have
    assert drift.error[1] < drift.error[0]


def test_a_sign_that_turned_changes_codes_and_no_picture() -> None:
    codec = fitted(IMAGE, 3)
    turned = replace(codec, components=-codec.components, edges=-codec.edges.flip(1), values=-codec.values.flip(1))
    drift = codec_drift(codec, turned, IMAGE)
    assert drift.changed == 1  # of 8 buckets none is its own mirror
    assert drift.explained[0] == pytest.approx(drift.explained[1])
    assert drift.error[0] == pytest.approx(drift.error[1])


def test_other_buckets_have_no_code_in_common() -> None:
    drift = codec_drift(fitted(IMAGE, 3, 8), fitted(IMAGE, 3, 16), IMAGE)
    assert drift.changed is None
    assert drift.moved is None
    assert drift.error[1] < drift.error[0]


def test_equal_rows_have_no_variance() -> None:
    with pytest.raises(ValueError, match="all 4 embeddings are equal"):
        explained(along(0, [0.0], [-1.0, 1.0]), torch.ones(4, 2))
