"""Pictures: fetched, checked, resized, and packed into webdataset tars with an index, one source shard at a time.

img2dataset supplies the fetch, the key scheme and the resize. The tar is byte-reproducible: members in order of key,
time and owner fixed. Captions stay apart, so that new captions never fetch a picture again.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from pipeline.artifacts import NOTE, Artifact, ShardRow, read_shard, read_shards, read_table, write_table
from pipeline.data.index import index_counts, index_table
from pipeline.data.source import row_key
from pipeline.graph import Context, shard_key
from pipeline.ledger import Ledger
from pipeline.settings import PairsSettings
from pipeline.shards import ShardOutput, ShardTask, map_shards
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.data.fetch import Fetcher
    from pipeline.data.opener import Evidence

VERSION = 2
OPT_OUTS = f"{NOTE}opt_outs"


@dataclass(frozen=True)
class PairsRecipe:
    """How pictures are stored. ``image_size``: a larger picture is shrunk until its short side is this; a smaller one
    stays. Budgets are per picture, in bytes as fetched and in pixels as the header says."""

    image_size: int = 1024
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = 95
    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        if self.image_size < 64:
            raise ValueError(f"image_size: {self.image_size} is below 64, the smallest picture a model learns from")
        limit = 9 if self.encode_format == "png" else 100
        if not 0 <= self.encode_quality <= limit:
            raise ValueError(f"encode_quality: {self.encode_quality} is outside 0..{limit} for {self.encode_format}")


@dataclass(frozen=True)
class MakePacker:
    """Makes one packer for each worker process."""

    store: Store
    recipe: PairsRecipe
    settings: PairsSettings

    def __call__(self) -> Packer:
        return Packer(self.store, self.recipe, self.settings)


class Packer:
    """Makes the tar and the index of one shard."""

    def __init__(self, store: Store, recipe: PairsRecipe, settings: PairsSettings):
        self.store, self.recipe, self.settings = store, recipe, settings

    @cached_property
    def fetcher(self) -> Fetcher:
        """Opened at the first shard, where a UserError of this machine's environment is still one line."""
        from pipeline.data.fetch import Fetcher

        return Fetcher(self.settings, self.recipe.max_bytes)

    def __call__(self, task: ShardTask) -> ShardOutput:
        refs = read_table(self.store, task.inputs["source"].blobs["refs"]).to_pylist()
        rows = [
            {"key": row_key(task.number, i), "status": "kept"}
            | {k: ref[k] for k in ("url", "split", "license", "attribution")}
            for i, ref in enumerate(refs)
        ]
        in_place = [i for i, ref in enumerate(refs) if not ref["reject"] and ref["url"].startswith("tar://")]
        fetched = [i for i, ref in enumerate(refs) if not ref["reject"] and not ref["url"].startswith("tar://")]
        for row, ref in zip(rows, refs, strict=True):
            if ref["reject"]:
                _reject(row, ref["reject"])
        for i in in_place:
            self._use_in_place(rows[i], refs[i])
        opted_out: list[tuple[dict[str, Any], Evidence]] = []
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            answers = self.fetcher.fetch([refs[i]["url"] for i in fetched])
            for i, answer in zip(fetched, answers, strict=True):
                if answer.data is None:
                    _reject(rows[i], answer.reason)
                    if answer.evidence is not None:
                        opted_out.append((rows[i], answer.evidence))
                else:
                    self._pack(tar, rows[i], refs[i], answer.data)
        blobs = {"index": write_table(index_table(rows))}
        if fetched:
            blobs["images"] = out.getvalue()
        if opted_out:
            blobs[OPT_OUTS] = _opt_out_table(opted_out)
        ledger = Ledger.count(None if row["status"] == "kept" else row["reason"] for row in rows)
        return ShardOutput(ledger, blobs, index_counts(rows))

    def _pack(self, tar: tarfile.TarFile, row: dict[str, Any], ref: Mapping[str, Any], data: bytes) -> None:
        from pipeline.data.fetch import resize

        if ref["sha256"] and hashlib.sha256(data).hexdigest() != ref["sha256"].lower():
            return _reject(row, "hash_mismatch")
        r = self.recipe
        picture = resize(data, r.image_size, r.max_pixels, r.encode_format, r.encode_quality)
        if isinstance(picture, str):
            return _reject(row, picture)
        member = tarfile.TarInfo(f"{row['key']}.{picture.extension}")
        member.size = len(picture.data)
        assert isinstance(tar.fileobj, io.BytesIO)
        row["offset"] = tar.fileobj.tell() + tarfile.BLOCKSIZE
        tar.addfile(member, io.BytesIO(picture.data))
        row |= {
            "width": picture.width,
            "height": picture.height,
            "size": member.size,
            "sha256": hashlib.sha256(picture.data).hexdigest(),
        }
        return None

    def _use_in_place(self, row: dict[str, Any], ref: Mapping[str, Any]) -> None:
        """Index a member of an existing tar where it lies, after decoding it once."""
        from pipeline.data.fetch import inspect

        place = tar_place(ref["url"])
        if place is None:
            return _reject(row, "unsupported_reference")
        if place["size"] > self.recipe.max_bytes:
            return _reject(row, "too_large")
        try:
            with open(place["tar"], "rb") as f:
                f.seek(place["offset"])
                data = f.read(place["size"])
        except (OSError, ValueError, OverflowError):  # no such place in it, or a NUL in the path
            return _reject(row, "missing_file")
        sha256 = hashlib.sha256(data).hexdigest()
        if ref["sha256"] and sha256 != ref["sha256"].lower():
            return _reject(row, "hash_mismatch")
        found = inspect(data, self.recipe.max_pixels)
        if isinstance(found, str):
            return _reject(row, found)
        row |= {**place, "sha256": sha256, "width": found[0], "height": found[1]}
        return None


def tar_place(reference: str) -> dict[str, Any] | None:
    """Path, offset and size of a member of a tar (see source.tar_reference), or None if it does not say them."""
    try:
        parts = urlsplit(reference)
        query = parse_qs(parts.query)
        offset, size = int(query["offset"][0]), int(query["size"][0])
    except (KeyError, ValueError):
        return None
    path = unquote(parts.path)
    return {"tar": path, "offset": offset, "size": size} if path and offset >= 0 and size >= 0 else None


def _reject(row: dict[str, Any], reason: str | None) -> None:
    row |= {"status": "rejected", "reason": reason}


def _opt_out_table(opted_out: Sequence[tuple[Mapping[str, Any], Evidence]]) -> bytes:
    import pyarrow as pa

    columns: dict[str, Any] = {name: pa.array([row[name] for row, _ in opted_out]) for name in ("key", "url", "reason")}
    columns["evidence"] = pa.array([evidence.text for _, evidence in opted_out])
    seen = [round(1000 * evidence.seen) for _, evidence in opted_out]
    columns["seen"] = pa.array(seen, pa.timestamp("ms", "UTC"))
    return write_table(columns)


def read_opt_outs(store: Store, shards: Iterable[ShardRow]) -> Iterator[dict[str, Any]]:
    """Every opted-out row of these shards of pairs: key, url, reason, evidence, and ``seen``, a datetime.

    The evidence stands in the record of each shard, not in the artefact's table, because of its times.
    """
    for row in shards:
        shard = read_shard(store, "pairs", row.key)
        if shard is not None and OPT_OUTS in shard.blobs:
            yield from read_table(store, shard.blobs[OPT_OUTS]).to_pylist()


def run_pairs(ctx: Context) -> Artifact:
    """Fetch and pack every source shard. The emoji set is served from this machine while the stage runs."""
    tasks = [
        ShardTask(shard.number, shard_key(ctx, {"source": shard.key}), {"source": shard})
        for shard in read_shards(ctx.store, ctx.inputs["source"])
    ]
    with ExitStack() as stack:
        settings = ctx.settings
        if any(path.startswith("emoji:") for path in ctx.config.source.paths) and "emoji.test" not in settings.hosts:
            from pipeline.data.emoji_server import serving

            settings = replace(settings, hosts=settings.hosts | {"emoji.test": stack.enter_context(serving())})
        rows = ctx.inputs["source"].ledger.rows
        return map_shards(ctx, tasks, MakePacker(ctx.store, ctx.recipe, settings), "rows", rows)
