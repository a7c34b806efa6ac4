"""Reads a worker's rows of tensors out of the blobs of a checkpoint, a few parts of a blob in memory at a time.

So a restored state takes its own bytes of memory, as a saved one does, however large its blobs are.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from pipeline.store import Store
from pipeline.store.records import blob_parts, read_twice
from pipeline.training.distributed.sharding import first_row, local, rows_of

READERS = 16  # of a blob at once
MOST_HEADER = 100_000_000  # bytes, of a file of safetensors


@dataclass(frozen=True)
class _Rows:
    """Rows that a worker has to have of a tensor, and that lie in a blob.

    Attributes:
        name: Name of the tensor.
        start: Place of their first byte in the blob.
        target: Memory for their bytes.
    """

    name: str
    start: int
    target: memoryview


def read_tensors(store: Store, blobs: Sequence[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns this worker's rows of those tensors ``like`` these that blobs hold, one of each worker that saved them.

    Blobs without such rows are not read. Raises CorruptObject, and ValueError where the blobs hold other tensors.
    """
    found = {name: torch.empty(local(tensor).shape, dtype=tensor.dtype) for name, tensor in like.items()}
    copied = Counter[str]()
    for saver, blob in enumerate(blobs):
        if saver and not any(_shares_rows(tensor, saver, len(blobs)) for tensor in like.values()):
            continue  # the first holds what is not sharded, too
        copied.update(read_twice(store, partial(_copy_rows, blob, like, found)))
    if lacking := [name for name, count in copied.items() if count != found[name].nbytes]:
        raise ValueError(f"checkpoint of another model: rows of {lacking[0]} are missing")
    return {name: found[name] for name in copied}


def read_about(header: bytes) -> dict[str, Any]:
    """Returns what the header of a blob, which is JSON, says about it."""
    found: dict[str, Any] = json.loads(json.loads(header)["__metadata__"]["about"])
    return found


def _copy_rows(blob: str, like: Mapping[str, Tensor], found: Mapping[str, Tensor], store: Store) -> dict[str, int]:
    """Copies the rows of ``found`` that lie in a blob, and returns how many bytes by the names of its tensors."""
    parts = blob_parts(store, blob, READERS)
    try:
        head = _head(parts)
        wanted = list(_wanted(head, like, found))
    except Exception:
        deque(parts, maxlen=0)  # raises CorruptObject where a damaged header is the reason
        raise
    at = 0
    for data in chain([head], parts):
        for rows in wanted:
            low, high = max(rows.start, at), min(rows.start + len(rows.target), at + len(data))
            if low < high:
                rows.target[low - rows.start : high - rows.start] = memoryview(data)[low - at : high - at]
        at += len(data)
    return {rows.name: len(rows.target) for rows in wanted}


def _head(parts: Iterator[bytes]) -> bytes:
    """Returns the beginning of a blob: the first of its parts, as many as its header reaches into."""
    head, size = b"", MOST_HEADER
    while len(head) < 8 + size and (data := next(parts, b"")):
        head += data
        size = min(int.from_bytes(head[:8], "little"), MOST_HEADER)
    return head


def _wanted(head: bytes, like: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[_Rows]:
    """Yields for each tensor of a blob the rows that belong into ``found``, of some none."""
    begin = 8 + int.from_bytes(head[:8], "little")
    starts = read_about(head[8:begin])["starts"]
    for name, entry in json.loads(head[8:begin]).items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        each = prod(shape[1:]) * like[name].itemsize if name in like else 0  # bytes of a row; a number is one row
        if name not in like or shape[1:] != [*like[name].shape[1:]] or stop - start != each * prod(shape[:1]):
            raise ValueError(f"checkpoint of another model: {name} {shape}")
        rows = found[name].flatten().view(torch.uint8).numpy().data
        # Counted in bytes of the whole tensor, of which the blob has one range and this worker another.
        held, own = starts.get(name, 0) * each, first_row(like[name]) * each
        low = max(held, own)
        high = max(low, min(held + stop - start, own + len(rows)))
        yield _Rows(name, begin + start + low - held, rows[low - own : high - own])


def _shares_rows(tensor: Tensor, saver: int, savers: int) -> bool:
    """Returns whether one of the workers that saved a sharded tensor held rows that this worker has to have."""
    if not tensor.ndim:
        return False
    rows, first = rows_of(saver, savers, len(tensor)), first_row(tensor)
    return max(first, rows.start) < min(first + len(local(tensor)), rows.stop)
