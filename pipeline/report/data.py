"""Shows the data: how many rows are left and why, images, rejects, licences, similarities.

Reads the first few shards only, however many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipeline.config import RUN_FILE
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.lost import FILE
from pipeline.ledger import REASONS
from pipeline.progress import counted
from pipeline.report.charts import bars, histogram
from pipeline.report.duplicates import duplicates
from pipeline.report.html import PARTS, Section, attempt, note, number, template
from pipeline.report.inputs import ReportInput
from pipeline.report.rows import (
    LISTED,
    SHARDS_READ,
    PairsShard,
    lost_rows,
    read_first_shards,
    read_worst_shards,
    thumbnail,
)

THUMBNAILS = 24
REJECTS_SHOWN = 12
RIGHTS_SHOWN = 20
REASONS_SHOWN = 5
DATA = template("data.html")


def data_section(given: ReportInput) -> Markup:
    """Shows the rows from the list to the training set; empty before there is a list."""
    if given.artifacts.keys().isdisjoint(LISTED):
        return Markup()
    funnel = attempt("The number of rows by stage", _funnel, given)
    parts = [DATA.rows(funnel, attempt("The reasons of rejects", _reasons, given))]
    if "pairs" in given.artifacts:
        similar = (
            [attempt("The histogram of similarity", _similarity, given)] if "embeddings" in given.artifacts else []
        )
        parts.append(attempt("What the first shards hold", _first_shards, given, similar, otherwise=similar))
    near = "curation" in given.artifacts
    folds = [attempt("The near-duplicates", duplicates, given)] if near else []
    parts.append(DATA.more([*folds, attempt("The work of the stages", _work, given)]))
    return Section.of(DATA.data, "data", "Data", parts)


def _funnel(given: ReportInput) -> Markup:
    steps: list[tuple[str, float]] = []
    if "source" in given.artifacts:
        steps.append(("rows in the list", given.artifacts["source"].ledger.rows))
    kept = [stage for stage in LISTED if stage in given.artifacts]
    steps += [(stage, given.artifacts[stage].ledger.kept) for stage in kept]
    chart = bars("Rows that each stage keeps", steps)
    return PARTS.figure(chart, "Rows that each stage keeps, and their share of the first number.", "rows")


def _reasons(given: ReportInput) -> Markup:
    rows = [
        (lost.stage, lost.reason + ", deferred" * lost.deferred, REASONS.get(lost.reason, ""), lost.number, lost.share)
        for lost in lost_rows(given.artifacts)
    ]
    if not rows:
        return note("No row was rejected.")
    parts = [DATA.reasons(rows[:REASONS_SHOWN], rows[REASONS_SHOWN:])]
    pairs = given.artifacts.get("pairs")
    if given.folder and pairs and (given.folder / FILE).is_file():
        retried = f"; unclip data retry {given.folder / RUN_FILE} has the deferred ones tried again by the next run"
        said = f"{FILE} beside this page names each row that pairs or curation lost, with its reason"
        parts.append(note(f"{said}{retried if pairs.ledger.deferred else ''}."))
    return Markup().join(parts)


def _work(given: ReportInput) -> Markup:
    """Shows how the workers of each stage spent their time, where it was recorded."""
    rows = []
    for stage, artifact in given.artifacts.items():
        took = artifact.times
        if not took.get("busy_seconds"):
            continue
        seconds = took["made_seconds"]
        whole = seconds * took["workers"]
        known = ("busy", "wait", "made")  # not steps: busy is the whole time of tasks, made that of the passes
        steps = {n.removesuffix("_seconds"): v / whole for n, v in took.items() if n.endswith("_seconds")}
        busiest = sorted((n for n in steps if n not in known and steps[n] >= 0.005), key=lambda n: -steps[n])
        shares = ", ".join(f"{name} {steps[name]:.0%}" for name in busiest)
        rates = number(took["made_rows"] / seconds), number(took["written_bytes"] / seconds / 1e6)
        rows.append((stage, number(took["workers"]), *rates, f"{steps['busy']:.0%}", f"{steps['wait']:.0%}", shares))
    return DATA.work(rows) if rows else Markup()


def _first_shards(given: ReportInput, similar: Sequence[Markup]) -> Markup:
    shards = read_first_shards(given)
    title = "Kept pairs, after curation" if "curation" in given.artifacts else "Kept pairs"
    charts = [attempt("The sizes of images and captions", _sizes, shards), *similar]
    return Markup().join(
        (
            attempt("The images", kept_thumbnails, given, shards, title),
            PARTS.beside(charts),
            attempt("The rejected rows", some_rejects, given, read_worst_shards(given)),
            attempt("The licences", _rights, shards),
        )
    )


def kept_thumbnails(given: ReportInput, shards: Sequence[PairsShard], title: str, most: int = THUMBNAILS) -> Markup:
    """Shows images of kept rows with their captions, ``most`` at most."""
    cells = []
    for i, shard in enumerate(shards):
        # Equal shares as far as whole numbers go, ``most`` in all.
        share = most * (i + 1) // len(shards) - most * i // len(shards)
        shown = [row for row in shard.kept_rows if row["size"] and given.album.may_show(row["license"])]
        cells += [thumbnail(given, shard, row) for row in spread(shown, share)]
    if not cells:
        return note(
            "No pair was kept, or none with an image."
            if given.album.licenses is None
            else "No pair's licence lets it be shown here."
        )
    return DATA.thumbnails(title, cells)


def _sizes(shards: Sequence[PairsShard]) -> Markup:
    """Draws the short sides of kept images, and the lengths of their captions, where there are any."""
    kept = [(shard, row) for shard in shards for row in shard.kept_rows]
    sides = [min(row["width"], row["height"]) for _, row in kept if row["width"]]
    lengths = [len(shard.captions[row["key"]]) for shard, row in kept if row["key"] in shard.captions]
    charts = Markup()
    for what, unit, values in (
        ("Short sides of images", "px", sides),
        ("Lengths of captions", "characters", lengths),
    ):
        if values:
            said = f"{what}: {counted(len(values), 'kept row')} of {counted(len(shards), 'shard')}; the median is"
            chart = histogram(what, unit, values)
            said += f" {number(sorted(values)[len(values) // 2])} {unit}."
            charts += PARTS.figure(chart, said, "sides" if unit == "px" else "lengths")
    return charts


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """Returns at most ``count`` rows, evenly spaced: neighbours in a list are often alike."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def some_rejects(given: ReportInput, shards: Sequence[PairsShard]) -> Markup:
    """Shows rejected rows, one of each reason first: images where they are stored, else their references."""
    found, seen = [], Counter[str]()
    for shard in shards:
        for row in shard.rows:
            if row["key"] not in shard.kept:
                reason = row["reason"] or shard.reasons[row["key"]]
                found.append((seen[reason], reason, shard, row))
                seen[reason] += 1
    if not found:
        return Markup()
    references, cells = [], []
    for _, reason, shard, row in sorted(found, key=lambda reject: reject[0])[:REJECTS_SHOWN]:
        if row["size"] and given.album.may_show(row["license"]):
            cells.append(thumbnail(given, shard, row, reason))
        else:
            references.append((reason, shown(row["url"])))
    return DATA.rejects(cells, references)


def _rights(shards: Sequence[PairsShard]) -> Markup:
    kept = [row for shard in shards for row in shard.kept_rows]
    if not kept:
        return Markup()
    counts = Counter((row["license"] or "not named", row["attribution"] or "not named") for row in kept)
    where = f"{counted(len(kept), 'row')} in {counted(len(shards), 'shard')}"
    return DATA.rights(where, counts.most_common(RIGHTS_SHOWN), len(counts) - RIGHTS_SHOWN)


def _similarity(given: ReportInput) -> Markup:
    shards = [shard for shard in given.shards("embeddings").values() if shard.kept][:SHARDS_READ]
    values: list[float] = []
    for shard in shards:
        values += given.table(shard.blobs["embeddings"], ["similarity"])["similarity"].to_pylist()
    chart = histogram("Similarity of image and caption", "cosine of image and text embedding", values)
    median = sorted(values)[len(values) // 2]
    said = f"{counted(len(values), 'row')} of the first {counted(len(shards), 'shard')}; the median is {median:.3f}."
    return DATA.similarity(chart, said)
