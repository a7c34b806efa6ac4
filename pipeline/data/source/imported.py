"""Reads embeddings that clip-retrieval or LAION have made where they lie: pairs without images, for the priors.

A folder of clip-retrieval's layout has parts numbered N: img_emb/img_emb_N.npy and text_emb/text_emb_N.npy, [n, d]
each, and metadata/metadata_N.parquet of n rows. Every machine has to reach it under the same path.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from pipeline.data.fetch.references import part_of
from pipeline.data.source.columns import Flaw
from pipeline.data.source.parsers.npy import KINDS
from pipeline.data.source.reader import ListReader
from pipeline.errors import UserError
from pipeline.local import EMBEDDING, Outside, PathPolicy, is_embedding, open_local, reason_of

NAMES = ("img_emb", "text_emb")


def metadata_parts(folder: Path, reach: PathPolicy, reader: ListReader) -> list[tuple[str, Path]]:
    """Returns the number of each part, as its files spell it, and its Parquet file, by rising number.

    Raises:
        UserError: if the folder has no part, or one whose files do not belong together.
    """
    numbers = {m[1] for file in folder.glob("*/*") if (m := re.fullmatch(r"\w+_(\d+)\.(?:npy|parquet)", file.name))}
    if not numbers:
        raise UserError(f"source {folder}: it has no metadata_N.parquet; name a folder that clip-retrieval has written")
    found = [(part, folder / f"metadata/metadata_{part}.parquet") for part in sorted(numbers, key=int)]
    for part, file in found:
        files = [_file(folder, name, part) for name in NAMES]
        if missing := [each for each in (file, *files) if not each.is_file()]:
            raise UserError(f"source {missing[0]}: no such file; every part needs metadata and both embeddings")
        try:
            shapes = [_open(each, reach, reader).shape for each in files]
            counted = list(reader.rows("count", file, 1, within=reach))
            rows = int(counted[0][0]) if isinstance(counted[0], list) else 0
        except Outside as e:
            raise UserError(f"source {e.filename}: a link {e.strerror}; add its target to source.roots") from None
        except (OSError, ValueError) as e:
            raise UserError(f"source {folder}: part {part} cannot be read ({str(e).splitlines()[0]})") from None
        if shapes[0] != shapes[1] or shapes[0][0] != rows:
            raise UserError(
                f"source {folder}: part {part} has image embeddings {shapes[0]}, text embeddings {shapes[1]} and "
                f"{rows} rows of metadata; they describe different pairs"
            )
    return found


def embedding_reference(folder: Path, part: str, row: int, url: str) -> str:
    """Returns a row of a part as an image reference; ``url`` is the image's, "" where its metadata name none."""
    return f"{EMBEDDING}{quote(os.fsencode(folder))}?part={part}&row={row}" + (f"#{quote(url, safe='')}" if url else "")


def imported_url(reference: str) -> str:
    """Returns the URL of the image of which an embedding was made, "" of other references."""
    return unquote(reference.partition("#")[2]) if is_embedding(reference) else ""


def read_imported(references: Sequence[str], within: PathPolicy | None = None) -> list[np.ndarray | str]:
    """Returns for each reference the image and the text embedding, fp32 [2, d] as stored.

    In place of embeddings that cannot be read stands the reason.
    """
    opened: dict[tuple[str, str], list[np.memmap] | str] = {}
    result: list[np.ndarray | str] = []
    with ListReader() as reader:
        for reference in references:
            place = _place(reference)
            if place is None:
                result.append("unsupported_reference")
                continue
            folder, part, row = place
            if (folder, part) not in opened:
                try:
                    opened[folder, part] = [_open(_file(Path(folder), name, part), within, reader) for name in NAMES]
                except OSError as e:
                    opened[folder, part] = reason_of(e)
                except ValueError:
                    opened[folder, part] = "missing_file"
            matrices = opened[folder, part]
            if isinstance(matrices, str) or row >= min(map(len, matrices)):
                result.append(matrices if isinstance(matrices, str) else "missing_file")
                continue
            pair = [np.asarray(matrix[row], np.float32) for matrix in matrices]
            sound = (
                all(np.isfinite(vector).all() and vector.any() for vector in pair) and pair[0].shape == pair[1].shape
            )
            result.append(np.stack(pair) if sound else "not_an_embedding")
    return result


def _place(reference: str) -> tuple[str, str, int] | None:
    path, query, numbers = part_of(reference, "row") or ("", {}, [])
    part = query.get("part", "")
    return (path, part, numbers[0]) if part.isdecimal() else None


def _file(folder: Path, name: str, part: str) -> Path:
    return folder / name / f"{name}_{part}.npy"


def _open(path: Path, within: PathPolicy | None, reader: ListReader) -> np.memmap:
    """Returns a matrix that stays on disk. Raises OSError; ValueError for a file that holds another thing."""
    with open_local(path, within) as file:
        header, *_ = [*reader.rows("npy", path, 5, within=within), Flaw("not_an_embedding", f"{path.name} is not read")]
        if isinstance(header, Flaw):
            raise ValueError(header.what)
        kind, order, *numbers = header
        offset, *shape = map(int, numbers)
        if kind not in KINDS or order not in ("C", "F") or min(offset, *shape) < 0:
            raise ValueError(f"{path.name} has a damaged header")
        if offset + math.prod(shape) * np.dtype(kind).itemsize > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path.name} ends before its {tuple(shape)} values")
        return np.memmap(file, kind, "r", offset, tuple(shape), order)
