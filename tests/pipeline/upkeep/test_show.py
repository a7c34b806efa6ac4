"""What ``unclip show`` prints."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.graph.leases import Holder
from pipeline.graph.records import PlannedStage
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move
from pipeline.upkeep.overview import Lineage, Overview, PastRun
from pipeline.upkeep.show import show_lineage, show_overview

NOW = 1_750_000_000.0  # 2025-06-15 15:06:40 UTC
ANA = {"user": "ana", "host": "gpu-7"}


def asked(*stages: str) -> dict[str, PlannedStage]:
    """A chain of stages, each made from the one before."""
    return {
        stage: PlannedStage(stage * 8, 1, {}, {i: i * 8 for i in stages[max(0, n - 1) : n]})
        for n, stage in reversed(list(enumerate(stages)))
    }


STAGES = asked("source", "clip", "codec")
RUN = PastRun("birds", NOW - 600, {**ANA, "command": "unclip run birds.yaml"}, STAGES, STAGES.keys())
LEASE = Holder(
    "nonce", "clip", 60, **ANA, boot="", pid=42, started="", since=NOW - 300, at=NOW - 4, progress="8 of 64 samples"
)
FOUND = Overview(
    "s3://b/p",
    [RUN, replace(RUN, at=NOW - 10_000), replace(RUN, project="other", at=NOW - 20_000)],
    9,
    frozenset({("source", "source" * 8)}),
    {"clip" * 8: LEASE},
    frozenset({"source" * 8}),
    {"birds": Move("promote", "b" * 64, "e", NOW - 86_400)},
)


def test_runs_and_what_is_under_way() -> None:
    lines = show_overview(FOUND, NOW).splitlines()
    assert lines[0] == "store s3://b/p"
    start = lines.index("running now")
    assert lines[start + 1] == (
        "  clip clipclipclip by ana@gpu-7, pid 42, since 2025-06-15 15:01 UTC (5 min 00 s), heard of 4 s ago"
    )
    assert lines[start + 2] == "    8 of 64 samples"
    start = lines.index("last runs (and 6 before)")
    assert lines[start + 1 : start + 4] == [
        "  2025-06-15 14:56 UTC  birds  1 of 3 stages made by now  ana@gpu-7  unclip run birds.yaml",
        "  2025-06-15 12:20 UTC  birds  1 of 3 stages made by now  ana@gpu-7  unclip run birds.yaml",
        "  2025-06-15 09:33 UTC  other  1 of 3 stages made by now  ana@gpu-7  unclip run birds.yaml",
    ]
    start = lines.index("birds")
    assert lines[start + 1 : start + 6] == [
        "  made        source sourcesource",
        "  being made  clip clipclipclip",
        "  not made    codec codeccodecco",
        "  pinned      source sourcesource",
        "  release     bbbbbbbbbbbb since 2025-06-14 15:06 UTC (24 h 00 min ago)",
    ]
    assert "other" in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"made": frozenset((stage, stage * 8) for stage in STAGES)},
            "  made        source sourcesource, clip clipclipclip, codec codeccodecco",
        ),
        ({"leases": {"k": replace(LEASE, at=NOW - 61)}}, ", not heard of for 1 min 01 s: probably ended"),
        ({"releases": {"birds": "releases/birds.json is corrupt"}}, "  release     releases/birds.json is corrupt"),
        ({"runs": [], "leases": {}}, "running now: nothing\n\nno runs yet"),
    ],
)
def test_what_else_there_may_be(change: dict[str, Any], line: str) -> None:
    assert f"{line}\n" in show_overview(replace(FOUND, **change), NOW) + "\n"


def made(stage: str, days: float, *inputs: str, **fields: object) -> Artifact:
    times = {"finished": NOW - days * 86_400, "seconds": 200.0}
    values = {"inputs": {i: i * 8 for i in inputs}, "recipe": {}, "ledger": Ledger(), "times": times}
    values |= {"version": 7, **fields}
    return Artifact(stage, stage * 8, **values)


SOURCE, PAIRS, CLIP = made("source", 30), made("pairs", 20, "source"), made("clip", 10, "pairs", "source")
DECODER = made(
    "decoder",
    0.5,
    "pairs",
    "clip",
    "codec",
    recipe={"samples": 64, "batch": 8, "model.dropout": 0.1},
    ledger=Ledger(1000, {"http_4xx": 2, "timeout": 30}, {"too_small": 1}),
    environment={"device": "cuda", "precision": "bf16", "workers": "8", "python": "3.11.4", "machine": "x86_64"},
    by=ANA,
)
BEHIND = {(a.stage, a.key): a for a in (SOURCE, PAIRS, CLIP)} | {("codec", "codec" * 8): None}
FOUND_DECODER = Lineage(DECODER, BEHIND, {}, False, [])


def test_an_artefact_on_one_screen() -> None:
    shown = show_lineage(FOUND_DECODER, {"samples": 64, "batch": 8, "model.dropout": 0.0}, NOW)
    assert shown.splitlines() == [
        f"decoder {'decoder' * 8}, version 7",
        "  made        2025-06-15 03:06 UTC (12 h 00 min ago), in 3 min 20 s",
        "  where       ana@gpu-7, cuda, bf16, 8 workers, python 3.11.4",
        "  rows        1,000 kept, 32 rejected (30 timeout, 2 http_4xx), 1 deferred (1 too_small)",
        "  recipe      model.dropout 0.1",
        "",
        "made from",
        "  clip clipclipclip  10 days ago",
        "    pairs pairspairspa  20 days ago",
        "      source sourcesource  30 days ago",
        "  codec codeccodecco  no longer there",
    ]


def test_an_input_that_comes_twice_is_told_once() -> None:
    bundle = made("bundle", 0.1, "decoder", "prior")
    behind = {(a.stage, a.key): a for a in (DECODER, made("prior", 1, "clip"))} | BEHIND
    lines = show_lineage(Lineage(bundle, behind, {}, False, []), {}, NOW).splitlines()
    assert lines.count("    clip clipclipclip  10 days ago") == 1
    assert lines.count("    clip clipclipclip  see above") == 1
    assert sum("pairs" in line for line in lines) == 1


def test_the_nearest_users_pins_and_releases() -> None:
    users = {(a.stage, a.key): a for a in (PAIRS, CLIP)}
    shown = show_lineage(Lineage(SOURCE, {}, users, True, ["birds"]), {}, NOW)
    assert shown.splitlines() == [
        f"source {'source' * 8}, version 7",
        "  made        2025-05-16 15:06 UTC (30 days ago), in 3 min 20 s",
        "  recipe      as the defaults are",
        "  kept by     release of birds, pin",
        "",
        "  used by     pairs pairspairspa (20 days ago)",
    ]
