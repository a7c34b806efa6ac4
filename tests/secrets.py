"""Looks for secrets where none may be: in stores, logs, reports, records, rendered jobs."""

import base64
import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store import Store

Place = Path | tuple[str, bytes | str]  # a file or a folder, or a name and what it holds


def leaks(places: Iterable[Place], secrets: Mapping[str, str]) -> list[str]:
    """'PLACE: SECRET' for every place that holds one of the secrets, which are given by name. They are found as they
    stand, quoted for a URL or in base64, also in gzip, zip and tar files and in the columns of Parquet."""
    wanted = {name: spellings(value) for name, value in secrets.items()}
    found = []
    for place in places:
        for name, data in _contents(place):
            parts = list(opened(data))
            found += [
                f"{name}: {secret}"
                for secret, spelled in wanted.items()
                if any(spelling in part for part in parts for spelling in spelled)
            ]
    return found


def objects(store: Store) -> Iterator[Place]:
    """Every object of a store, and all of their names."""
    paths = [entry.path for entry in store.list("")]
    yield "names", "\n".join(paths)
    for path in paths:
        yield path, store.read(path)


def spellings(secret: str) -> set[bytes]:
    """A secret as it stands, quoted, and what of its base64 does not depend on what is before and behind it."""
    plain = secret.encode()
    coded = {base64.b64encode(b"\0" * i + plain)[(0, 2, 3)[i] : -4] for i in range(3)}
    return {plain, quote(secret, safe="").encode(), *coded}


def opened(data: bytes) -> Iterator[bytes]:
    """The bytes, and what is packed in them."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from opened(gzip.decompress(data))
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            for name in packed.namelist():
                yield from opened(packed.read(name))
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if (file := tar.extractfile(member)) is not None:
                    yield from opened(file.read())
    elif data[:4] == b"PAR1":
        for column in pq.ParquetFile(pa.BufferReader(data)).read().columns:
            yield str(column.to_pylist()).encode()


def _contents(place: Place) -> Iterator[tuple[str, bytes]]:
    if isinstance(place, tuple):
        name, data = place
        yield name, data if isinstance(data, bytes) else data.encode()
        return
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file() and not file.is_symlink():  # a folder of Ray's has sockets, too
            yield str(file), file.read_bytes()
