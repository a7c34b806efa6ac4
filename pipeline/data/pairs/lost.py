"""Names rows that pairs or curation did not keep, and says what to do where their places are forbidden."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import yaml

from pipeline.data.fetch.opener import Guard
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.visit import host_of
from pipeline.data.source.lists import read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.tables import named_file
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table
from pipeline.ledger import DEFERRED, REASONS
from pipeline.pages import page
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.terminal import printable

FILE = "rejected.txt"  # beside the report
MOST_LISTED = 100_000  # rows of that file
LOOKED_AT = 10_000  # rows of a list before it is fetched
NAMED, NAME_CHARACTERS = 3, 200  # rows of each reason, and characters of one
SYSTEM = frozenset({"boot", "dev", "etc", "proc", "run", "sys"})  # folders without images: a list may be a stranger's
MOST_PLACES = 3  # hosts or folders in a line to paste
NEARLY_ALL = 0.9  # of the rows


class LostRow(NamedTuple):
    """A row that was rejected or deferred; its reference is as people may see it."""

    key: str
    status: str
    reason: str
    url: str


def lost_references(store: Store, pairs: Artifact, curation: Artifact | None = None) -> Iterator[LostRow]:
    """Yields the rows that pairs did not keep, or curation after it, in order. Some shards are read ahead."""
    later = {shard.number: shard for shard in read_shards(store, curation) if shard.lost} if curation else {}
    shards = (each for each in read_shards(store, pairs) if each.lost or each.number in later)
    for rows in ordered_map(lambda shard: _lost_of(store, shard, later.get(shard.number)), shards):
        yield from rows


def _lost_of(store: Store, shard: ShardRow, after: ShardRow | None) -> list[LostRow]:
    rejected = read_table(store, after.blobs["rejected"], ["key", "reason"]).to_pylist() if after else []
    reasons = {row["key"]: row["reason"] for row in rejected}
    rows = read_table(store, shard.blobs["index"], ["key", "status", "reason", "url"]).to_pylist()
    lost = (
        row if row["status"] != "kept" else row | {"status": "rejected", "reason": reasons.get(row["key"])}
        for row in rows
    )
    return [LostRow(row["key"], row["status"], row["reason"], shown(row["url"])) for row in lost if row["reason"]]


def lost_heading(pairs: Artifact, curation: Artifact | None = None) -> str:
    """Returns the first line of FILE: its columns, and of which artefacts it lists the lost rows."""
    made = ", ".join(f"{each.stage} {each.key[:12]}" for each in (pairs, curation) if each)
    return f"# reason\tstatus\tkey\treference\tof {made}\n"


def lost_text(store: Store, pairs: Artifact, curation: Artifact | None = None) -> str:
    """Returns the heading, and a line for each of the first MOST_LISTED lost rows, with tabs between columns."""
    rows = islice(lost_references(store, pairs, curation), MOST_LISTED)
    lines = (f"{row.reason}\t{row.status}\t{row.key}\t{' '.join(printable(row.url).split())}\n" for row in rows)
    return lost_heading(pairs, curation) + "".join(lines)


def lost_examples(store: Store, pairs: Artifact, curation: Artifact | None = None) -> Mapping[str, Sequence[str]]:
    """Returns references of lost rows by reason, as far as they are among the first LOOKED_AT."""
    found: dict[str, list[str]] = {reason: [] for reason in pairs.ledger.lost}
    for row in islice(lost_references(store, pairs, curation), LOOKED_AT):
        found.setdefault(row.reason, []).append(row.url or f"row {row.key}")
    return found


def lost_lines(store: Store, pairs: Artifact, curation: Artifact | None, config: str, file: str) -> Iterator[str]:
    """Yields the first lost rows of each reason, what to do about them, and the file that lists all."""
    lost = Counter(pairs.ledger.lost) + Counter(curation.ledger.lost if curation else {})
    if not lost:
        return
    for reason, urls in lost_examples(store, pairs, curation).items():
        more = lost[reason] - NAMED
        named = ", ".join(_short(url) for url in urls[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
        advice = place_advice(reason, urls)
        yield f"{reason}: {named}" + (f"; {advice}" if advice else "")
    if pairs.ledger.deferred:
        yield f"deferred rows are tried again by: unclip data retry {config} && unclip run {config}"
    yield f"all of them, with their reasons: {file}; what to do: {page('ledger')}"


def check_any_kept(store: Store, pairs: Artifact) -> None:
    """Raises UserError where pairs kept no row, with its most frequent reason and what to do."""
    ledger = pairs.ledger
    if ledger.kept or not ledger.lost:
        return
    reason, count = Counter(ledger.lost).most_common(1)[0]
    urls = lost_examples(store, pairs)[reason]
    such = f", such as {_short(urls[0])}" if urls else ""
    retried = "unclip data retry CONFIG has them tried again" if reason in DEFERRED else f"see {page('ledger')}"
    raise UserError(
        f"no pair is left: {count:,} of {ledger.rows:,} rows are {reason} ({REASONS[reason]}){such}; "
        f"{place_advice(reason, urls) or retried}"
    )


def place_advice(reason: str, urls: Iterable[str]) -> str:
    """Returns which setting lets rows be read that end with a reason, and its value; "" for other reasons."""
    if reason == "forbidden_address":
        return _advice("pairs", "allow", Counter(filter(None, map(host_of_reference, urls))).most_common(MOST_PLACES))
    if reason == "forbidden_reference":
        return _advice("source", "roots", _roots(urls).most_common(MOST_PLACES))
    return ""


def _advice(section: str, field: str, places: Sequence[tuple[str, int]]) -> str:
    if not places:
        return ""
    value = yaml.safe_dump([place for place, _ in places], default_flow_style=True, width=float("inf")).strip()
    return f"if they are yours, write {field}: {value} below {section}: in the configuration"


def _roots(urls: Iterable[str]) -> Counter[str]:
    """Returns the folders and buckets of references, each with the number of its references."""
    counts: Counter[str] = Counter()
    folders: dict[str, list[str]] = {}
    for url in urls:
        if url.startswith("s3://"):
            counts["s3://" + url.removeprefix("s3://").partition("/")[0]] += 1
        elif file := named_file(url):
            folder = os.path.dirname(os.path.realpath(file))  # where a link leads
            first = folder.split("/")[1]
            if first and first not in SYSTEM:
                folders.setdefault(first, []).append(folder)
    for first, of in folders.items():
        shared = os.path.commonpath(of)
        counts.update(of if shared == f"/{first}" else {shared: len(of)})  # no whole branch of a disk
    return counts


def host_of_reference(url: str) -> str:
    """Returns the host of an http(s) reference, "" for any other one."""
    try:
        return host_of(url) if url.startswith(("http://", "https://")) else ""
    except ValueError:
        return ""


def _short(url: str) -> str:
    return printable(url.removeprefix("file://"))[:NAME_CHARACTERS]


@dataclass(frozen=True)
class BlockedRows:
    """Holds which of a list's first rows no run reads, by where their images lie.

    Attributes:
        rows: Rows that were looked at.
        urls: References of the blocked rows, by reason.
    """

    rows: int
    urls: Mapping[str, Sequence[str]]

    @property
    def nearly_all(self) -> bool:
        """Returns whether (nearly) no row can be read."""
        return sum(map(len, self.urls.values())) >= NEARLY_ALL * max(1, self.rows)

    def lines(self) -> Iterator[str]:
        """Yields for each reason how many rows it blocks, and what to do."""
        for reason, urls in self.urls.items():
            yield (
                f"{len(urls):,} of the first {self.rows:,} rows are {reason}, such as {_short(shown(urls[0]))}; "
                f"{place_advice(reason, urls) or REASONS[reason]}"
            )


def blocked_rows(recipe: SourceRecipe, guard: Guard) -> BlockedRows:
    """Returns the blocked ones of the first rows of a list. Asks no server. Raises UserError as ``read_rows`` does."""
    rows, urls = 0, dict[str, list[str]]()
    for row in chain.from_iterable(islice(read_rows(path, recipe), LOOKED_AT) for path in recipe.paths):
        rows += 1
        if row.reject == "forbidden_reference":
            urls.setdefault(row.reject, []).append(row.url)
        elif not row.reject and guard.forbids(host_of_reference(row.url)):
            urls.setdefault("forbidden_address", []).append(row.url)
    return BlockedRows(rows, urls)
