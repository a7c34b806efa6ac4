"""Finds the images of JSON files of images and captions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.source.columns import IMAGES, Flaw
from pipeline.data.source.duplicates import merged
from pipeline.data.source.parsers.annotations import KINDS
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import FileSource, ListRow
from pipeline.data.source.tables import PLACED, file_beside, listed_row, wanted_columns


class AnnotationFile(FileSource):
    """A JSON file. Its images lie in ``source.image_folder``, or in the first of the folders where tools keep them."""

    kind, suffixes = "annotations", (".json",)

    @classmethod
    def matches(cls, path: str) -> bool:
        return cls.holds(Path(path)) and os.path.isfile(os.path.expanduser(path))

    @property
    def own(self) -> str:
        """Returns the file's folder; in COCO's layout the one above, which has the folders of images."""
        folder = self.file.parent
        return str(folder.parent if folder.name == "annotations" else folder)

    def fingerprint(self) -> Any:
        return [*super().fingerprint(), list(map(os.path.isdir, self._folders()))]

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields a row for each image, with all of its captions."""
        wanted = [*wanted_columns(recipe), "coco_url"]
        found = reader.rows("annotations", self.file, len(wanted), wanted, recipe.encoding)
        head: list[Any] = []
        name = ""
        while not name and (row := next(found, None)):
            head.append(row)
            name = "" if isinstance(row, Flaw) else row[0] or ""
        folders = [recipe.images_in(self.file.parent)] if recipe.image_folder else self._folders()
        here = next((folder for folder in folders if _image_there(folder, name)), None)
        return merged(self._rows(recipe, here or folders[0], here is None, chain(head, found)))

    def _rows(self, recipe: SourceRecipe, folder: Path, absent: bool, found: Iterator[Any]) -> Iterator[ListRow]:
        may = self.policy(recipe)
        for number, row in enumerate(found, 1):
            values = row
            if not isinstance(row, Flaw):
                *values, url = row
                name = values[0]
                if absent and url:
                    values[0] = url
                elif name and not name.lower().endswith(IMAGES) and not PLACED.match(name):
                    beside = file_beside(folder, name)
                    values[0] = beside if may.refusal(beside) else _image_there(folder, name) or beside
            yield listed_row(str(self.file), number, values, may, partial(file_beside, folder))

    def _folders(self) -> list[Path]:
        """Returns where the images may lie: beside the file, and in COCO's layout beside the folder of annotations."""
        own, folder = Path(self.own), self.file.parent
        split = self.file.stem.rpartition("_")[2]  # train2017 of captions_train2017.json
        folders = [folder, folder / "images", own / split, own / "images" / split, own / "images", own]
        return list(dict.fromkeys(folders))

    def caption_place(self, recipe: SourceRecipe) -> str:
        return f"JSON files of {KINDS} are read; a conversation has a caption if it has one answer"


def _image_there(folder: Path, name: str) -> str:
    """Returns the name of an image in a folder, of which kohya's metadata leave the suffix out; "" for none."""
    with suppress(ValueError):  # a NUL
        names = (name, *(f"{name}{suffix}" for suffix in IMAGES))
        return next((each for each in names if name and os.path.isfile(folder / each)), "")
    return ""
