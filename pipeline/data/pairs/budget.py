"""Bounds the processor time that decoding the images of a list takes, whatever it names."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from pipeline.data.pairs.decoding import LONGEST, Decoding, ImageDecoder, TimeLimit
from pipeline.data.pairs.image import StoredImage, Storing

FAIR = TimeLimit(1.0, 3e-7)  # four times and more what an honest image takes, of the slowest kind, HEIC
# Beyond FAIR: for all images of one host, folder or tar that a worker decodes, and for those of a shard.
ORIGIN_S, SHARD_S = 60.0, 300.0
REMEMBERED_BYTES = 64 << 20  # of stored images
Found = TypeVar("Found", StoredImage | str, tuple[int, int] | str | None)


class ShardDecoder:
    """Decodes the images of one shard: equal bytes once, and all of them within a budget of processor time.

    An image may take longer than FAIR says, up to the limits of ImageDecoder, as long as what images of its origin took
    beyond FAIR is less than ORIGIN_S, and that of all images less than SHARD_S. From then on FAIR is the limit, and an
    image that takes longer ends as "budget_spent". So N images take at most SHARD_S, one image by the limits of
    ImageDecoder, and N times FAIR. Any thread may call it.

    Args:
        decoder: Decoder of single images.
        overdrawn: Seconds beyond FAIR by origin, of earlier shards too; those of this one are added.
    """

    _lock = Lock()  # of all: a process decodes one image at a time

    def __init__(self, decoder: ImageDecoder, overdrawn: dict[str, float]):
        self._decoder, self._overdrawn, self._all_overdrawn = decoder, overdrawn, 0.0
        self._known: OrderedDict[tuple[str, bytes], StoredImage | tuple[int, int] | str | None] = OrderedDict()
        self._size = 0  # of what is known, bytes

    def prepare(self, origin: str, data: bytes, max_pixels: int, storing: Storing) -> StoredImage | str:
        """Calls ImageDecoder.prepare; ``origin`` is the host, folder or tar that the image comes from."""
        return self._once("prepare", origin, data, lambda work: self._decoder.prepare(data, max_pixels, storing, work))

    def inspect(self, origin: str, data: bytes, max_pixels: int) -> tuple[int, int] | str | None:
        """Calls ImageDecoder.inspect; ``origin`` is the tar that the image lies in."""
        return self._once("inspect", origin, data, lambda work: self._decoder.inspect(data, max_pixels, work))

    def _once(self, name: str, origin: str, data: bytes, decode: Callable[[Decoding], Found]) -> Found:
        key = name, hashlib.sha256(data).digest()
        with self._lock:  # of two equal images the second waits for the first
            if key in self._known:
                return self._known[key]  # type: ignore[return-value]
            work = Decoding(FAIR if self._is_spent(origin) else LONGEST)
            found = decode(work)
            if (beyond := work.seconds - FAIR.seconds(work.pixels)) > 0:
                self._overdrawn[origin] = self._overdrawn.get(origin, 0.0) + beyond
                self._all_overdrawn += beyond
            if found == "decode_timeout" and work.limit is FAIR:
                found = "budget_spent"
            self._remember(key, found)
            return found

    def _is_spent(self, origin: str) -> bool:
        return self._overdrawn.get(origin, 0.0) >= ORIGIN_S or self._all_overdrawn >= SHARD_S

    def _remember(self, key: tuple[str, bytes], found: StoredImage | tuple[int, int] | str | None) -> None:
        self._known[key] = found
        self._size += _size(found)
        while self._size > REMEMBERED_BYTES:
            self._size -= _size(self._known.popitem(last=False)[1])


def _size(found: object) -> int:
    return len(found.data) if isinstance(found, StoredImage) else 0
