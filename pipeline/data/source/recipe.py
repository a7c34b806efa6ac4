"""The recipe of the source."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat

from pipeline.data.source.parsers.encoding import check_encoding
from pipeline.local import PathPolicy

MOST_LISTS = 500  # each of them is a segment


@dataclass(frozen=True)
class SourceRecipe:
    """Says where pairs come from, and which rows are held out.

    Attributes:
        paths: Lists, in order: ``.parquet``, ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.xlsx``, a folder of images
            and texts, an imagefolder, a webdataset ``.tar``, a folder of tables or tars, a folder of tables on S3, a
            dataset of the Hugging Face Hub as ``hf://datasets/OWNER/NAME@COMMIT``, embeddings of clip-retrieval, or
            drawings made with the ``demo`` extra: ``drawings:full`` (6,600), ``drawings:tiny`` (1,500),
            ``drawings:nano`` (320), ``drawings:flawed`` (nine rows, each rejected for another reason).
        image_column: Column of image references: http(s), s3 or file.
        caption_column: Column of captions: a string or a list of strings.
        group_column: Column of groups, whose rows share a split unless the list sets it; optional in the list.
        split_column: Column of splits: ``train``, ``validation`` or ``test``; optional in the list.
        hash_column: Column of the expected sha256 of the fetched bytes; optional in the list.
        encoding: Encoding of text that is neither UTF-8 nor has a byte order mark, such as ``cp1252`` from a Western
            European Excel.
        image_folder: Folder to which image paths are relative, instead of the list's own.
        caption_lines: ``true`` makes each line of a text beside an image a caption; otherwise each paragraph is one.
        shard_rows: Rows per shard, the unit of work, which an interruption repeats.
        validation: Share held out if the list has no split, by a hash of the group or else of the reference.
        test: Share of the test split, likewise; no training and no codec reads it.
        roots: Folders, tars and ``s3://BUCKET`` or ``s3://BUCKET/PREFIX`` that lists may name, besides their own files.
    """

    # A recipe and not a setting of the run: a row that is refused changes what is made. Keys count what was read, so
    # a new root makes only those shards again that have such rows.

    paths: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_LISTS)]
    image_column: str = "url"
    caption_column: str = "caption"
    group_column: str = "group"
    split_column: str = "split"
    hash_column: str = "sha256"
    encoding: str = ""
    image_folder: str = ""
    caption_lines: bool = False
    shard_rows: Annotated[int, Field(ge=1, le=10_000)] = 1000
    validation: NonNegativeFloat = 0.02
    test: NonNegativeFloat = 0.02
    roots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test: these shares leave no rows to train on; lower one of them")
        if self.encoding:
            check_encoding(self.encoding)
        PathPolicy.of((), self.roots)

    def images_in(self, folder: Path) -> Path:
        """Returns the folder from which relative paths of images count, for a list that lies in this one."""
        return Path(os.path.expanduser(self.image_folder)).absolute() if self.image_folder else folder

    def split_of(self, value: str) -> str:
        """Returns 'test', 'validation' or 'train', by a group or a reference alone: a split never moves."""
        share = hash_share(value)
        return "test" if share < self.test else "validation" if share < self.test + self.validation else "train"

    @property
    def splitting(self) -> tuple[float | str, ...]:
        """Returns what decides which rows are held out, beside the list itself."""
        return self.validation, self.test, self.image_column, self.group_column, self.split_column


def hash_share(value: str) -> float:
    """Returns the place of a group or a reference in [0, 1], by which it is held out or not."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64
