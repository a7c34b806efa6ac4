"""The interface of a kind of list, and the row that every kind yields."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, ClassVar

from pipeline.data.source.columns import Flaw
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.local import PathPolicy, on_web
from pipeline.progress import counted

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of a Hugging Face imagefolder


@dataclass(frozen=True)
class ListRow:
    """Holds one row of a list.

    Attributes:
        url: An http(s), s3 or file reference, a member of a tar (see tar_reference), or an embedding (see
            pipeline.data.source.imported).
        reject: The reason if the list may not name it, or if the row cannot be read.
        flaw: Fault of a row that cannot be read, and where it is.
    """

    url: str
    captions: tuple[str, ...]
    group: str = ""
    split: str = ""
    sha256: str = ""
    license: str = ""
    attribution: str = ""
    reject: str | None = None
    flaw: str = ""


def flawed(flaw: Flaw) -> ListRow:
    """Returns the row in place of one that cannot be read."""
    return ListRow("", (), reject=flaw.reason, flaw=flaw.what)


@dataclass(frozen=True)
class ListPart:
    """Describes a part of a list that is read by itself, such as a file of a folder.

    Attributes:
        name: Path of the part, for messages.
        fingerprint: Function that returns JSON values, which change whenever the part may have changed.
        rows: Function that yields the rows, as ``Source.rows`` does.
        knows_images: True where the fingerprint changes whenever an image is replaced under its name.
        size: Bytes that are read of it, about; by them parts are divided among workers.
    """

    name: str
    fingerprint: Callable[[], Any]
    rows: Callable[[SourceRecipe, ListReader], Iterator[ListRow]]
    knows_images: bool = False
    size: int = 0


@dataclass(frozen=True)
class Source(ABC):
    """A list. Each kind of list is a subclass, which says all that the pipeline asks of it.

    Attributes:
        path: Path of the list, as ``source.paths`` names it.
        prefixes: Beginnings of the paths of the kind.
        everywhere: True where every machine finds the list by its path.
        embedded: True where rows are embeddings without images, on which no CLIP can be trained.
        host: Host for which ``serving`` answers while images are fetched; "" for none.
        credits: Sentence for the card of models that were trained on the list.
    """

    path: str
    prefixes: ClassVar[tuple[str, ...]] = ()
    everywhere: ClassVar[bool] = False
    embedded: ClassVar[bool] = False
    host: ClassVar[str] = ""
    credits: ClassVar[str] = ""

    @classmethod
    def matches(cls, path: str) -> bool:
        """Returns whether a list is of this kind, by its path or by what lies there."""
        return path.startswith(cls.prefixes)

    @abstractmethod
    def fingerprint(self) -> Any:
        """Returns JSON values that change whenever the list may have changed. Equal ones are not read again."""

    @abstractmethod
    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the rows, the same in the same order at every call; ``reader`` parses files in a child process.

        Raises:
            OSError: if the list cannot be read.
            UserError: for what is wrong with it.
        """

    def parts(self) -> Sequence[ListPart]:
        """Returns what the rows are read from, in order: the whole list, unless parts of it can be read alone.

        A part that is added behind the others is the only one that is read again.
        """
        return [ListPart(self.path, self.fingerprint, self.rows)]

    def pinned(self) -> str:
        """Returns the path with the version that it names now, for a list of which a path names the newest one."""
        return self.path

    @property
    def file(self) -> Path:
        """Returns the path as that of a file or folder on this machine."""
        return Path(os.path.expanduser(self.path)).absolute()

    @property
    def own(self) -> str:
        """Returns the folder, the tar or the s3://BUCKET/PREFIX that rows may name besides ``source.roots``."""
        return ""

    def policy(self, recipe: SourceRecipe, *others: Source) -> PathPolicy:
        """Returns what the rows of this list, and of others, may name."""
        own = [source.own for source in (self, *others) if source.own]
        buckets = [place for place in own if on_web(place)]
        roots = [*recipe.roots, *filter(None, [recipe.image_folder]), *buckets]
        return PathPolicy.of([place for place in own if place not in buckets], roots)

    def caption_place(self, recipe: SourceRecipe) -> str:
        """Returns where the captions would have been found, for a list that has none."""
        return f"its column {recipe.caption_column} is empty; name another one in source.caption_column"

    def unread(self, recipe: SourceRecipe) -> str:
        """Returns what of the list is not read, as a sentence; "" if all of it is."""
        return ""

    def stated_sides(self, recipe: SourceRecipe) -> Iterator[int]:
        """Yields the short sides of images, in pixels, of the rows that state width and height."""
        return iter(())

    def serving(self) -> AbstractContextManager[str]:
        """Runs a server of the list's images as long as the block lasts; yields its HOST:PORT."""
        return nullcontext("")


class FileSource(Source):
    """A list that is a file of this machine, or a folder of such files.

    Attributes:
        kind: Word for folders of the kind in fingerprints.
        suffixes: Ends of the files' names, in lower case.
    """

    kind: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def matches(cls, path: str) -> bool:
        place = Path(os.path.expanduser(path))
        if place.is_dir():
            return any(cls.holds(file) for file, _ in walk(place))
        return cls.holds(place) and place.is_file()

    @classmethod
    def holds(cls, file: Path) -> bool:
        """Returns whether a file has a name of the kind."""
        return file.name.lower().endswith(cls.suffixes)

    def files(self) -> Iterable[Path]:
        """Returns the files of which the rows are made."""
        return (file for file, _ in walk(self.file) if self.holds(file)) if self.file.is_dir() else (self.file,)

    @property
    def own(self) -> str:
        return str(self.file if self.file.is_dir() else self.file.parent)

    def fingerprint(self) -> Any:
        if self.file.is_dir():
            return [self.kind, self.own, [file_fingerprint(file) for file in self.files()]]
        with open(self.file, "rb") as f:
            # With its folder, by which its references are judged.
            suffix = self.file.name.lower().removesuffix(".gz").rpartition(".")[2]
            return [suffix, self.own, hashlib.file_digest(f, "sha256").hexdigest()]

    def left_out(self, recipe: SourceRecipe) -> Iterator[tuple[str, Path]]:
        """Yields the files of a folder that are not read, each with what it is."""
        read = set(self.files())
        return ((suffix_of(file), file) for file, _ in walk(self.file) if file not in read)

    def unread(self, recipe: SourceRecipe) -> str:
        """Returns how many files of a folder, and links to folders, are not read, by kind and with one of each."""
        found: dict[str, list[Path]] = {}

        def closed(error: OSError) -> None:
            found.setdefault("folder without permission", []).append(Path(error.filename))

        if self.file.is_dir():
            for root, folders, _ in os.walk(self.file, onerror=closed):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                if links := [Path(root, name) for name in folders if Path(root, name).is_symlink()]:
                    found.setdefault("link to a folder", []).extend(links)
            for what, file in self.left_out(recipe):
                found.setdefault(what, []).append(file)
        return unread_files(
            self.file, {what: [os.path.relpath(file, self.file) for file in of] for what, of in found.items()}
        )


class SplitFiles(FileSource):
    """A file of rows, or a folder of such files, each of which is read by itself.

    Attributes:
        read_share: Share of a file's bytes that is read for its rows, about.
    """

    read_share: ClassVar[float] = 1.0

    @abstractmethod
    def file_rows(self, file: Path, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the rows of one of the files."""

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        for file in self.files():
            yield from self.file_rows(file, recipe, reader)

    def parts(self) -> Sequence[ListPart]:
        if not self.file.is_dir():
            return super().parts()
        return [
            ListPart(str(file), partial(self._version, file), partial(self.file_rows, file), size=self._size(file))
            for file in self.files()
        ]

    def _size(self, file: Path) -> int:
        _, size, _ = file_fingerprint(file)
        return int(size * self.read_share)

    def _version(self, file: Path) -> Any:
        return [self.kind, self.own, file_fingerprint(file)]


def unread_files(folder: object, found: Mapping[str, Sequence[str]]) -> str:
    """Returns how many files of a folder are not read, of which kinds, with one of each; "" for none."""
    if not found:
        return ""
    kinds = [f"{len(of):,} {what} (such as {of[0]})" for what, of in sorted(found.items())]
    total = sum(map(len, found.values()))
    return f"{counted(total, 'file')} in {folder} {'are' if total > 1 else 'is'} not read: {', '.join(kinds)}"


def suffix_of(file: PurePath) -> str:
    """Returns what a file is, by its name."""
    return file.suffix.lower() or "without a suffix"


def file_fingerprint(file: Path) -> list[Any]:
    """Returns the name, the size in bytes and the time of a file; of a link that leads nowhere its own."""
    try:
        found = file.stat()
    except PermissionError:
        raise
    except OSError:  # a link that leads nowhere, or in a circle: the fetch counts it
        found = file.lstat()
    return [os.fsencode(file).decode("utf-8", "backslashreplace"), found.st_size, found.st_mtime_ns]


def walk(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yields the files below a folder in order, hidden ones left out, each with the metadata that speaks for it.

    Metadata are the METADATA of its own folder, or else of the nearest one above it. What lies in a folder without
    permission is left out (see unread_files). Raises UserError for one that cannot be listed for another reason.
    """
    nearest: dict[str, Path | None] = {}
    for root, folders, names in os.walk(folder, onerror=_check_listed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        own = next((Path(root, name) for name in METADATA if name in names), nearest.get(os.path.dirname(root)))
        nearest[root] = own
        yield from ((Path(root, name), own) for name in sorted(names) if not name.startswith("."))


def _check_listed(error: OSError) -> None:
    if not isinstance(error, PermissionError):
        raise UserError(
            f"source {error.filename}: cannot be listed ({error.strerror}); check its disk or server, then run the "
            "same command again"
        ) from error
