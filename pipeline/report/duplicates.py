"""Shows images that curation found too alike: the largest groups of a few shards, each row that caused one first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from markupsafe import Markup

from pipeline.data.curation.rejected import Rejected
from pipeline.data.source.segments import shard_of
from pipeline.graph.artifacts import ShardRow
from pipeline.report.html import number, template
from pipeline.report.inputs import ReportInput
from pipeline.report.rows import SHARDS_READ, Thumbnail, read_pairs, thumbnail

NEAR = ("near_duplicate", "near_held_out")
GROUPS_SHOWN = 4
ROWS_SHOWN = 6  # of a group


def duplicates(given: ReportInput) -> Markup:
    """Shows the largest groups among the shards that lost most rows to curation; empty if nothing is too alike.

    Opens SHARDS_READ shards of curation, then one after another the shards that hold a row shown.
    """
    if not any(given.artifacts["curation"].ledger.rejected.get(reason) for reason in NEAR):
        return Markup()
    curated = given.shards("curation").values()
    worst = sorted((shard for shard in curated if shard.lost), key=lambda shard: -shard.lost)[:SHARDS_READ]
    groups = group(row for shard in worst for row in _too_near(given, shard))
    largest = sorted(groups, key=lambda first: -len(groups[first]))[:GROUPS_SHOWN]
    shown = {first: [first, *groups[first][: ROWS_SHOWN - 1]] for first in largest}
    cells = _cells(given, {key for keys in shown.values() for key in keys})
    parts = []
    for first, keys in shown.items():
        images = [cells[key] for key in keys if key in cells]
        if len(images) > 1:  # one alone shows nothing
            near = len(groups[first])
            said = f"Row {first} and {number(near)} that {'is' if near == 1 else 'are'} too near to it"
            part = "" if len(images) == near + 1 else f"; {len(images)} of them are shown"
            parts.append((f"{said}{part}.", images))
    found = f"Among the rows of {len(worst)} shards, those that lost most to curation: {number(len(groups))} groups."
    hidden = " None of the largest has two images that may be shown." if groups and not parts else ""
    return template("data.html").duplicates(parts, found + hidden)


def group(rows: Iterable[Rejected]) -> dict[str, list[str]]:
    """Groups the keys of rejected rows, in order, by the row at the beginning of their chain of near rows."""
    causes = {row.key: row.near for row in rows if row.near is not None}
    firsts = dict(causes)
    groups = defaultdict(list)
    for key in sorted(causes):
        passed: list[str] = []
        first = key
        while first in firsts and len(passed) <= len(firsts):  # a damaged table may run in a circle
            passed.append(first)
            first = firsts[first]
        firsts |= dict.fromkeys(passed, first)  # path compression: a long chain is walked once
        groups[first].append(key)
    return dict(groups)


def _too_near(given: ReportInput, shard: ShardRow) -> list[Rejected]:
    rows = (Rejected(**row) for row in given.table(shard.blobs["rejected"]).to_pylist())
    return [row for row in rows if row.reason in NEAR]


def _cells(given: ReportInput, keys: Collection[str]) -> dict[str, Thumbnail]:
    """Returns by key the images that may be shown, each with what became of its row. Holds one shard at a time."""
    shards = given.shards("pairs")
    wanted = sorted({shard_of(key) for key in keys} & shards.keys())
    cells = {}
    for shard in read_pairs(given, (shards[i] for i in wanted)):
        for row in shard.rows:
            key = row["key"]
            if key in keys and row["size"] and given.album.may_show(row["license"]):
                fate = Markup("<b>stays</b>") if key in shard.kept else shard.reasons.get(key, row["reason"])
                cells[key] = thumbnail(given, shard, row, fate)
    return cells
