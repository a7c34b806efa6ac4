"""Makes the tar and the index of one source shard: fetches, checks, resizes and packs its images.

The tar is webdataset's, and the same to the byte for the same images, in whatever order servers answer: members are in
order of key, time and owner fixed.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.fetch.board import Board, Note
from pipeline.data.fetch.fetcher import Fetched, Fetcher
from pipeline.data.fetch.opener import Evidence, Refused, normal_url
from pipeline.data.fetch.rules import read_deny_lists
from pipeline.data.pairs.budget import ShardDecoder
from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.earlier import take_over
from pipeline.data.pairs.recipe import PairsRecipe
from pipeline.data.pairs.row_index import OPT_OUTS, index_counts, index_table, opt_out_table
from pipeline.data.pairs.unfinished import Unfinished
from pipeline.data.source.cells import read_cells
from pipeline.data.source.imported import imported_url, read_imported
from pipeline.data.source.segments import row_key
from pipeline.data.source.tars import tar_place
from pipeline.graph.artifacts import read_table, write_table
from pipeline.graph.shared import call_shared
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger, status_of
from pipeline.local import PathPolicy, is_cell, is_embedding, is_member, read_local, reason_of
from pipeline.progress import Steps
from pipeline.settings import PairsSettings
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import digest

Wanted = tuple[dict[str, Any], Mapping[str, Any]]
"""A row of the index that is still to end, and its reference."""


def _exchange(news: Mapping[str, Note], origins: Sequence[str]) -> Mapping[str, Note]:
    """Tells the other workers of this run what was found out about sites, and returns what they know of others."""
    return call_shared(Board, "exchange", socket.gethostname(), news, origins) or {}


class Packer:
    """Makes the tars and the indices of shards. Several threads may call it, each for a shard of its own.

    ``shares``: other workers are told of sites that do not answer and of what sites do not want, and tell it.
    """

    def __init__(self, store: Store, recipe: PairsRecipe, settings: PairsSettings, reach: PathPolicy, shares: bool):
        self.store, self.recipe, self.settings, self.reach = store, recipe, settings, reach
        self.overdrawn: dict[str, float] = {}  # see ShardDecoder: a list of many shards has no more than one of few
        self.decoder = shared_decoder()
        self.decoder.start()  # it has much to import
        self.deny = read_deny_lists(store, *recipe.deny_lists)
        exchange = _exchange if shares else None
        self.fetcher = Fetcher(settings, recipe.max_bytes, self.deny, reach, recipe.allow, exchange)

    def __call__(self, task: ShardTask) -> ShardOutput:
        steps = Steps()
        refs = read_table(self.store, task.inputs["source"].blobs["refs"]).to_pylist()
        rows = [
            {"key": row_key(task.number, i), "status": "kept"}
            | {k: ref[k] for k in ("url", "split", "license", "attribution")}
            for i, ref in enumerate(refs)
        ]
        for row, ref in zip(rows, refs, strict=True):
            if ref["reject"]:
                _reject(row, ref["reject"])
            else:
                self._reject_denied(row, ref["sha256"])  # known by the list's own hash: not even asked for
        left = [i for i, row in enumerate(rows) if row["status"] == "kept"]
        self._import_embeddings([rows[i] for i in left if is_embedding(refs[i]["url"])])
        left = [i for i in left if not is_embedding(refs[i]["url"])]
        decoder = ShardDecoder(self.decoder, self.overdrawn)
        with Unfinished(digest([self.store.url, task.key, repr(self.settings)])) as unfinished:
            packed = {i for i in left if rows[i]["key"] in unfinished.ended}  # rows whose images are for the tar
            for i in packed:
                rows[i] |= unfinished.ended[rows[i]["key"]]
                if evidence := rows[i].get("evidence"):
                    rows[i]["evidence"] = Evidence(*evidence)
            left = [i for i in left if i not in packed]
            if earlier := task.inputs.get("earlier pairs"):
                known = set()
                for i, found, image in take_over(self.store, refs, task.inputs["earlier source"], earlier, left):
                    rows[i] |= found
                    known.add(i)
                    # A member of a tar that is used where it lies is not packed again.
                    if image is not None or not is_member(refs[i]["url"]):
                        unfinished.add(rows[i], image)
                        packed.add(i)
                left = [i for i in left if i not in known]
            left = [
                i for i in left if not (is_member(refs[i]["url"]) and self._use_in_place(rows[i], refs[i], decoder))
            ]
            for row, image in self._new_images([(rows[i], refs[i]) for i in left], decoder, steps):
                unfinished.add(row, image)
            packed.update(left)
            blobs: dict[str, bytes | Path] = {}
            if packed:
                with steps("pack"):
                    unfinished.pack((rows[i] for i in sorted(packed)), self.recipe.encode_format)
                blobs["images"] = unfinished.path
        blobs["index"] = write_table(index_table(rows))
        if opted_out := [row for row in rows if row.get("evidence")]:
            blobs[OPT_OUTS] = opt_out_table(opted_out)
        ledger = Ledger.count(None if row["status"] == "kept" else row["reason"] for row in rows)
        return ShardOutput(ledger, blobs, index_counts(rows), steps.seconds, unfinished.remove)

    def _import_embeddings(self, rows: Sequence[dict[str, Any]]) -> None:
        """Checks the embeddings that rows name; such rows have no image, and so no size."""
        for row, found in zip(rows, read_imported([row["url"] for row in rows], self.reach), strict=True):
            if isinstance(found, str):
                _reject(row, found)
            elif entry := self._denied(imported_url(row["url"])):
                _reject(row, "denied", Evidence(entry, time.time()))
            else:
                row["sha256"] = hashlib.sha256(found.tobytes()).hexdigest()

    def _new_images(
        self, wanted: Sequence[Wanted], decoder: ShardDecoder, steps: Steps
    ) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """Fetches images and yields, in the order in which they come, rows that have ended with what is to be stored.

        That is None where the row is rejected.
        """
        members: list[Wanted] = []
        cells: list[Wanted] = []
        others: list[Wanted] = []
        for each in wanted:
            url = each[1]["url"]
            (members if is_member(url) else cells if is_cell(url) else others).append(each)
        read = ((each, self._member(tar_place(each[1]["url"]))) for each in members)
        inside = read_cells([ref["url"] for _, ref in cells], self.recipe.max_bytes, self.reach)
        answered = ((each, _answer(found)) for each, found in zip(cells, inside, strict=True))
        fetched = self.fetcher.fetch([ref["url"] for _, ref in others])
        answers = steps.each("fetch", chain(read, answered, ((others[place], answer) for place, answer in fetched)))
        # Two, so that there is always one to be decoded next, while images are put into the spool and others come.
        return ordered_map(partial(self._judge, decoder, steps), answers, threads=2)

    def _judge(
        self, decoder: ShardDecoder, steps: Steps, found: tuple[Wanted, Fetched]
    ) -> tuple[dict[str, Any], bytes | None]:
        """Ends a row by the answer to its reference, and returns it with what is to be stored."""
        (row, ref), answer = found
        if answer.data is None:
            _reject(row, answer.reason, answer.evidence)
            return row, None
        hashed = ref["sha256"] or self.deny.sha256  # else nobody asks for the hash of what was fetched
        if hashed and self._reject_hash(row, ref, hashlib.sha256(answer.data).hexdigest()):
            return row, None
        r = self.recipe
        with steps("decode"):
            image = decoder.prepare(_origin(ref["url"]), answer.data, r.max_pixels, r.storing)
        if isinstance(image, str):
            _reject(row, image)
            return row, None
        row |= {
            "width": image.width,
            "height": image.height,
            "size": len(image.data),
            "sha256": hashlib.sha256(image.data).hexdigest(),
        }
        return row, image.data

    def _member(self, place: Mapping[str, Any] | None) -> Fetched:
        """Reads a member of an existing tar."""
        if place is None:
            return Fetched(None, "unsupported_reference")
        try:
            data = read_local(place["tar"], self.recipe.max_bytes, self.reach, place["offset"], place["size"])
        except OSError as e:
            return Fetched(None, reason_of(e))
        return Fetched(data, None)

    def _use_in_place(self, row: dict[str, Any], ref: Mapping[str, Any], decoder: ShardDecoder) -> bool:
        """Indexes a member of an existing tar where it lies, after decoding it once.

        Returns False for an image that is to be stored as a fetched one is.
        """
        place = tar_place(ref["url"])
        answer = self._member(place)
        if place is None or answer.data is None:
            _reject(row, answer.reason)
            return True
        sha256 = hashlib.sha256(answer.data).hexdigest()
        if self._reject_hash(row, ref, sha256):
            return True
        found = decoder.inspect(_origin(ref["url"]), answer.data, self.recipe.max_pixels)
        if found is None:
            return False
        if isinstance(found, str):
            _reject(row, found)
        elif min(found) < self.recipe.min_image_size:
            _reject(row, "too_small")
        else:
            row |= {**place, "sha256": sha256, "width": found[0], "height": found[1]}
        return True

    def _reject_hash(self, row: dict[str, Any], ref: Mapping[str, Any], sha256: str) -> bool:
        """Rejects bytes that the list's hash, or a deny list, does not allow; returns whether it did."""
        if ref["sha256"] and sha256 != ref["sha256"].lower():
            _reject(row, "hash_mismatch")
        else:
            self._reject_denied(row, sha256)
        return row["status"] != "kept"

    def _denied(self, url: str) -> str | None:
        """Returns the entry of a deny list for the URL that an imported embedding is of."""
        with suppress(Refused):
            return self.deny.url(normal_url(url)) if url else None
        return None

    def _reject_denied(self, row: dict[str, Any], sha256: str) -> None:
        if entry := self.deny.hash(sha256):
            _reject(row, "denied", Evidence(entry, time.time()))


def _origin(url: str) -> str:
    """Returns the host or bucket that a reference names, or else the folder, tar or Parquet file that it leads to."""
    _, _, place = url.partition("://")
    host = place.partition("/")[0]
    return host.lower() or (place.partition("?")[0] if is_member(url) or is_cell(url) else place.rpartition("/")[0])


def _answer(found: bytes | str) -> Fetched:
    return Fetched(None, found) if isinstance(found, str) else Fetched(found, None)


def _reject(row: dict[str, Any], reason: str | None, evidence: Evidence | None = None) -> None:
    row |= {"status": status_of(reason), "reason": reason, "evidence": evidence}
