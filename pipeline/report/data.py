"""What the report shows of the data: how many rows are left and why, pictures, rejects, licences, similarities.

Reads the first few shards only, however many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.data.fetch.references import shown
from pipeline.graph.artifacts import Artifact
from pipeline.graph.shard_tables import read_shards, read_table
from pipeline.ledger import REASONS
from pipeline.report.duplicates import duplicates
from pipeline.report.figures import bars, histogram
from pipeline.report.markup import attempt, beside, figure, note, number, section, table, text
from pipeline.report.pictures import Album
from pipeline.report.rows import SHARDS_READ, Artifacts, PairsShard, read_first_shards, read_worst_shards, thumbnail
from pipeline.store import Store

THUMBNAILS = 24
REJECTS_SHOWN = 12
RIGHTS_SHOWN = 20
LOOK_AT_DATA = (
    "Look for a stage that loses more rows than you expect, for captions that do not fit their pictures, and for one "
    "reason that explains most of the rejects."
)
LOOK_AT_EMBEDDINGS = (
    "Look for one hump well above zero: a second one near zero or below is captions that do not belong to their "
    "pictures, and <code>curation.min_similarity</code> is where to cut them off."
)


def data_section(store: Store, artifacts: Artifacts, album: Album) -> str:
    """The way of rows from the list to the training set; "" before there is a list."""
    if not {"source", "pairs", "curation"} & artifacts.keys():
        return ""
    parts = [
        attempt("The number of rows by stage", _funnel, artifacts),
        attempt("The reasons of rejects", _reasons, artifacts),
    ]
    if "pairs" in artifacts:
        parts.append(attempt("What the first shards hold", _first_shards, store, artifacts, album))
    if {"pairs", "curation"} <= artifacts.keys():
        parts.append(attempt("The near-duplicates", duplicates, store, artifacts, album))
    parts.append(attempt("The work of the stages", _work, artifacts))
    return section("data", "Data", LOOK_AT_DATA, *parts)


def embeddings_section(store: Store, artifacts: Artifacts) -> str:
    """How well captions fit their pictures, by CLIP; "" before there are embeddings."""
    if "embeddings" not in artifacts:
        return ""
    chart = attempt("The histogram of similarity", _similarity, store, artifacts["embeddings"])
    return section("embeddings", "Embeddings", LOOK_AT_EMBEDDINGS, chart)


def _funnel(artifacts: Artifacts) -> str:
    steps: list[tuple[str, float]] = []
    if "source" in artifacts:
        steps.append(("rows in the list", artifacts["source"].ledger.rows))
    steps += [(stage, artifacts[stage].ledger.kept) for stage in ("source", "pairs", "curation") if stage in artifacts]
    chart = bars("Rows that each stage keeps", steps)
    return figure(chart, "Rows that each stage keeps, and their share of the first number.")


def _reasons(artifacts: Artifacts) -> str:
    rows, before = [], Counter[str]()
    for stage in ("source", "pairs", "clip", "curation"):
        if stage not in artifacts:
            continue
        ledger = artifacts[stage].ledger
        for kind, counts in (("", ledger.rejected), (", deferred", ledger.deferred)):
            own = Counter(counts) - before  # pairs counts the rows again that the source rejected
            for reason, count in own.most_common():
                said = f'{text(reason)}{kind}<br><span class="quiet">{text(REASONS.get(reason, ""))}</span>'
                rows.append((stage, said, number(count), f"{count / max(ledger.rows, 1):.1%}"))
        if stage == "source":
            before = Counter(ledger.rejected)
    if not rows:
        return note("No row was rejected.")
    return "<h3>Rejected, by reason</h3>\n" + table(("stage", "reason", "rows", "of its rows"), rows, numeric=(2, 3))


def _work(artifacts: Artifacts) -> str:
    """What the workers of each stage did with their time, where this was written down."""
    rows = []
    for stage, artifact in artifacts.items():
        took = artifact.times
        if not took.get("busy_seconds"):
            continue
        seconds = took["made_seconds"]
        whole = seconds * took["workers"]
        known = ("busy", "wait", "made")
        steps = {n.removesuffix("_seconds"): v / whole for n, v in took.items() if n.endswith("_seconds")}
        busiest = sorted((n for n in steps if n not in known and steps[n] >= 0.005), key=lambda n: -steps[n])
        shares = ", ".join(f"{text(name)} {steps[name]:.0%}" for name in busiest)
        rates = number(took["made_rows"] / seconds), number(took["written_bytes"] / seconds / 1e6)
        rows.append((stage, number(took["workers"]), *rates, f"{steps['busy']:.0%}", f"{steps['wait']:.0%}", shares))
    head = ("stage", "workers", "rows/s", "MB/s written", "busy", "waiting", "steps")
    said = (
        "Shares are of the time of all workers, from first to last shard of each pass of a stage; what is neither busy "
        "nor waiting is their start. Embeddings decode beside the encoder, and wait for views where that is slower."
    )
    return f"<h3>Workers</h3>\n{table(head, rows, numeric=(1, 2, 3, 4, 5))}{note(said)}" if rows else ""


def _first_shards(store: Store, artifacts: Artifacts, album: Album) -> str:
    shards = read_first_shards(store, artifacts)
    title = "Kept pairs, after curation" if "curation" in artifacts else "Kept pairs"
    return (
        attempt("The pictures", _thumbnails, store, shards, title, album)
        + attempt("The sizes of pictures and captions", _sizes, shards)
        + attempt("The rejected rows", _rejects, store, read_worst_shards(store, artifacts), album)
        + attempt("The licences", _rights, shards)
    )


def _thumbnails(store: Store, shards: Sequence[PairsShard], title: str, album: Album) -> str:
    cells = []
    for i, shard in enumerate(shards):
        share = THUMBNAILS * (i + 1) // len(shards) - THUMBNAILS * i // len(shards)
        shown = [row for row in shard.kept_rows if row["size"] and album.may_show(row["license"])]
        for row in spread(shown, share):
            picture = attempt(f"Row {row['key']}", thumbnail, store, shard, row, album)
            cells.append(figure(picture, f"<bdi>{text(shard.captions.get(row['key'], ''), 90)}</bdi>"))
    if not cells:
        return note(
            "No pair was kept, or none with a picture."
            if album.licenses is None
            else "No pair's licence lets it be shown here."
        )
    return f'<h3>{title}</h3>\n<div class="thumbs">\n{"".join(cells)}</div>\n'


def _sizes(shards: Sequence[PairsShard]) -> str:
    """Histograms of the short sides of kept pictures, and of the lengths of their captions, where there are any."""
    kept = [(shard, row) for shard in shards for row in shard.kept_rows]
    sides = [min(row["width"], row["height"]) for _, row in kept if row["width"]]
    lengths = [len(shard.captions[row["key"]]) for shard, row in kept if row["key"] in shard.captions]
    charts = []
    for what, unit, values in (
        ("Short sides of pictures", "px", sides),
        ("Lengths of captions", "characters", lengths),
    ):
        if values:
            said = f"{what}: {number(len(values))} kept rows of {len(shards)} shards; the median is"
            chart = histogram(what, unit, values)
            charts.append(figure(chart, f"{said} {number(sorted(values)[len(values) // 2])} {unit}."))
    return beside(charts[0], "".join(charts[1:])) if charts else ""


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` rows, evenly spaced: neighbours in a list are often alike."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _rejects(store: Store, shards: Sequence[PairsShard], album: Album) -> str:
    """Rejected rows, one of each reason first: with their pictures where those are stored, else by their references."""
    found, seen = [], Counter[str]()
    for shard in shards:
        for row in shard.rows:
            if row["key"] not in shard.kept:
                reason = row["reason"] or shard.reasons[row["key"]]
                found.append((seen[reason], reason, shard, row))
                seen[reason] += 1
    found = sorted(found, key=lambda reject: reject[0])[:REJECTS_SHOWN]
    rows, cells = [], []
    for _, reason, shard, row in found:
        if row["size"] and album.may_show(row["license"]):
            picture = attempt(f"Row {row['key']}", thumbnail, store, shard, row, album)
            said = f"{text(reason)} <bdi>{text(shard.captions.get(row['key'], ''), 90)}</bdi>"
            cells.append(figure(picture, said))
        else:
            rows.append((text(reason), f"<bdi>{text(shown(row['url']), 120)}</bdi>"))
    pictures = f'<div class="thumbs">\n{"".join(cells)}</div>\n' if cells else ""
    references = table(("reason", "image reference"), rows) if rows else ""
    return f"<h3>Some rejected rows</h3>\n{pictures}{references}" if found else ""


def _rights(shards: Sequence[PairsShard]) -> str:
    kept = [row for shard in shards for row in shard.kept_rows]
    counts = Counter((row["license"] or "not named", row["attribution"] or "not named") for row in kept)
    shown = counts.most_common(RIGHTS_SHOWN)
    rows = [(text(name), f"<bdi>{text(credit, 400)}</bdi>", number(count)) for (name, credit), count in shown]
    more = note(f"{len(counts) - RIGHTS_SHOWN} more are left out.") if len(counts) > RIGHTS_SHOWN else ""
    title = f"<h3>Licences of these pictures ({number(len(kept))} rows of {len(shards)} shards)</h3>\n"
    return title + table(("licence", "attribution", "rows"), rows, numeric=(2,)) + more if rows else ""


def _similarity(store: Store, artifact: Artifact) -> str:
    shards = [shard for shard in read_shards(store, artifact) if shard.kept][:SHARDS_READ]
    values: list[float] = []
    for shard in shards:
        values += read_table(store, shard.blobs["embeddings"], ["similarity"])["similarity"].to_pylist()
    chart = histogram("Similarity of image and caption", "cosine of image and text embedding", values)
    median = sorted(values)[len(values) // 2]
    return figure(chart, f"{number(len(values))} rows of the first {len(shards)} shards; the median is {median:.3f}.")
