from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.build import build
from pipeline.config import make_config
from pipeline.data.curation import thresholds
from pipeline.data.curation.thresholds import BINS, ThresholdsRecipe, count_by_bin, lowest, run_thresholds
from pipeline.graph.artifacts import read_shards, read_table
from pipeline.graph.stages import Stage
from pipeline.store import open_store
from tests.pipeline.data.vectors import Listed, context, curate, planted, publish, rejected

ROWS = 300
PLAIN = {"near_duplicate": None, "near_held_out": None}


def listed() -> tuple[Listed, np.ndarray]:
    """Rows, every fifth held out, and the similarities that are published with them."""
    vectors, *_ = planted(ROWS, 8, 1, 0, 0.5)
    splits = ["test" if i % 5 == 3 else "train" for i in range(ROWS)]
    return Listed(vectors, splits, [64] * ROWS), np.random.default_rng(0).uniform(-0.2, 0.5, ROWS).astype(np.float32)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60), st.floats(0, 0.99))
def test_at_most_the_share_is_below_and_no_higher_edge_would_do(values: list[float], share: float) -> None:
    similarities = np.array(values)
    bound = lowest(count_by_bin(similarities), share)
    assert (similarities < bound).sum() <= share * len(values)
    above = bound + 2 / BINS
    assert bound >= 1 - 2 / BINS or (similarities < above).sum() > share * len(values)


def test_nan_and_inf_do_not_count() -> None:
    assert count_by_bin(np.array([np.nan, 0.5, np.inf])).sum() == 1
    assert lowest(count_by_bin(np.array([])), 0.5) == -1


def test_the_threshold_is_that_of_the_training_rows_and_curation_rejects_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thresholds, "BLOCK_ROWS", 60)
    store = open_store(str(tmp_path))
    rows, similarity = listed()
    training = np.array([split == "train" for split in rows.splits])
    inputs = publish(store, rows, similarity)
    stage = Stage("thresholds", 1, ThresholdsRecipe(0.25), ("pairs", "embeddings"), run_thresholds)
    made = run_thresholds(context(store, stage, inputs))
    bound = made.metrics["min_similarity"]
    assert made.ledger.kept == training.sum()
    assert bound == pytest.approx(np.quantile(similarity[training], 0.25, method="higher"), abs=1e-2)
    assert (similarity[training] < bound).sum() == 60

    curated = curate(store, inputs | {"thresholds": made}, **PLAIN)
    lost = {row.key for row in rejected(store, curated)}
    assert lost == {key for key, value in zip(rows.row_keys, similarity, strict=True) if value < bound}
    assert curated.ledger.rejected == {"low_similarity": len(lost)}
    strict = curate(store, inputs | {"thresholds": made}, **PLAIN, min_similarity=0.3)
    assert strict.ledger.rejected == {"low_similarity": int((similarity < 0.3).sum())}
    left = [read_table(store, s.blobs["index"]).num_rows for s in read_shards(store, strict)]
    assert sum(left) == strict.ledger.kept


def test_thresholds_are_made_only_if_asked_for() -> None:
    values = {"project": "p", "store": "s", "source": {"paths": ["list.csv"]}, "samples": {"captions": ["a"]}}
    assert "thresholds" not in build(make_config(values))
    graph = build(make_config(values | {"thresholds": {"similarity": 0.1}}))
    assert graph["thresholds"].pinned
    assert "thresholds" in graph["curation"].inputs
