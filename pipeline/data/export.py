"""Writes curated pairs and embeddings as other tools read them: img2dataset's and clip-retrieval's layouts, Parquet.

A data card, README.md, says what they are.

A folder or a prefix on S3 is written as a store is: an object appears whole, and none is written twice.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.card import CARD, CardCounts, data_card
from pipeline.data.curation.stage import CURATION
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.imported import imported_url
from pipeline.data.source.rows import read_captions
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table, write_table
from pipeline.local import on_web
from pipeline.progress import Progress
from pipeline.store import Store, local_folder
from pipeline.store.parallel import ordered_map
from pipeline.store.records import blob_path, read_blob

STAGES = (CURATION.name, *CURATION.inputs)
ABOUT = "export.json"
BATCH = 64  # images in memory at once, of each thread
THREADS = 4
SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}  # by the first two bytes; nothing else is stored
TYPES = {"width": pa.int32(), "height": pa.int32(), "captions": pa.list_(pa.string()), "similarity": pa.float32()}
Row = dict[str, Any]


@dataclass(frozen=True)
class ExportedShard:
    """One shard of an export: ``rows`` as they are written, and the shards of each stage that they come from."""

    number: int
    rows: Sequence[Row]
    places: Sequence[Place | None]
    shards: Mapping[str, ShardRow]


def export_pairs(
    store: Store,
    made: Mapping[str, Artifact],
    target: Store,
    kinds: Sequence[str] = (),
    splits: Sequence[str] = (),
    title: str = "Image-caption pairs",
    paths: Sequence[str] = (),
) -> dict[str, int]:
    """Writes the curated rows of ``splits`` in some KINDS, all of them by default.

    What an earlier call for the same rows has written is left as it is, so one that was interrupted goes on.

    Args:
        store: Holds the artefacts.
        made: Artefacts of STAGES, by stage.
        target: Store or folder to write to.
        kinds: Names among KINDS; empty for all.
        splits: Splits of the rows; empty for all.
        title: Title of the data card.
        paths: Lists of the source, which the card names.

    Returns:
        The number of rows by kind; "pairs" are those that have an image.

    Raises:
        UserError: where ``target`` holds other rows.
        CorruptObject: for a damaged object of ``store``.
    """
    about = {"curation": made["curation"].key, "splits": sorted(splits)}
    data = json.dumps(about, indent=2).encode()
    if not target.create(ABOUT, data) and target.read(ABOUT) != data:
        raise UserError(f"{target.url} holds an export of other rows (see {ABOUT}); name another folder")
    by_stage = {name: {shard.number: shard for shard in read_shards(store, made[name])} for name in STAGES}
    counts, tally = dict.fromkeys(kinds or KINDS, 0), CardCounts()

    def write(numbered: tuple[int, int]) -> ExportedShard:
        number, shard = numbered
        part = read_exported(store, number, {name: shards[shard] for name, shards in by_stage.items()}, splits)
        for kind in counts:
            KINDS[kind](store, target, part)
        return part

    with Progress("export", sum(shard.kept for shard in by_stage["curation"].values()), "rows") as progress:
        for part in ordered_map(write, enumerate(sorted(by_stage["curation"])), THREADS):
            for kind in counts:
                counts[kind] += sum(1 for place in part.places if place) if kind == "pairs" else len(part.rows)
            tally.add(part.rows)
            progress.advance(part.shards["curation"].kept)
    judged = {name: made[name] for name in reversed(STAGES)}
    target.create(CARD, data_card(title, paths, judged, tally).encode())
    return counts


def read_exported(store: Store, number: int, shards: Mapping[str, ShardRow], splits: Sequence[str]) -> ExportedShard:
    """Returns the curated rows of a shard that are of ``splits``, or of any if it is empty. Raises CorruptObject."""
    index = read_table(store, shards["curation"].blobs["index"]).to_pylist()
    index = [row for row in index if not splits or row["split"] in splits]
    captions = read_captions(store, shards["captions"])
    scored = read_table(store, shards["embeddings"].blobs["embeddings"], ["key", "similarity"]).to_pydict()
    similarity = dict(zip(scored["key"], scored["similarity"], strict=True))
    rows = [_row(row, captions[row["key"]], similarity[row["key"]]) for row in index]
    images = shards["pairs"].blobs.get("images")
    places = [Place.of(row, images) if row["size"] is not None else None for row in index]
    return ExportedShard(number, rows, places, shards)


def _row(row: Mapping[str, Any], captions: Sequence[str], similarity: float) -> Row:
    """Returns a row by img2dataset's names, and further ones of ours."""
    return {
        "url": _reference(row["url"]),
        "caption": captions[0],
        "key": row["key"],
        "status": "success",
        "error_message": None,
        "width": row["width"],
        "height": row["height"],
        "stored_sha256": row["sha256"],  # not of what its URL gives, which a list's "sha256" is
        "captions": captions,
        "split": row["split"],
        "similarity": similarity,
        "license": row["license"],
        "attribution": row["attribution"],
    }


def _reference(url: str) -> str:
    """Returns a reference of the web as it may be shown, and the name alone of a file of this machine.

    Of an imported embedding it is that of its image.
    """
    url = imported_url(url) or url
    return shown(url) if on_web(url) else url.rpartition("/")[2]


def write_webdataset(store: Store, target: Store, part: ExportedShard) -> None:
    """Writes NUMBER.tar with a KEY.jpg, .txt and .json a row, NUMBER.parquet, and NUMBER_stats.json last."""
    from webdataset.writer import TarWriter  # loads torch

    name, began = f"pairs/{part.number:05d}", time.time()
    pictured = [(row, place) for row, place in zip(part.rows, part.places, strict=True) if place is not None]
    if not pictured or target.stat(f"{name}_stats.json"):
        return
    with tempfile.NamedTemporaryFile() as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for start in range(0, len(pictured), BATCH):
                batch = pictured[start : start + BATCH]
                for (row, _), image in zip(batch, read_images(store, [place for _, place in batch]), strict=True):
                    texts = {"txt": row["caption"].encode(), "json": json.dumps(row, indent=4).encode()}
                    tar.write({"__key__": row["key"], SUFFIXES[image[:2]]: image, **texts})
        file.flush()
        target.create(f"{name}.tar", Path(file.name))
    target.create(f"{name}.parquet", write_table(_table([row for row, _ in pictured])))
    count, ended = len(pictured), time.time()
    stats: dict[str, Any] = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
    stats |= {"duration": ended - began, "start_time": began, "end_time": ended, "status_dict": {"success": count}}
    target.create(f"{name}_stats.json", json.dumps(stats, indent=4).encode())


def write_clip_retrieval(store: Store, target: Store, part: ExportedShard) -> None:
    """Writes img_emb and text_emb as float16 matrices, and their metadata last."""
    name, folder = f"{part.number:05d}", "clip-retrieval"
    if not part.rows or target.stat(f"{folder}/metadata/metadata_{name}.parquet"):
        return
    table = _embeddings(store, part)
    for kind, column in (("img_emb", "image_embedding"), ("text_emb", "text_embedding")):
        out = io.BytesIO()
        np.save(out, table[column].combine_chunks().flatten().to_numpy().reshape(len(table), -1))
        target.create(f"{folder}/{kind}/{kind}_{name}.npy", out.getvalue())
    metadata = _table(part.rows).add_column(0, "image_path", table["key"])
    target.create(f"{folder}/metadata/metadata_{name}.parquet", write_table(metadata))


def write_parquet(store: Store, target: Store, part: ExportedShard) -> None:
    """Writes the embeddings as they lie in the store: a hard link to them, where all rows of the shard stayed."""
    blob, path = part.shards["embeddings"].blobs["embeddings"], f"embeddings/{part.number:05d}.parquet"
    if not part.rows or target.stat(path):
        return
    table = _embeddings(store, part)
    if len(table) == part.shards["embeddings"].kept:
        link_blob(store, blob, target, path)
    else:
        target.create(path, write_table(table, dictionary=False))


KINDS: dict[str, Callable[[Store, Store, ExportedShard], None]] = {
    "pairs": write_webdataset,
    "clip-retrieval": write_clip_retrieval,
    "embeddings": write_parquet,
}


def link_blob(store: Store, blob: str, target: Store, path: str) -> None:
    """Creates an object of a blob: a hard link where both lie on one disk, else a copy. Raises CorruptObject."""
    data, folder = read_blob(store, blob), local_folder(store)
    target.create(path, folder / blob_path(blob) if folder else data, move=True)


def _embeddings(store: Store, part: ExportedShard) -> pa.Table:
    table = read_table(store, part.shards["embeddings"].blobs["embeddings"])
    return table.filter(pc.is_in(table["key"], pa.array([row["key"] for row in part.rows], pa.string())))


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], TYPES.get(name, pa.string())) for name in rows[0]})
