"""Knows the kinds of lists, and reads a list of any of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from pipeline.data.source.annotations import AnnotationFile
from pipeline.data.source.columns import MAX_CAPTION, MAX_CAPTIONS, SUFFIXES, Flaw, bounded_row
from pipeline.data.source.drawings.source import Drawings
from pipeline.data.source.duplicates import merged
from pipeline.data.source.folders import Embeddings, ImageFolder
from pipeline.data.source.hub import HubDataset
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.remote import RemoteFolder, RemoteTable
from pipeline.data.source.rows import PackagedRows
from pipeline.data.source.source import ListPart, ListRow, Source, flawed
from pipeline.data.source.tables import TableFiles, file_beside, listed_row
from pipeline.data.source.tars import TarFiles
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import PathPolicy
from pipeline.plugins import broken, plugins
from pipeline.progress import counted, say_once

BUILT_IN = (
    Drawings,
    RemoteFolder,
    RemoteTable,
    HubDataset,
    Embeddings,
    ImageFolder,
    TarFiles,
    TableFiles,
    AnnotationFile,
    PackagedRows,
)
ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME
GROUP = "unclip.sources"  # of entry points


def sources() -> Iterator[type[Source]]:
    """Yields the kinds of lists in the order in which they are asked; the first that matches reads the list.

    Plug-ins come last, by name: none changes how a list is read that needs none, and then none is loaded.
    """
    yield from BUILT_IN
    yield from plugins(GROUP).values()


@contextmanager
def _blamed(kind: type[Source]) -> Iterator[None]:
    """Makes one sentence of an error in a plug-in."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if kind in BUILT_IN:
            raise
        name = next(name for name, other in plugins(GROUP).items() if other is kind)
        raise broken(GROUP, name, f"{type(e).__name__}: {' '.join(str(e).split())}") from None


def lists_there(paths: Sequence[str]) -> list[Source]:
    """Returns the lists among ``paths`` that a kind matches; those that are missing are left out."""
    return list(filter(None, map(_match, paths)))


def _match(path: str) -> Source | None:
    for kind in sources():
        with _blamed(kind):
            if kind.matches(path):
                return kind(path)
    return None


def source_at(path: str) -> Source:
    """Returns a list. Raises UserError where no kind matches."""
    if source := _match(path):
        return source
    file = Path(os.path.expanduser(path))
    if file.is_dir():  # which says what it has instead of images
        return ImageFolder(path)
    if not file.exists():
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        pattern = "; patterns are not expanded: name the folder" if set("*{") & set(path) else ""
        hub = f"; a dataset of the Hugging Face Hub is hf://datasets/{path}" if ON_HUB.fullmatch(path) else ""
        raise UserError(f"source {path}: no such file or folder{where}{pattern}{hub}")
    if not file.is_file():
        raise UserError(f"source {path}: not a regular file; name a file or a folder")
    if file.suffix.lower() in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"):
        raise UserError(
            f"source {path}: the only compressed tables are .csv.gz, .tsv.gz and .jsonl.gz; unpack it first"
        )
    raise UserError(
        f"source {path}: not a {', '.join(SUFFIXES[:4])}, .json, .xlsx or .tar file, nor a folder; save it as one"
    )


def pinned(path: str) -> str:
    """Returns the path of a list with the version that it names now."""
    source = _match(path)
    return source.pinned() if source else path


def parts_of(path: str) -> Sequence[ListPart]:
    """Returns the parts of a list in its order, none of which is read for it. Raises UserError."""
    source = source_at(path)
    kind = type(source)

    def version(part: ListPart) -> Any:
        with _blamed(kind), _readable(path):
            return part.fingerprint()

    def rows(part: ListPart, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        return part.rows(recipe, reader) if kind in BUILT_IN else _bounded(source, part, recipe, reader)

    with _blamed(kind), _readable(path):
        return [replace(part, fingerprint=partial(version, part), rows=partial(rows, part)) for part in source.parts()]


def check_unchanged(part: ListPart, version: Any) -> None:
    """Raises UserError unless a part of a list has this fingerprint now, as before it was read."""
    try:
        same = part.fingerprint() == version
    except OSError:  # it is gone
        same = False
    if not same:
        raise UserError(f"source {part.name}: changed while it was read; run again")


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Makes one sentence of an error about permissions."""
    try:
        yield
    except PermissionError:
        raise UserError(f"source {path}: no permission to read it") from None


class PartReader:
    """Reads parts of one list, one after the other. Use it in a ``with`` statement.

    Attributes:
        rows: Rows that were read.
        flawed: Rows among them that cannot be read.
        flaw: Fault of the first of these.
        captioned: Rows with a caption.
        cut: Captions that were cut.
    """

    def __init__(self, path: str, recipe: SourceRecipe):
        self.rows = self.flawed = self.captioned = self.cut = 0
        self.flaw = ""
        self._path, self._recipe, self._reader = path, recipe, ListReader()

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reader.__exit__(*error)

    def read(self, part: ListPart) -> Iterator[ListRow]:
        """Yields the rows of a part. What they may cost, and so where they end, does not depend on other parts."""
        self._reader.begin()
        try:
            for row in part.rows(self._recipe, self._reader):
                self.rows += 1
                self.flawed += bool(row.flaw)
                self.flaw = self.flaw or row.flaw
                self.captioned += bool(row.captions)
                yield row
        except OSError as e:
            raise UserError(f"source {part.name}: cannot be read ({e.strerror or e})") from None
        say_once(self._reader.spent)
        self.cut += self._reader.cut

    @property
    def counts(self) -> dict[str, int]:
        """Returns the numbers among its attributes, by name."""
        return {"rows": self.rows, "flawed": self.flawed, "captioned": self.captioned, "cut": self.cut}

    def add(self, counts: Mapping[str, int], flaw: str) -> None:
        """Adds the ``counts`` and the ``flaw`` of another reader, which has read the parts behind these."""
        for name, value in counts.items():
            setattr(self, name, getattr(self, name) + value)
        self.flaw = self.flaw or flaw

    def finish(self, others: bool = False) -> None:
        """Says how many captions were cut. Raises UserError if no row had one and the list has no ``others``."""
        path = self._path
        if self.cut:
            most = f"{MAX_CAPTION:,} characters, or those of a row to {MAX_CAPTIONS:,}"
            say_once(f"source {path}: {counted(self.cut, 'caption')} cut to {most}; CLIP reads 77 tokens of each")
        if self.captioned or others or not self.rows:
            return
        if self.flaw:
            unreadable = f"{self.flawed:,} of {self.rows:,} not at all: {self.flaw}"
            raise UserError(f"source {path}: no row with a caption can be read, and {unreadable}")
        left = unread(path, self._recipe)
        where = source_at(path).caption_place(self._recipe)
        raise UserError(
            f"source {path}: no row has a caption, so nothing can be trained on it; {where}"
            + (f"; and {left}" if left else "")
        )


def read_rows(path: str, recipe: SourceRecipe) -> Iterator[ListRow]:
    """Yields the rows of one list in its order, read as they are asked for.

    Raises:
        UserError: as ``scan`` does, and behind the last row if none of them can be read, or none has a caption.
    """
    with PartReader(path, recipe) as reader:
        for part in parts_of(path):
            yield from reader.read(part)
        reader.finish()


def _bounded(source: Source, part: ListPart, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
    """Yields the rows of a plug-in, within the limits of rows that a child process has read: they are data, too."""
    may = source.policy(recipe)

    def rows() -> Iterator[ListRow]:
        for number, row in enumerate(part.rows(recipe, reader), 1):
            said = [row.split, row.sha256, row.license, row.attribution, row.group]
            try:
                "".join([row.url, *row.captions, *said, row.flaw]).encode()
            except UnicodeEncodeError:
                yield flawed(Flaw("not_utf8", f"row {number:,} holds half a character"))
                continue
            if row.reject is not None:
                yield flawed(Flaw(row.reject, REASONS[row.reject] and row.flaw[:MAX_CAPTION]))
                continue
            values, cut = bounded_row([row.url, list(row.captions), *said])
            reader.cut += cut
            yield listed_row(source.path, number, values, may, partial(file_beside, Path(source.own)))

    with _blamed(type(source)):
        yield from merged(rows())


def path_policy(recipe: SourceRecipe, *paths: str) -> PathPolicy:
    """Returns what these lists may name.

    A table may name what lies below its folder, on this machine or on S3, any other list its own files, and all of them
    what ``recipe.roots`` names. Raises UserError for a list that is missing.
    """
    first, *others = map(source_at, paths)
    with _blamed(type(first)):
        return first.policy(recipe, *others)


def unread(path: str, recipe: SourceRecipe) -> str:
    """Returns what of a list is not read, as a sentence; "" if all of it is."""
    source = source_at(path)
    with _blamed(type(source)):
        return source.unread(recipe)


def no_rows(path: str, recipe: SourceRecipe) -> UserError:
    """Returns the error for a list without a row, which says what a folder has instead."""
    left = unread(path, recipe)
    kinds = "; it has no image, tar or table" if source_at(path).file.is_dir() else ""
    return UserError(f"source {path}: no rows{kinds}{left and f': {left}'}")


@contextmanager
def serving_lists(paths: Sequence[str], hosts: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Runs the servers that lists bring along as long as the block lasts; yields ``hosts`` with theirs."""
    with ExitStack() as stack:
        for source in map(source_at, paths):
            if source.host and source.host not in hosts:
                hosts = {**hosts, source.host: stack.enter_context(source.serving())}
        yield hosts
