"""When two evaluations may be compared, what is significant then, and which gates fail."""

import json
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.ledger import Ledger
from pipeline.release.compare import EvaluatedBundle, changes, find_comparable, obstacles
from pipeline.release.gates import failing, unjudged
from pipeline.settings import ReleaseGates

N = 40
DEFAULT = ReleaseGates()
ROWS = {"decoder": {"split": "test", "keys": [f"{i:012d}" for i in range(N)], "captions": "c" * 64}}


def figure(
    model: str, name: str, values: Any = None, better: str = "above", holds: bool | None = True, groups: int = N
) -> dict[str, Any]:
    """Returns a figure with these values of rows, of which as many are alike as there are fewer ``groups``."""
    values = None if values is None else [float(v) for v in values]
    return {
        "model": model, "name": name, "better": better, "holds": holds, "values": values, "note": "", "claim": "draws",
        "groups": [i * groups // N for i in range(N)],
    }  # fmt: skip


def absent(model: str, why: str) -> dict[str, Any]:
    return {**figure(model, "found", holds=None), "note": why}


def evaluation(*figures: dict[str, Any], clip: str = "clip", **changed: Any) -> EvaluatedBundle:
    document = {"version": 4, "recipe": {"rows": N, "seed": 0}, "rows": ROWS, "figures": list(figures)}
    bundle = Artifact("bundle", "b", {"clip": clip}, {}, Ledger())
    made = Artifact("evaluation", "e", {"bundle": "b"}, {}, Ledger())
    return EvaluatedBundle(made, bundle, json.loads(json.dumps(document | changed)))


def draws(seed: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, N)


def gate(old: EvaluatedBundle, new: EvaluatedBundle, gates: ReleaseGates = DEFAULT) -> list[str]:
    return failing(gates, old.figures, new.figures, changes(old, new))


def unknown(old: EvaluatedBundle, new: EvaluatedBundle, gates: ReleaseGates = DEFAULT) -> list[str]:
    return unjudged(gates, old.figures, new.figures, changes(old, new))


# --- may they be compared? --------------------------------------------------------------------------------------------


def test_equal_measurements_are_comparable() -> None:
    assert obstacles(evaluation(), evaluation()) == []


@pytest.mark.parametrize(
    ("old", "says"),
    [
        ({"version": 3}, "version 3 -> 4 of the evaluation"),
        ({"recipe": {"rows": 8, "seed": 0}}, "evaluation.rows 8 -> 40"),
        ({"recipe": {"rows": N, "seed": 1}}, "evaluation.seed 1 -> 0"),
        ({"clip": "other"}, "another CLIP"),
        (
            {"rows": {"decoder": ROWS["decoder"] | {"keys": ["x", *ROWS["decoder"]["keys"][1:]]}}},
            "rows of decoder: 40 -> 40, 39 of them shared",
        ),
        ({"rows": {"decoder": ROWS["decoder"] | {"captions": "d" * 64}}}, "rows of decoder: 40 -> 40, with other"),
        ({"rows": {"decoder": ROWS["decoder"] | {"split": "validation"}}}, "rows of decoder"),
    ],
)  # fmt: skip
def test_another_measurement_is_named(old: dict[str, Any], says: str) -> None:
    (why,) = obstacles(evaluation(**old), evaluation())
    assert why.startswith(says)


def test_rows_of_a_model_that_only_one_bundle_has_do_not_matter() -> None:
    more: dict[str, Any] = ROWS | {"upsampler_256": {"split": None, "keys": []}}
    assert obstacles(evaluation(rows=more), evaluation()) == []


def test_of_several_evaluations_the_first_comparable_one_is_taken() -> None:
    others = [evaluation(version=3), evaluation(figure("decoder", "a")), evaluation()]
    assert find_comparable(others, evaluation()) is others[1]
    assert find_comparable(others[:1], evaluation()) is None


# --- what is significant ----------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean_difference_over_rows() -> None:
    """Rows differ by far more than the two bundles do, so only paired rows can tell them apart."""
    base = draws(0, spread=10.0)
    old, new = evaluation(figure("decoder", "x", base)), evaluation(figure("decoder", "x", base + draws(1, 0.5, 0.5)))
    (change,) = changes(old, new)
    gained = np.array(new.document["figures"][0]["values"]) - np.array(old.document["figures"][0]["values"])
    assert change.difference == pytest.approx(gained.mean())
    assert (change.then, change.now) == (pytest.approx(base.mean()), pytest.approx(base.mean() + gained.mean()))
    means = np.random.default_rng(7).choice(gained, (20_000, N)).mean(1)  # another bootstrap, of other draws
    assert change.interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.03)
    assert change.verdict == "better"
    (back,) = changes(new, old)
    assert back.verdict == "worse"
    assert back.difference == pytest.approx(-change.difference)


@pytest.mark.parametrize(
    ("better", "shift", "verdict"),
    [
        ("above", 1.0, "better"), ("above", -1.0, "worse"), ("below", 1.0, "worse"), ("below", -1.0, "better"),
        ("above", 0.0, ""),
    ],
)  # fmt: skip
def test_a_verdict_follows_the_direction_in_which_the_figure_is_better(better: str, shift: float, verdict: str) -> None:
    base, noise = draws(0), draws(2, 0, 0.1) - draws(2, 0, 0.1).mean()
    old, new = (evaluation(figure("m", "x", v, better)) for v in (base, base + noise + shift))
    (change,) = changes(old, new)
    assert change.verdict == verdict
    assert bool(gate(old, new)) == (verdict == "worse")


def test_equal_bundles_fail_a_gate_about_as_often_as_a_95_percent_interval_says() -> None:
    failed = 0
    for seed in range(200):
        old, new = (evaluation(figure("m", "x", draws(2 * seed + i))) for i in (0, 1))
        failed += len(gate(old, new))
    assert 0 <= failed <= 14  # 2.5% of 200 is 5; binomial, and the bootstrap of 40 rows is a little narrow


def test_rows_of_one_group_count_as_one() -> None:
    """Equal bundles, whose rows are alike in groups of eight: one by one they would differ in half of the cases."""
    worse = 0
    for seed in range(200):
        values = [np.random.default_rng(2 * seed + i).normal(size=10).repeat(4) for i in (0, 1)]
        old, new = (evaluation(figure("m", "x", v, groups=10)) for v in values)
        worse += bool(gate(old, new))
    assert worse <= 20  # the bootstrap of 10 groups is a little narrow


def test_what_cannot_be_compared_row_by_row_is_left_out() -> None:
    values = list(draws(0))
    old = [figure("m", name, values) for name in ("short", "gone", "unknown", "both")]
    new = [
        figure("m", "short", values[:-1]),
        figure("m", "unknown"),
        *(figure("m", n, values) for n in ("new", "both")),
    ]
    assert [c.name for c in changes(evaluation(*old), evaluation(*new))] == ["both"]


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "line"),
    [
        (True, True, None), (False, False, None), (None, False, None), (False, True, None),
        (True, False, "m.x held for the release and fails now"),
        (True, None, "m.x held for the release and is not measured now"),
    ],
)  # fmt: skip
def test_what_held_must_hold(then: bool | None, now: bool | None, line: str | None) -> None:
    old, new = (evaluation(figure("m", "x", holds=holds), figure("m", "y")) for holds in (then, now))
    assert gate(old, new) == ([line] if line else [])
    assert gate(old, new, ReleaseGates(claims=False)) == []
    assert gate(old, new, ReleaseGates(ignore=("m.x",))) == []


def test_a_model_that_the_new_bundle_lacks_fails_what_it_held() -> None:
    old = evaluation(figure("ar_prior", "cosine_text"), figure("decoder", "top"))
    assert gate(old, evaluation(figure("decoder", "top"))) == [
        "ar_prior.cosine_text held for the release and is not measured now"
    ]


def test_a_bundle_of_which_nothing_is_measured_passes_no_gate() -> None:
    few = [absent("ar_prior", "1 test pair"), absent("decoder", "1 test pair")]
    assert gate(evaluation(*few), evaluation(*few)) == ["no gate can be judged. Nothing was measured: 1 test pair"]
    assert unknown(evaluation(*few), evaluation(*few)) == ["ar_prior.found, decoder.found: 1 test pair"]
    no_gates = ReleaseGates(claims=False, figures=False)
    assert gate(evaluation(*few), evaluation(*few), no_gates) == []
    assert unknown(evaluation(*few), evaluation(*few), no_gates) == []


def test_what_no_gate_can_judge_is_named_with_why() -> None:
    values, large = draws(0), absent("upsampler_1024", "2 test pairs of 1024 px")
    old = [figure("decoder", "x", values), figure("decoder", "failed", values, holds=False), large]
    assert unknown(evaluation(*old), evaluation(*old)) == ["upsampler_1024.found: 2 test pairs of 1024 px"]
    new = [figure("decoder", "x", values), figure("prior", "y", values), large]
    assert gate(evaluation(*old), evaluation(*new)) == []
    assert unknown(evaluation(*old), evaluation(*new)) == [
        "decoder.failed: measured for the release only",
        "upsampler_1024.found: 2 test pairs of 1024 px",
        "prior.y: measured for this bundle only",
    ]
    ignored = ReleaseGates(ignore=("decoder.failed", "prior.y", "upsampler_1024.found"))
    assert unknown(evaluation(*old), evaluation(*new), ignored) == []
    # What a gate fails is said by the gate.
    assert unknown(evaluation(figure("m", "x", values)), evaluation(figure("n", "y", values))) == [
        "n.y: measured for this bundle only"
    ]


def test_rows_that_cannot_be_compared_one_by_one_are_named() -> None:
    odd = figure("m", "x", draws(0))
    odd["values"][3] = None  # not finite
    old = new = evaluation(odd, figure("m", "whole"))
    assert unknown(old, new) == ["m.x: not compared row by row, as a value is not finite"]
    assert unknown(old, new, ReleaseGates(figures=False)) == []


def test_a_tolerance_is_a_share_of_the_releases_figure() -> None:
    base = draws(0, mean=10.0)
    old, new = evaluation(figure("m", "x", base)), evaluation(figure("m", "x", base - 0.3 + draws(1, 0, 0.1)))
    assert len(gate(old, new)) == 1
    assert "m.x is worse: " in gate(old, new)[0]
    assert gate(old, new, ReleaseGates(tolerance=0.05)) == []
    assert len(gate(old, new, ReleaseGates(tolerance=0.01))) == 1
    assert gate(old, new, ReleaseGates(figures=False)) == []


def test_mistakes_in_the_gates() -> None:
    with pytest.raises(UserError, match=r"release\.ignore: no figure is called m\.y; known are m\.x"):
        gate(evaluation(figure("m", "x")), evaluation(), ReleaseGates(ignore=("m.y",)))
