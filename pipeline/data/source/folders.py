"""Reads folders: of images with texts or metadata beside them, and of embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.source.columns import IMAGES, SUFFIXES, Flaw
from pipeline.data.source.imported import embedding_reference, metadata_parts
from pipeline.data.source.parsers.sidecars import SIDECARS
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import METADATA, FileSource, ListPart, ListRow, suffix_of, walk
from pipeline.data.source.tables import file_beside, link_refusal, listed_rows, named_file
from pipeline.local import PathPolicy

SPLITS = {  # the words that Hugging Face's datasets know
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class ImageFolder(FileSource):
    """A folder of images with texts beside them, or with metadata as in a Hugging Face imagefolder."""

    kind, suffixes = "folder", IMAGES

    @classmethod
    def matches(cls, path: str) -> bool:
        return os.path.isdir(os.path.expanduser(path)) and super().matches(path)

    def parts(self) -> Sequence[ListPart]:
        return [replace(part, knows_images=True) for part in super().parts()]

    def files(self) -> Iterable[Path]:
        for file, metadata in walk(self.file):
            if self.holds(file) or file == metadata or file.suffix.lower()[1:] in SIDECARS:
                yield file

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the rows of metadata, and those of images that no metadata speak for."""
        splits, may = folder_splits(self.file), self.policy(recipe)
        for file, metadata in walk(self.file):
            if reader.spent:
                return
            if file == metadata:
                for row in _metadata_rows(file, recipe, may, reader):
                    place = os.path.relpath(named_file(row.url) or self.file, self.file).split(os.sep)[0]
                    yield replace(row, split=row.split or splits.get(place, ""))
            elif metadata is None and self.holds(file):
                row = _sidecar_row(file, may, reader, recipe)
                yield replace(row, reject=row.reject or link_refusal(str(file), may))

    def caption_place(self, recipe: SourceRecipe) -> str:
        image, metadata = next(found for found in walk(self.file) if self.holds(found[0]))
        if metadata is not None:
            return super().caption_place(recipe)
        other = next((file for file, _ in walk(self.file) if file.name.endswith((".json", *SUFFIXES))), None)
        return (
            f"put a line of text into {image.with_suffix('.txt')} for {image.name}, and so on, or write "
            f'{{"file_name": "{image.name}", "text": "..."}} and so on into {image.with_name(METADATA[0])}'
        ) + (f"; if {other} has them, name that file in place of the folder" if other else "")

    def left_out(self, recipe: SourceRecipe) -> Iterator[tuple[str, Path]]:
        files, may = list(walk(self.file)), self.policy(recipe)
        images = {file.with_suffix("") for file, _ in files if self.holds(file)}
        with ListReader() as reader:
            rows = (_metadata_rows(file, recipe, may, reader) for file, metadata in files if file == metadata)
            named = {named_file(row.url) for row in chain.from_iterable(rows)}
        for file, metadata in files:
            if self.holds(file):
                if metadata is not None and str(file) not in named:
                    yield f"image that {metadata.name} does not name", file
            elif file != metadata and file.suffix.lower()[1:] not in SIDECARS:
                yield suffix_of(file), file
            elif file != metadata and file.with_suffix("") not in images:
                yield f"{suffix_of(file)} without an image", file


class Embeddings(FileSource):
    """A folder in clip-retrieval's layout (see imported.py)."""

    kind, embedded = "embeddings", True

    @classmethod
    def matches(cls, path: str) -> bool:
        return all(Path(os.path.expanduser(path), name).is_dir() for name in ("img_emb", "metadata"))

    def files(self) -> Iterable[Path]:
        return sorted(self.file.glob("*/*"))

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields a row for each embedding, split as its image would be; the list's hash is that image's."""
        for part, metadata in metadata_parts(self.file, self.policy(recipe), reader):
            for i, row in enumerate(listed_rows(metadata, recipe, reader)):
                url = "" if row.reject else embedding_reference(self.file, part, i, row.url)
                yield replace(row, url=url, group=row.group or row.url, sha256="")

    def unread(self, recipe: SourceRecipe) -> str:
        return ""


def folder_splits(folder: Path) -> dict[str, str]:
    """Returns the split that each folder of an imagefolder names, by its name.

    Where one of the held-out splits has no folder, a hash splits what lies in ``train``.
    """
    found = {name: SPLITS[name.lower()] for name in os.listdir(folder) if name.lower() in SPLITS}
    whole = {"validation", "test"} <= set(found.values())
    return {name: split for name, split in found.items() if split != "train" or whole}


def _metadata_rows(table: Path, recipe: SourceRecipe, may: PathPolicy, reader: ListReader) -> Iterator[ListRow]:
    column = "file_name" if recipe.image_column == "url" else recipe.image_column
    return listed_rows(table, replace(recipe, image_column=column), reader, may)


def _sidecar_row(image: Path, may: PathPolicy, reader: ListReader, recipe: SourceRecipe) -> ListRow:
    """Returns the row of an image with the captions of the first of SIDECARS beside it that is not empty.

    One that is irregular, or a link to what the list may not name, counts as missing.
    """
    url = file_beside(image.parent, image.name)
    for extension in SIDECARS:
        for case in (str.lower, str.upper):
            found: list[list[Any] | Flaw] = []
            with suppress(OSError):
                file = image.with_suffix(f".{case(extension)}")
                reading = recipe.encoding, recipe.caption_lines
                found = list(reader.rows("sidecar", file, 2, extension, *reading, within=may))
            for values in found[:1]:
                if isinstance(values, Flaw):
                    return ListRow(url, (), reject=values.reason, flaw=values.what)
                return ListRow(url, tuple(filter(None, values[1] or ())))
    return ListRow(url, ())
