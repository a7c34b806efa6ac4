import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.neighbours import clusters as neighbours
from pipeline.data.neighbours.clusters import NONE, Clusters, Rows, compare, fit_clusters
from pipeline.data.neighbours.work import PROBES
from tests.pipeline.data.vectors import planted, unit


def exact(rows: Rows, duplicate: float | None, held_out: float | None) -> tuple[list[int], list[int]]:
    """What ``compare`` says if all pairs are looked at, one by one."""
    vectors = rows.vectors.astype(np.float64)
    found: tuple[list[int], list[int]] = ([], [])
    for i in range(len(rows.keys)):
        near = [
            float(vectors[i] @ vectors[j]) if (vectors[i] != vectors[j]).any() else 1.0 for j in range(len(vectors))
        ]
        for kind, bound in enumerate((duplicate, held_out)):
            others = []
            for j in range(len(rows.keys)):
                if kind == 0:
                    counts = j < i and rows.splits[j] == rows.splits[i] and rows.sizes[j] >= rows.sizes[i]
                else:
                    counts = rows.splits[i] == 0 and rows.splits[j] != 0
                if bound is not None and counts and near[j] >= bound:
                    others.append(int(rows.keys[j]))
            found[kind].append(min(others, default=NONE))
    return found


def in_one_cluster(vectors: np.ndarray, splits: np.ndarray, sizes: np.ndarray) -> Rows:
    n = len(vectors)
    keys = 10 + 3 * np.arange(n, dtype=np.int64)
    return Rows(
        keys, splits.astype(np.int8), sizes.astype(np.int8), vectors, np.zeros(n, np.int32), np.zeros((n, 1), np.int32)
    )


@settings(max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 0.9, None]),
    st.sampled_from([0.7, 0.95, None]),
    st.sampled_from([1, 7, 1 << 22]),
)
def test_one_cluster_is_exact(seed: int, duplicate: float | None, held_out: float | None, pairs: int) -> None:
    """However many pairs are held in memory at once."""
    g = np.random.default_rng(seed)
    n = int(g.integers(1, 40))
    if duplicate is None and held_out is None:
        duplicate = 1.0
    pool = unit(g.standard_normal((int(g.integers(1, 20)), 4)))  # of few dimensions and some equal: many are near
    rows = in_one_cluster(pool[g.integers(0, len(pool), n)], g.integers(0, 3, n), g.integers(0, 4, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "PAIRS", pairs)
        found = compare(rows, duplicate, held_out)
    assert tuple(column.tolist() for column in found) == exact(rows, duplicate, held_out)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_met_to_the_last_bit(seed: int) -> None:
    """With hundreds of dimensions fp32 sums are wrong by more than that, and by more or less among other rows."""
    vectors, [later], [earlier] = planted(40, 512, 1, seed, 0.9)
    cosine = float(vectors[later].astype(np.float64) @ vectors[earlier].astype(np.float64))
    rows = in_one_cluster(vectors, np.zeros(40), np.zeros(40))
    assert compare(rows, cosine, None)[0][later] == rows.keys[earlier]
    assert (compare(rows, float(np.nextafter(cosine, 2)), None)[0] == NONE).all()


def in_clusters(vectors: np.ndarray, clusters: Clusters) -> Rows:
    n = len(vectors)
    nearest = clusters.nearest(vectors, PROBES)
    zeros = np.zeros(n, np.int8)
    return Rows(np.arange(n, dtype=np.int64), zeros, zeros, vectors, nearest[:, 0], nearest)


@pytest.mark.parametrize("flat", [0, 4096])
def test_recall_and_precision_against_all_pairs(monkeypatch: pytest.MonkeyPatch, flat: int) -> None:
    """On evenly spread vectors, which have no clusters."""
    monkeypatch.setattr(neighbours, "FLAT_CLUSTERS", flat)
    vectors, *_ = planted(4000, 128, 500, 3, 0.96)
    rows = in_clusters(vectors, fit_clusters(vectors[:2000:2], 30))
    found = compare(rows, 0.96, None)[0]
    everything = vectors.astype(np.float64)
    true = np.full(len(vectors), NONE)
    for start in range(0, len(vectors), 1000):
        near = np.tril(everything[start : start + 1000] @ everything.T >= 0.96, start - 1)
        true[start : start + 1000] = np.where(near.any(1), near.argmax(1), NONE)
    assert (true != NONE).sum() >= 450
    assert (found[true == NONE] == NONE).all()
    assert (found != NONE).sum() >= 0.98 * (true != NONE).sum()
    assert (found[found != NONE] == true[found != NONE]).mean() > 0.98


def test_clusters_are_about_as_many_as_asked_for_and_of_like_sizes() -> None:
    vectors, *_ = planted(8000, 32, 1, 5, 0.9)
    clusters = fit_clusters(vectors, 50)
    assert 45 <= len(clusters.centres) <= 55
    np.testing.assert_allclose(np.linalg.norm(clusters.centres, axis=1), 1, rtol=1e-5)
    sizes = np.bincount(clusters.nearest(vectors, 1)[:, 0], minlength=len(clusters.centres))
    assert sizes.max() < 3 * sizes.mean()
    again = fit_clusters(vectors, 50)
    assert again.centres.tobytes() == clusters.centres.tobytes()


@pytest.mark.parametrize("sample", [0, 1, 3])
def test_samples_that_are_smaller_than_the_number_of_clusters(sample: int) -> None:
    vectors = unit(np.random.default_rng(2).standard_normal((20, 8)))
    clusters = fit_clusters(vectors[:sample], 10)
    assert 1 <= len(clusters.centres) <= max(sample, 1)
    assert set(clusters.nearest(vectors, 2)[:, 0]) <= set(range(len(clusters.centres)))
