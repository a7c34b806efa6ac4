"""Reads webdataset tars, whose images are used where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.fetch.references import part_of
from pipeline.data.source.columns import Flaw
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow, SplitFiles, file_fingerprint, flawed


def is_tar(path: str) -> bool:
    """Returns whether a path ends as the lists do that are read as tars."""
    return path.lower().endswith(".tar")


def tar_place(reference: str) -> dict[str, Any] | None:
    """Returns path, offset and size of a member of a tar (see tar_reference), or None if it does not say them."""
    found = part_of(reference, "offset", "size")
    if found is None or not is_tar(found[0]):
        return None
    path, _, (offset, size) = found
    return {"tar": path, "offset": offset, "size": size}


class TarFiles(SplitFiles):
    """A webdataset tar, or a folder of them."""

    kind, suffixes = "tars", (".tar",)
    read_share = 0.01  # the rest are images

    @property
    def own(self) -> str:
        return str(self.file)

    def fingerprint(self) -> Any:
        return super().fingerprint() if self.file.is_dir() else ["tar", *file_fingerprint(self.file)]

    def file_rows(self, file: Path, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the samples: members that share a name up to the first dot, as in webdataset; no hidden ones.

        One that has no member with the name of an image is a row without a reference.
        """
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
