"""Reads the headers of tars, and the texts in them; images are used where they lie."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO
from urllib.parse import quote

from pipeline.data.source.columns import IMAGES, LIMIT, Flaw
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.sidecars import SIDECARS, sidecar_captions
from pipeline.errors import UserError
from pipeline.local import MEMBER

HEADER = 64 << 10  # bytes, at most: names, and what tar keeps of a file beside it
HEADER_SHARE, LINK = 16, 16  # one byte of the budget for that many squared of a header; times a text that is linked
FETCH = "the samples behind that are missing, so fetch or write it again"
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def tar_reference(tar: str, member: str, offset: int, size: int) -> str:
    """Returns the reference of a member of an existing tar, to be used where it lies."""
    return f"{MEMBER}{quote(os.fsencode(tar))}?offset={offset}&size={size}#{quote(member, errors='surrogateescape')}"


def members(
    file: BinaryIO, path: Path, budget: Budget, encoding: str = "", by_line: bool = False
) -> Iterator[list[Any]]:
    """Yields the samples of a tar, each as reference, captions, reason and flaw of its row.

    Behind those of a tar that ends early, as after a download that broke off, comes a row that names the tar itself.
    """
    head = file.read(6)
    if packed := next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None):
        raise UserError(f"source {path}: compressed with {packed}; images are read in place, so unpack it first")
    try:
        for image, said in _members(path, file, budget):
            if said is None:
                size = os.fstat(file.fileno()).st_size
                yield [image, None, "truncated", f"{path} ends early, after {size:,} bytes; {FETCH}"]
                continue
            found = sidecar_captions(said, encoding, by_line)
            yield [image, None, found.reason, found.what] if isinstance(found, Flaw) else [image, [*found], None, None]
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
    """Reads headers for tarfile, which otherwise takes as much memory as one says that it is long, and more time.

    ``ended`` says whether a read met the end of the file, which in a whole tar lies behind two empty blocks.
    """

    def __init__(self, file: BinaryIO, budget: Budget):
        self.seek, self.tell, self._read, self._budget = file.seek, file.tell, file.read, budget
        self.ended = False

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        # tarfile looks for the end of a number from each of its digits, and for that of a name from each record.
        self._budget.unpack(size * size // HEADER_SHARE)
        data = self._read(size)
        self.ended = self.ended or len(data) < size
        return data

    def headers(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """Yields the members of a tar, as far as it goes."""
        try:
            yield from tar
        except tarfile.TarError:
            if not self.ended:
                raise


def _members(path: Path, file: BinaryIO, budget: Budget) -> Iterator[tuple[str, dict[str, tuple[bytes, str]] | None]]:
    """Yields the reference of each sample's image, "" for none, and what lies beside it (see sidecar_captions).

    Last comes the reference of the tar itself, with None, if it ends early.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    source = _Tar(file, budget)
    with tarfile.open(fileobj=source, mode="r:") as tar:  # type: ignore[call-overload]
        files: dict[str, tarfile.TarInfo] = {}
        name = image = ""
        said: dict[str, tuple[bytes, str]] = {}
        for member in source.headers(tar):
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
                    yield image, said
                name, image, said = sample, "", {}
            extension = extension.lower()
            # A hard link is a file by another name, which came before. What another link names is not followed.
            whole = files.get(normpath(member.linkname)) if member.islnk() else None if member.issym() else member
            if whole is None or whole.issparse():  # whose bytes do not lie in one piece
                continue
            if whole.offset_data + whole.size > end:
                continue
            if f".{extension}" in IMAGES:
                image = tar_reference(str(path), member.name, whole.offset_data, whole.size)
            elif extension in SIDECARS:
                file.seek(whole.offset_data)
                data = file.read(min(whole.size, LIMIT + 1))
                budget.unpack(len(data) * (LINK if member.islnk() else 1))  # many links may lead to one text
                said[extension] = (data, f"{member.name!r} in {path}")
        # Where a header is damaged, or another tar begins, tarfile ends as if there were no more members.
        file.seek(tar.offset)
        rest = file.read(LIMIT)
        early = source.ended or len(rest) < tarfile.BLOCKSIZE
        if name and (not early or (image and said)):  # of a sample that was cut, the rest may be missing
            yield image, said
        if early:
            yield f"file://{quote(os.fsencode(path))}", None
        elif rest.strip(b"\0"):
            raise UserError(
                f"source {path}: damaged at byte {tar.offset:,}, or another tar follows there; write it again, "
                "or join tars with: tar --concatenate"
            )
