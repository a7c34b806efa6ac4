"""Reads webdataset tars, whose images are used where they lie."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote_to_bytes, urlsplit

from pipeline.data.source.child import Budget, ListReader
from pipeline.data.source.columns import IMAGES, LIMIT, Flaw
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.rows import SIDECARS, sidecar_row
from pipeline.data.source.source import FileSource, ListRow, file_fingerprint, flawed
from pipeline.errors import UserError
from pipeline.local import MEMBER

HEADER = 64 << 10  # bytes, at most: names, and what tar keeps of a file beside it
HEADER_SHARE, LINK = 16, 16  # one byte of the budget for that many squared of a header; times a text that is linked
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def is_tar(path: str) -> bool:
    """Returns whether a path ends as the lists do that are read as tars."""
    return path.lower().endswith(".tar")


def tar_reference(tar: str, member: str, offset: int, size: int) -> str:
    """Returns the reference of a member of an existing tar, to be used where it lies."""
    return f"{MEMBER}{quote(os.fsencode(tar))}?offset={offset}&size={size}#{quote(member, errors='surrogateescape')}"


def tar_place(reference: str) -> dict[str, Any] | None:
    """Returns path, offset and size of a member of a tar (see tar_reference), or None if it does not say them."""
    try:
        parts = urlsplit(reference)
        query = parse_qs(parts.query)
        offset, size = int(query["offset"][0]), int(query["size"][0])
    except (KeyError, ValueError):
        return None
    path = os.fsdecode(unquote_to_bytes(parts.path))
    return {"tar": path, "offset": offset, "size": size} if is_tar(path) and offset >= 0 and size >= 0 else None


class TarFiles(FileSource):
    """A webdataset tar, or a folder of them."""

    kind, suffixes = "tars", (".tar",)

    @property
    def own(self) -> str:
        return str(self.file)

    def fingerprint(self) -> Any:
        return super().fingerprint() if self.file.is_dir() else ["tar", *file_fingerprint(self.file)]

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the samples: members that share a name up to the first dot, as in webdataset; no hidden ones.

        One that has no member with the name of an image is a row without a reference.
        """
        for file in self.files():
            for row in reader.rows("tar", file, 4, recipe.encoding, recipe.caption_lines):
                if isinstance(row, Flaw):
                    yield flawed(row)
                else:
                    url, captions, reject, flaw = row
                    yield ListRow(url or "", tuple(filter(None, captions or ())), reject=reject, flaw=flaw or "")

    def caption_place(self, recipe: SourceRecipe) -> str:
        return "in a tar, 000.txt, 000.caption or the caption in 000.json belongs to 000.jpg"

    def left_out(self, recipe: SourceRecipe) -> Iterator[tuple[str, Path]]:
        # img2dataset writes 00000.parquet and 00000_stats.json beside 00000.tar
        tars = tuple(str(file.with_suffix("")) for file in self.files())
        return (found for found in super().left_out(recipe) if not str(found[1]).startswith(tars))


# --- in the child process of pipeline.data.source.child ---------------------------------------------------------------


def members(
    file: BinaryIO, path: Path, budget: Budget, encoding: str = "", by_line: bool = False
) -> Iterator[list[Any]]:
    """Yields the samples of a tar, each as reference, captions, reason and flaw of its row."""
    head = file.read(6)
    if packed := next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None):
        raise UserError(f"source {path}: compressed with {packed}; images are read where they lie, so unpack it first")
    try:
        for row in _members(path, file, budget, encoding, by_line):
            yield [row.url, list(row.captions), row.reject, row.flaw]
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        OSError,
        IndexError,
        RecursionError,
    ) as e:  # tarfile believes sizes, even negative ones, and follows headers of headers
        raise UserError(f"source {path}: not a readable tar ({e})") from None


class _Tar:
    """Reads headers for tarfile, which otherwise takes as much memory as one says that it is long, and more time."""

    def __init__(self, file: BinaryIO, budget: Budget):
        self.seek, self.tell, self._read, self._budget = file.seek, file.tell, file.read, budget

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        # tarfile looks for the end of a number from each of its digits, and for that of a name from each record.
        self._budget.unpack(size * size // HEADER_SHARE)
        return self._read(size)


def _members(path: Path, file: BinaryIO, budget: Budget, encoding: str, by_line: bool) -> Iterator[ListRow]:
    file.seek(0)
    with tarfile.open(fileobj=_Tar(file, budget), mode="r:") as tar:  # type: ignore[call-overload]
        files: dict[str, tarfile.TarInfo] = {}
        name = image = ""
        said: dict[str, tuple[bytes, str]] = {}
        for member in tar:
            if member.size < 0 or tar.offset <= member.offset:  # the next one would be this one, without end
                raise tarfile.ReadError(f"the member {member.name!r} ends before it begins")
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if member.isfile():
                files[normpath(member.name)] = member
            elif not member.islnk() and not member.issym():
                continue
            if not stem:  # of hidden files macOS adds one to each
                continue
            if (sample := f"{folder}/{stem}") != name:
                if name:
                    yield sidecar_row(image, said, encoding, by_line)
                name, image, said = sample, "", {}
            extension = extension.lower()
            # A hard link is a file by another name, which came before. What another link names is not followed.
            whole = files.get(normpath(member.linkname)) if member.islnk() else None if member.issym() else member
            if whole is None or whole.issparse():  # whose bytes do not lie in one piece
                continue
            if f".{extension}" in IMAGES:
                image = tar_reference(str(path), member.name, whole.offset_data, whole.size)
            elif extension in SIDECARS:
                file.seek(whole.offset_data)
                data = file.read(min(whole.size, LIMIT + 1))
                budget.unpack(len(data) * (LINK if member.islnk() else 1))  # many links may lead to one text
                said[extension] = (data, f"{member.name!r} in {path}")
        if name:
            yield sidecar_row(image, said, encoding, by_line)
        # Where a header is damaged, or another tar begins, tarfile ends as if there were no more members.
        file.seek(tar.offset)
        if file.read(LIMIT).strip(b"\0"):
            raise UserError(
                f"source {path}: damaged at byte {tar.offset:,}, or another tar follows there; write it again, "
                "or join tars with: tar --concatenate"
            )
