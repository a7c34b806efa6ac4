"""The rows that a program trains on: columns in memory, or a dataset that is read row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.tokens import tokenize
from models.view import view
from pipeline.data.curation.reading import VECTORS, Pair
from pipeline.errors import UserError
from pipeline.training.task import Batch

COLUMNS = ("image", "tokens", "image_embedding", "text_embedding")
READERS = 8  # rows of a dataset that are read at once
# What the columns are called in a dataset's rows, the first that is there.
NAMES = {"image": ("image", "img", "jpg", "png", "webp"), "captions": ("captions", "caption", "text", "txt")}


class Rows(Protocol):
    """Rows that have a number each, from 0."""

    def __len__(self) -> int: ...

    def has(self, name: str) -> bool:
        """Returns whether rows have a column, of "image", "tokens", "image_embedding", "text_embedding"."""

    def take(self, rows: Sequence[int], names: Sequence[str], side: int = 0) -> Batch:
        """Returns columns of some rows: images as uint8 [n, 3, side, side], tokens int64 [n, 77], embeddings fp32.

        Raises UserError for a row that has no such column.
        """


def open_rows(data: Any) -> Rows:
    """Returns the rows of a mapping of columns, or of a dataset. Raises UserError for anything else."""
    if isinstance(data, Mapping):
        return _Columns(data)
    if isinstance(data, torch.utils.data.DataLoader):
        raise UserError("data is a DataLoader, but the recipe chooses rows and batches; pass its .dataset")
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise UserError(f"data is a {type(data).__name__}, without len() or indexing; pass list(data)")
    if not len(data):
        raise UserError("data has no rows")
    return _Dataset(data)


def check_row(reader: str, name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises UserError for a row's column of another shape or type than its reader takes."""
    if tuple(value.shape) != shape:
        wanted = ", ".join(map(str, shape))
        raise UserError(f"{name} has rows of shape {list(value.shape)}; {reader} reads [{wanted}]")
    if name == "image" and value.dtype != torch.uint8:
        raise UserError(f"image is {value.dtype}; give uint8 from 0 to 255")
    if name == "tokens" and value.is_floating_point():
        raise UserError(f"tokens are {value.dtype}; give whole numbers, such as models.tokens.tokenize makes")


class _Columns:
    """Columns in memory, of one length."""

    def __init__(self, data: Mapping[str, Any]):
        given = dict(data)
        if "captions" in given:
            captions = list(given["captions"])
            odd = next((row for row, caption in enumerate(captions) if not isinstance(caption, str)), None)
            if isinstance(given.pop("captions"), str) or odd is not None:
                which = "" if odd is None else f"row {odd} has no caption: "
                raise UserError(f"captions: {which}give a list of strings, one per example")
            given["tokens"] = tokenize(captions)
        self.columns = {name: _tensor(name, given[name]) for name in COLUMNS if name in given}
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            sizes = ", ".join(f"{name} {rows:,}" for name, rows in lengths.items())
            raise UserError(f"columns have different numbers of rows: {sizes}")
        self.rows = max(lengths.values(), default=0)

    def __len__(self) -> int:
        return self.rows

    def has(self, name: str) -> bool:
        return name in self.columns

    def take(self, rows: Sequence[int], names: Sequence[str], side: int = 0) -> Batch:
        return {name: self.columns[name][list(rows)] for name in names}


class _Dataset:
    """A dataset with len and index, whose rows are mappings, a Pair, or (image, caption)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.readers = ThreadPoolExecutor(READERS, "row")
        self.first = self._values(0)

    def __len__(self) -> int:
        return len(self.dataset)

    def has(self, name: str) -> bool:
        # A value of None counts: reading it says which row has none.
        there = any(each in self.first for each in NAMES.get(name, (name,)))
        return there or (name == "tokens" and self.has("captions"))

    def take(self, rows: Sequence[int], names: Sequence[str], side: int = 0) -> Batch:
        read = list(self.readers.map(lambda row: self._row(row, names, side), rows))
        try:
            return {name: torch.stack([row[name] for row in read]) for name in names}
        except RuntimeError as e:
            raise UserError(f"rows {min(rows)} to {max(rows)} of the data differ in shape ({e})") from None

    def _values(self, number: int) -> Mapping[str, Any]:
        row = self.dataset[number]
        if isinstance(row, Pair):
            return _PairValues(row)
        if isinstance(row, Mapping):
            return row
        if isinstance(row, tuple | list) and len(row) == 2:
            return {"image": row[0], "captions": row[1]}
        raise UserError(f"row {number} of the data is a {type(row).__name__}; give a mapping, or (image, caption)")

    def _find(self, values: Mapping[str, Any], name: str) -> Any:
        found = (values[each] for each in NAMES.get(name, (name,)) if each in values)
        return next((value for value in found if value is not None), None)

    def _row(self, number: int, names: Sequence[str], side: int) -> Batch:
        values = self.first if number == 0 else self._values(number)
        return {name: self._column(number, values, name, side) for name in names}

    def _column(self, number: int, values: Mapping[str, Any], name: str, side: int) -> Tensor:
        where = f"row {number} of the data"
        value = self._find(values, name)
        if name == "tokens" and value is None:
            captions = self._find(values, "captions")
            caption = captions[0] if isinstance(captions, list | tuple) and captions else captions
            if not isinstance(caption, str):
                raise UserError(f"{where} has no caption: give a string, or a list of them, as caption")
            return tokenize([caption])[0]
        if value is None:
            has = ", ".join(str(each) for each, value in values.items() if value is not None)
            raise UserError(f"{where} has no {name}; it has {has or 'nothing'}")
        if name == "image":
            return torch.tensor(view(_image(where, value), side)).permute(2, 0, 1)
        column = _tensor(f"{where}: {name}", value)
        return column.float() if name.endswith("_embedding") else column


class _PairValues(Mapping[str, Any]):
    """A Pair as a mapping of what it has, which decodes its image only when that is asked for."""

    def __init__(self, pair: Pair):
        self.pair = pair
        vectors = [name for name in VECTORS if getattr(pair, name) is not None]
        self.names = [*(["image"] if pair.data else []), "captions", *vectors]

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.pair.captions or [""] if name == "captions" else getattr(self.pair, name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _image(where: str, value: Any) -> Image.Image:
    """Returns an image given as PIL's, as an array uint8 [h, w, 3] or as a tensor uint8 [3, h, w]."""
    if isinstance(value, Image.Image):
        return value
    pixels = value.permute(1, 2, 0).numpy() if isinstance(value, Tensor) and value.ndim == 3 else np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        shape = f"{pixels.dtype} {list(pixels.shape)}"
        raise UserError(f"{where}: image is {shape}; give PIL's, an array uint8 [h, w, 3] or a tensor uint8 [3, h, w]")
    return Image.fromarray(pixels)


def _tensor(name: str, column: Any) -> Tensor:
    try:
        found = torch.as_tensor(column)
    except (ValueError, TypeError, RuntimeError) as e:
        raise UserError(f"{name}: not numeric, or rows differ in length ({e})") from None
    if not found.ndim:
        raise UserError(f"{name} is a single number; give one row per example")
    return found.float() if name.endswith("_embedding") else found
