"""What moving a pin changes, in lines that a person reads: two CLIPs or two codecs on the same held-out rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pipeline.errors import CorruptObject, UserError
from pipeline.evaluate.figure import short
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.stages import Graph, stage_key
from pipeline.held_out import FEWEST, SPLITS, too_few
from pipeline.store import Store

if TYPE_CHECKING:
    from models.codec import Codec
    from pipeline.release.drift import Embedded

ROWS = 1024  # at most, the first held-out ones


def drift_lines(
    store: Store, graph: Graph, keys: Mapping[str, str], stage: str, before: Artifact, after: Artifact
) -> Iterator[str]:
    """What differs between two artefacts of a pinned ``stage``, or why that cannot be told and what to do.

    ``keys``: of the plan as it stands, by stage.
    """
    if stage == "thresholds":
        bounds = (short(artifact.metrics["min_similarity"]) for artifact in (before, after))
        yield f"rows are rejected below a similarity of {' -> '.join(bounds)}"
        return
    tell: Callable[..., Iterator[str]] = {"clip": _of_clips, "codec": _of_codecs}[stage]
    try:
        yield from tell(store, graph, keys, before, after)
    except (UserError, CorruptObject) as e:  # no reason not to move a pin: what it leads to is made again
        yield f"the drift is not known: {e}"


def _of_clips(store: Store, graph: Graph, keys: Mapping[str, str], before: Artifact, after: Artifact) -> Iterator[str]:
    from pipeline.release.drift import clip_drift

    def embedded(clip: Artifact) -> tuple[str, Embedded]:
        key = stage_key(graph["embeddings"], {**keys, "clip": clip.key})
        return _held_out(store, keys, key, f"clip {clip.key[:12]}")

    (split, first), (_, second) = embedded(before), embedded(after)
    rows, drift = len(first.image), clip_drift(first, second)
    yield f"of {rows:,} {split} rows:"
    yield (
        f"  {drift.kept:.1f} of a picture's {drift.neighbours} nearest pictures stay the same "
        f"({drift.chance:.1f} by chance)"
    )
    yield f"  the median rank of a caption's own picture is {_both(drift.rank, 1)}, of {rows:,}"
    yield f"  the mean cosine of caption and picture is {_both(drift.similarity, 3)}"


def _of_codecs(store: Store, graph: Graph, keys: Mapping[str, str], before: Artifact, after: Artifact) -> Iterator[str]:
    from pipeline.release.drift import codec_drift

    split, rows = _held_out(store, keys, keys["embeddings"], "the plan's CLIP")
    codecs = [_open_codec(store, artifact) for artifact in (before, after)]
    width = rows.image.shape[1]
    for artifact, codec in zip((before, after), codecs, strict=True):
        if len(codec.mean) != width:
            raise UserError(
                f"codec {artifact.key[:12]} is one of embeddings of {len(codec.mean)} dimensions, and those of the "
                f"plan's CLIP have {width}"
            )
    try:
        drift = codec_drift(codecs[0], codecs[1], rows.image)
    except ValueError as e:
        raise UserError(str(e)) from None
    yield f"of {len(rows.image):,} {split} rows:"
    yield f"  codes a row {drift.codes[0]} -> {drift.codes[1]}, which hold {_both(drift.explained, 3)} of the variance"
    yield f"  the mean error of a component after coding is {_both(drift.error, 4)}"
    if drift.changed is None or drift.moved is None:
        yield f"  buckets {codecs[0].buckets:,} -> {codecs[1].buckets:,}: no code means what it meant"
    else:
        buckets = f"{drift.moved:.1f} of {codecs[0].buckets:,} buckets"
        yield f"  {drift.changed:.0%} of the codes change, by {buckets} on the mean"


def _both(values: tuple[float, float], places: int) -> str:
    return " -> ".join(f"{value:.{places}f}" for value in values)


def _held_out(store: Store, keys: Mapping[str, str], embeddings: str, whose: str) -> tuple[str, Embedded]:
    """The split and the embeddings of the first held-out rows of the plan's pairs, kept by curation or not: a new CLIP
    may have curated nothing yet.

    Raises UserError if they are not embedded, or fewer than FEWEST.
    """
    import numpy as np
    import torch

    from pipeline.release.drift import Embedded
    from pipeline.training.feed.tables import Tables

    made = {"pairs": load_artifact(store, "pairs", keys["pairs"])}
    made["embeddings"] = load_artifact(store, "embeddings", embeddings)
    inputs = {name: artifact for name, artifact in made.items() if artifact is not None}
    if len(inputs) < len(made):
        raise UserError(
            f"the pairs of now are not embedded with {whose}; unclip run with --until embeddings does that, with the "
            "values that made it or once it is pinned"
        )
    there: dict[str, int] = {}
    for split in SPLITS:
        tables = Tables(store, inputs, ("image_embedding", "text_embedding"), split, 0)
        there[split] = sum(tables.counts)
        if there[split] >= FEWEST:
            rows = tables.first(ROWS)
            columns = (
                torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
                for name in ("image_embedding", "text_embedding")
            )
            return split, Embedded(*columns)
    raise UserError(too_few(there[SPLITS[0]], SPLITS[0]))


def _open_codec(store: Store, artifact: Artifact) -> Codec:
    from models.folder import load_codec
    from pipeline.sampling.bundle import materialise

    with tempfile.TemporaryDirectory() as folder:
        materialise(store, artifact.blobs, folder)
        return load_codec(folder)
