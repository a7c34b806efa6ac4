"""Tells that an image was replaced under its name: by size and time of a file, by the ETag of an object on S3."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.fetch.opener import Refused
from pipeline.data.source.duplicates import HASH, Hashes
from pipeline.errors import UserError
from pipeline.local import local_path
from pipeline.store.parallel import THREADS

if TYPE_CHECKING:
    from pipeline.data.fetch.s3 import S3Reader

UNKNOWN = 0  # the version of an image on a web server, and of one that is not found
TIMEOUT_S = 10.0


class ImageVersions:
    """Looks up the versions of images, as numbers of 64 bits.

    They are hashes: sizes and times of files are nobody's business who may read the store. Of S3 a bucket that cannot
    be listed is asked once.
    """

    def __init__(self) -> None:
        self._s3: S3Reader | None = None
        self._closed: set[str] = set()  # buckets

    def __getstate__(self) -> dict[str, Any]:  # clients cannot be pickled
        return {"_s3": None, "_closed": self._closed}

    def of(self, references: Sequence[str]) -> Hashes:
        """Returns the version of the image behind each reference, UNKNOWN for "" and for what has none, [count]."""
        found = np.zeros(len(references), HASH)
        buckets: dict[str, dict[str, int]] = {}
        for place, reference in enumerate(references):
            if reference.startswith("s3://"):
                bucket, _, key = reference.removeprefix("s3://").partition("/")
                buckets.setdefault(bucket, {})[key] = place
            elif reference.startswith(("/", "file:")):
                with suppress(OSError, ValueError):
                    seen = os.stat(local_path(reference) or "")
                    found[place] = _hash(f"{seen.st_size} {seen.st_mtime_ns}")
        for bucket, places in buckets.items():
            for key, tag in self._tags(bucket, places).items():
                found[places[key]] = _hash(tag)
        return found

    def _tags(self, bucket: str, keys: Iterable[str]) -> Mapping[str, str]:
        if bucket in self._closed:
            return {}
        from pipeline.data.fetch.s3 import S3Reader  # which takes a moment to import

        if self._s3 is None:
            self._s3 = S3Reader(THREADS, TIMEOUT_S, 0)
        try:
            return self._s3.tags(bucket, keys)
        except (Refused, UserError):  # a plan may be made where no image can be read: then none counts as replaced
            self._closed.add(bucket)
            return {}


def counted_as(version: int, replaced: bool, tried: int) -> str:
    """Returns what a key counts of an image besides its reference: its version if it was replaced, and its try.

    "" stands for the first try of an image that was not.
    """
    return " ".join([f"version {version:016x}"] * replaced + [f"try {tried + 1}"] * (tried > 0))


def replaced_by(counted: str) -> int:
    """Returns the version by which an image was replaced, as ``counted_as`` says it; UNKNOWN if it was not."""
    words = counted.split()
    return int(words[1], 16) if words[:1] == ["version"] else UNKNOWN


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
