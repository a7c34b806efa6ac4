"""Pictures that curation found too alike: the largest groups of a few shards, the row that caused each first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from pipeline.data.curation.rejected import Rejected
from pipeline.graph.shard_tables import ShardRow, read_table
from pipeline.report.markup import attempt, figure, note, number, text
from pipeline.report.pictures import Album
from pipeline.report.rows import SHARDS_READ, Artifacts, numbered, read_pairs, thumbnail
from pipeline.store import Store

NEAR = ("near_duplicate", "near_held_out")
GROUPS_SHOWN = 4
ROWS_SHOWN = 6  # of a group
LOOK = (
    "Look for groups whose pictures a caption would tell apart: there <code>curation.near_duplicate</code> or "
    "<code>curation.near_held_out</code> is too low for this CLIP."
)


def duplicates(store: Store, artifacts: Artifacts, album: Album) -> str:
    """The largest groups among the shards that lost most rows to curation; "" if it found nothing too alike.

    Opens SHARDS_READ shards of curation, then one after another those that hold a row shown.
    """
    if not any(artifacts["curation"].ledger.rejected.get(reason) for reason in NEAR):
        return ""
    curated = numbered(store, artifacts, "curation").values()
    worst = sorted((shard for shard in curated if shard.lost), key=lambda shard: -shard.lost)[:SHARDS_READ]
    groups = group(row for shard in worst for row in _too_near(store, shard))
    largest = sorted(groups, key=lambda first: -len(groups[first]))[:GROUPS_SHOWN]
    shown = {first: [first, *groups[first][: ROWS_SHOWN - 1]] for first in largest}
    cells = _cells(store, artifacts, {key for keys in shown.values() for key in keys}, album)
    parts = []
    for first, keys in shown.items():
        pictures = [cells[key] for key in keys if key in cells]
        if len(pictures) > 1:  # one alone shows nothing
            near = len(groups[first])
            said = f"Row {first} and {number(near)} that {'is' if near == 1 else 'are'} too near to it"
            part = "" if len(pictures) == near + 1 else f"; {len(pictures)} of them are shown"
            parts.append(
                f'<p class="quiet">{text(said + part)}.</p>\n<div class="thumbs">\n{"".join(pictures)}</div>\n'
            )
    found = f"Among the rows of {len(worst)} shards, those that lost most to curation: {number(len(groups))} groups."
    hidden = " None of the largest has two pictures that may be shown." if groups and not parts else ""
    return f"<h3>Too alike</h3>\n<p>{LOOK}</p>\n{''.join(parts)}{note(found + hidden)}"


def group(rows: Iterable[Rejected]) -> dict[str, list[str]]:
    """Keys of rejected rows in order, by the key of the row that they are too near to: the first one of a chain."""
    causes = {row.key: row.near for row in rows if row.near is not None}
    firsts = dict(causes)
    groups = defaultdict(list)
    for key in sorted(causes):
        passed: list[str] = []
        first = key
        while first in firsts and len(passed) <= len(firsts):  # a damaged table may run in a circle
            passed.append(first)
            first = firsts[first]
        firsts |= dict.fromkeys(passed, first)  # so that a long chain is walked once
        groups[first].append(key)
    return dict(groups)


def _too_near(store: Store, shard: ShardRow) -> list[Rejected]:
    rows = (Rejected(**row) for row in read_table(store, shard.blobs["rejected"]).to_pylist())
    return [row for row in rows if row.reason in NEAR]


def _cells(store: Store, artifacts: Artifacts, keys: Collection[str], album: Album) -> dict[str, str]:
    """By key the pictures that may be shown, each with what became of its row. Holds one shard at a time."""
    shards = numbered(store, artifacts, "pairs")
    wanted = sorted({int(key[:-4]) for key in keys} & shards.keys())  # see pipeline.data.source.stage.row_key
    cells = {}
    for shard in read_pairs(store, artifacts, (shards[i] for i in wanted)):
        for row in shard.rows:
            key = row["key"]
            if key in keys and row["size"] and album.may_show(row["license"]):
                fate = "<b>stays</b>" if key in shard.kept else text(shard.reasons.get(key, row["reason"]))
                picture = attempt(f"Row {key}", thumbnail, store, shard, row, album)
                cells[key] = figure(picture, f"{fate} <bdi>{text(shard.captions.get(key, ''), 90)}</bdi>")
    return cells
