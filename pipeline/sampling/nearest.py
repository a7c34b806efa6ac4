"""The training images nearest to an image: of the rows in the bundle's store, or of those that a bundle carries.

Near training images are evidence of what a model has seen, and no proof of what it used.
"""

from __future__ import annotations

import heapq
import io
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.clip import Clip
from pipeline.data.curation.reading import PairReader
from pipeline.data.fetch.references import shown
from pipeline.data.neighbours.search import FoundRow, look_up, read_clip, searched_with
from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.image import MAX_PIXELS, Storing
from pipeline.data.pairs.row_index import read_images
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, load_artifact, made_with, read_table
from pipeline.progress import Progress
from pipeline.store import Store
from pipeline.store.records import digest, parse_object, said

ROWS, IMAGES = "training/rows.jsonl", "training/images.safetensors"
"""Files of a bundle that carries training images: a row's texts as JSON on a line, and all vectors and images."""
MOST_CARRIED = 10_000  # rows of a bundle
MOST_FOUND = 1000  # rows of one answer
ROWS_BYTES = 256 << 20
NAMED = 10  # licences, in a message
SHOWN = Storing(192, "jpg", 85)  # px of the short side, format and quality of an image that is shown
CARRIED = Storing(128, "jpg", 80)
NO_INDEX = (
    "the rows that this bundle was trained on have no index here: unclip run CONFIG --until index makes it in the "
    "project's store, and unclip export --license takes some of them along"
)


@dataclass(frozen=True)
class TrainingImage:
    """Holds a training image that is near to another one.

    Attributes:
        similarity: Cosine of the two image embeddings.
        caption: Its first caption.
        license: Its licence; None where the list names none.
        attribution: Name to credit; None where the list names nobody.
        url: Its address without a password, such as ``file:///photos/1.jpg``; of a bundle that travelled one on the web
            or None.
        data: A small JPEG of it; None where the row has no image, or one whose licence does not let it be shown.
    """

    similarity: float
    caption: str
    license: str | None
    attribution: str | None
    url: str | None
    data: bytes | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image | None:
        """Returns the small image, or None."""
        return None if self.data is None else Image.open(io.BytesIO(self.data))


class TrainingImages(Protocol):
    """The rows that a bundle was trained on, to search among."""

    @property
    def clip(self) -> Clip:
        """Returns the CLIP of the embeddings, on the CPU."""

    def nearest(self, embedding: np.ndarray, n: int, licenses: Collection[str] = ()) -> list[TrainingImage]:
        """Returns the ``n`` rows nearest to an embedding, fp32 [1, d] of unit norm, nearest first.

        ``licenses``: those of the images that may be shown, all if none is named. Raises CorruptObject for an index
        that is damaged or has gone.
        """


# --- in the store of the bundle ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredImages:
    """The training rows of a bundle in its store.

    Attributes:
        store: Store of the artefacts.
        artifacts: Artefacts that a search reads, by the names that stages declare.
    """

    store: Store
    artifacts: Mapping[str, Artifact]

    @cached_property
    def clip(self) -> Clip:
        """Returns the CLIP that made the embeddings in the index."""
        return read_clip(self.store, self.artifacts["clip"])

    def nearest(self, embedding: np.ndarray, n: int, licenses: Collection[str] = ()) -> list[TrainingImage]:
        """Returns the nearest training rows, as ``TrainingImages.nearest`` says."""
        found = look_up(self.store, self.artifacts, embedding, _checked(n), ("train",))
        return [
            TrainingImage(
                row.similarity,
                row.caption,
                row.license,
                row.attribution,
                shown(row.url),
                self._image(row) if not licenses or row.license in licenses else None,
            )
            for row in found
        ]

    def _image(self, row: FoundRow) -> bytes | None:
        if row.place is None:
            return None
        try:
            [data] = read_images(self.store, [row.place])
        except CorruptObject:
            return None
        return _small(data, SHOWN)


def find_stored(store: Store, bundle: Artifact) -> StoredImages | None:
    """Returns the rows that a bundle's decoder was trained on; None where the store has no index of them.

    The index is one of the decoder's own curated rows, and of embeddings by the bundle's CLIP.
    """
    made_from = bundle.inputs.get("decoder")
    decoder = load_artifact(store, "decoder", made_from) if made_from else None
    if decoder is None:
        return None
    for index in made_with(store, "index", "curation", decoder.inputs["curation"]):
        found = searched_with(store, index)
        if found and found["clip"].key == bundle.inputs["clip"]:
            return StoredImages(store, found)
    return None


def _checked(n: int) -> int:
    if not 1 <= n <= MOST_FOUND:
        raise UserError(f"n is {n}; use 1 to {MOST_FOUND}")
    return n


def web_address(url: str | None) -> str | None:
    """Returns the address of a web page to show: paths of a machine stay private, and so does a secret in a URL."""
    return shown(url) if url and url.startswith(("http://", "https://")) else None


def _small(data: bytes, storing: Storing) -> bytes | None:
    """Returns an image of anybody's as a small JPEG; None where it cannot be decoded."""
    found = shared_decoder().prepare(data, MAX_PIXELS, storing)
    return None if isinstance(found, str) else found.data


# --- in the bundle itself ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarriedRow:
    """Holds the texts of a training row that a bundle carries; see ``TrainingImage``."""

    caption: str
    license: str
    attribution: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class CarriedImages:
    """The training rows that a bundle's folder carries, which may come from anybody."""

    folder: Path

    @cached_property
    def clip(self) -> Clip:
        """Returns the bundle's CLIP."""
        return Clip.from_folder(self.folder / "clip").eval()

    @cached_property
    def rows(self) -> list[CarriedRow]:
        """Returns the texts of all rows. Raises UserError for a damaged file."""
        file = self.folder / ROWS
        try:
            if file.stat().st_size > ROWS_BYTES:
                raise ValueError(f"more than {ROWS_BYTES >> 20} MiB")
            return [parse_object(line, CarriedRow) for line in file.read_bytes().splitlines()]
        except (OSError, ValueError) as e:
            raise _damaged(file, said(e) if isinstance(e, ValueError) else str(e.strerror)) from None

    def nearest(self, embedding: np.ndarray, n: int, licenses: Collection[str] = ()) -> list[TrainingImage]:
        """Returns the nearest carried rows, as ``TrainingImages.nearest`` says. Raises UserError for damaged files."""
        rows, file = self.rows, self.folder / IMAGES
        try:
            with safe_open(file, "np") as tensors:
                vectors, ends = tensors.get_tensor("embeddings"), tensors.get_tensor("ends").tolist()
                images = tensors.get_slice("images")
                if vectors.shape != (len(rows), embedding.shape[1]) or len(ends) != len(rows):
                    raise ValueError(f"{vectors.shape[0]} rows of {vectors.shape[1:]}, and {ROWS} has {len(rows)}")
                cosines = vectors.astype(np.float32) @ embedding[0]
                found = []
                for i in np.argsort(-cosines, kind="stable")[: _checked(n)].tolist():
                    shows = not licenses or rows[i].license in licenses
                    data = bytes(images[ends[i - 1] if i else 0 : ends[i]]) if shows else b""
                    found.append((float(cosines[i]), rows[i], data))
        except (OSError, SafetensorError, ValueError, TypeError, IndexError) as e:
            raise _damaged(file, str(e)) from None
        return [
            TrainingImage(
                cosine,
                row.caption,
                row.license,
                row.attribution,
                web_address(row.url),
                _small(data, SHOWN) if data else None,
            )
            for cosine, row, data in found
        ]


def find_carried(folder: Path) -> CarriedImages | None:
    """Returns the training rows that a bundle's folder carries; None where it carries none."""
    return CarriedImages(folder) if (folder / ROWS).is_file() else None


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file}: damaged ({why}); fetch the bundle again")


def carry(training: StoredImages, licenses: Collection[str], folder: Path) -> tuple[int, int]:
    """Writes training rows of some licences into a bundle's folder, each with a small image, and counts them.

    Of more than MOST_CARRIED rows it takes those whose hashes are smallest, so a row stays when others are appended.

    Returns:
        Number of rows that are carried, and number of training rows of these licences.

    Raises:
        UserError: No training row has one of these licences.
    """
    reader = PairReader(training.store, training.artifacts, "train")
    count, others = 0, set[str]()

    def candidates() -> Iterator[tuple[str, int, int]]:
        nonlocal count
        for position in range(reader.shards):
            blob = reader.rows[position].blobs["index"]
            place = -1
            for row in read_table(training.store, blob, ["key", "status", "split", "license"]).to_pylist():
                if row["status"] == "kept" and row["split"] == "train":
                    place += 1
                    if row["license"] in licenses:
                        count += 1
                        yield digest(row["key"]), position, place
                    elif len(others) < NAMED:
                        others.add(row["license"] or "none")

    chosen = heapq.nsmallest(MOST_CARRIED, candidates())
    if not chosen:
        named = ", ".join(sorted(others)) or "no row"
        raise UserError(f"no training image has the licence {' or '.join(sorted(licenses))}; the list names {named}")
    places: dict[int, list[int]] = {}
    for _, position, place in chosen:
        places.setdefault(position, []).append(place)
    rows, images, ends = [], bytearray(), []
    vectors: list[Any] = []
    with Progress("training images", len(chosen), "rows") as progress:
        for position in sorted(places):
            for pair in (pair for group in reader.read(position, sorted(places[position])) for pair in group):
                images += (_small(pair.data, CARRIED) or b"") if pair.data is not None else b""
                ends.append(len(images))
                rows.append(CarriedRow(pair.caption, pair.license or "", pair.attribution, web_address(pair.url)))
                vectors.append(pair.image_embedding)
                progress.advance(1)
    file = folder / ROWS
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{json.dumps(asdict(row), ensure_ascii=False)}\n" for row in rows), "utf-8")
    tensors = {
        "embeddings": np.stack(vectors).astype(np.float16),
        "images": np.array(memoryview(images)),
        "ends": np.array(ends, np.int64),
    }
    save_file(tensors, folder / IMAGES)
    return len(rows), count
