"""The parts of a shard that are decoded and encoded at once, and the embeddings that are made of them."""

from __future__ import annotations

import hashlib
import json
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.embeddings.scores import Head, load_heads, score_column
from pipeline.data.pairs.decoding import read_pair_pixels
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.imported import read_imported
from pipeline.data.source.rows import read_captions
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import read_table, write_table
from pipeline.graph.workers import ShardOutput, ShardTask, Timed
from pipeline.ledger import Ledger
from pipeline.local import is_embedding
from pipeline.parse import ContentFile
from pipeline.progress import Steps
from pipeline.store import Store
from pipeline.store.records import materialise, read_blob

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED_CAPTIONS = 16  # the first ones of a row, so that a text file of 10,000 lines is not a trap
READ_BYTES = 64 << 20  # of images as they are stored, in memory at once
T = TypeVar("T")
IndexRow = Mapping[str, Any]
"""A row of a shard's index (see pipeline.data.pairs.row_index)."""


def open_clip_files(store: Store, blobs: Mapping[str, str], opening: Callable[[str], T]) -> T:
    """Returns what ``opening`` makes of a folder with these files of a CLIP. Raises UserError where it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        materialise(store, blobs, folder)
        try:
            return opening(folder)
        except ValueError as e:
            raise UserError(f"embeddings: the CLIP cannot be opened on {socket.gethostname()}: {e}") from e


def _together(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    """Cuts places, in their order, into pieces of at most READ_BYTES, or of one image."""
    piece: list[Place] = []
    size = 0
    for place in places:
        if piece and size + place.size > READ_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(place)
        size += place.size
    if piece:
        yield piece


@dataclass(frozen=True)
class ImageParts:
    """Cuts shards into parts of ``rows`` images, prepares them, and joins what CLIP makes of them.

    Attributes:
        store: store of the shards.
        rows: a multiple of the encoder's batch, so that its batches are the same however a shard is cut.
        size: side of a view, pixels.
        dim: dimension of an embedding.
        context: number of tokens that CLIP reads.
        tokenizer: blobs of CLIP's configuration and its own tokenizer; none for one that reads CLIP's BPE.
        heads: linear heads by the name of their score.
    """

    store: Store
    rows: int
    size: int
    dim: int
    context: int
    tokenizer: Mapping[str, str]
    heads: Mapping[str, Head]

    def count(self, task: ShardTask) -> int:
        """Returns how many parts a shard has; the last ones are empty if some of its rows have no image."""
        return max(1, -(-task.inputs["pairs"].kept // self.rows))

    def prepare(self, task: ShardTask, part: int) -> Timed:
        """Returns what the encoder takes of one part, so that it has to convert nothing.

        "views" are uint8 [n, size, size, 3]. The first part has all captions of the shard: "text" and "more" are
        tokens, int64 [n, context], of first captions and of others, and "cut" says how many of these captions have more
        tokens than CLIP reads.
        """
        steps = Steps()
        _, views = self.read(task, part, steps)
        made: dict[str, Any] = {"views": views}
        if not part:
            with steps("read"):
                captions = captions_to_encode(self.store, task)
            with steps("decode"):
                tokens = [self._tokenize(each) for each in captions]
                made |= {name: each.numpy() for name, each in zip(("text", "more"), tokens, strict=True)}
                made["cut"] = sum(map(self._cut, captions, tokens))
        return made, steps.seconds

    @cached_property
    def _tokenize(self) -> Callable[[Sequence[str]], Tensor]:
        """Returns what makes tokens as the encoder's CLIP does."""
        from models.clip import tokenizer_in
        from models.tokens import tokenize

        return open_clip_files(self.store, self.tokenizer, tokenizer_in) if self.tokenizer else tokenize

    def _cut(self, captions: Sequence[str], tokens: Tensor) -> int:
        """Counts captions with more tokens than CLIP reads; of a tokenizer other than CLIP's BPE none are counted."""
        from models.tokens import cut_captions, text_ends

        if self.tokenizer:
            return 0
        full = (text_ends(tokens) >= self.context).tolist()  # only these need a second look
        return cut_captions([caption for caption, ends in zip(captions, full, strict=True) if ends], self.context)

    def read(self, task: ShardTask, part: int, steps: Steps) -> tuple[Sequence[IndexRow], np.ndarray]:
        """Returns the rows of one part and their views, uint8 [n, size, size, 3]."""
        with steps("read"):
            pictured = [row for row in kept_rows(self.store, task) if not is_embedding(row["url"])]
            rows = pictured[part * self.rows : (part + 1) * self.rows]
            images = task.inputs["pairs"].blobs.get("images")
            views = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        done = 0
        for places in _together([Place.of(row, images) for row in rows]):
            with steps("read"):
                found = read_images(self.store, places)
            with steps("decode"):
                for i, (place, data) in enumerate(zip(places, found, strict=True), done):
                    views[i] = read_pair_pixels(place.key, data, self.size, in_place=place.in_place)
            done += len(places)
            del found, data  # else they lie in memory beside the next ones
        return rows, views

    def join(self, task: ShardTask, made: Sequence[Mapping[str, Any]]) -> ShardOutput:
        """Makes the shard of what the encoder returned for its parts.

        Columns: "key", "image_embedding" and "text_embedding" (float16 [d], unit norm, of the first caption),
        "more_text_embeddings" (a list of them, of the other captions), "similarity" (cosine of the first two), "width"
        and "height" of the stored image in pixels (null where embeddings are imported), "caption_length" (of the first,
        in characters), and "score_NAME" of every head. The count "bf16" is that of rows that were encoded so,
        "cut" that of captions with more tokens than CLIP reads.
        """
        steps = Steps()
        with steps("read"):
            rows = kept_rows(self.store, task)
            captioned = captions_of(self.store, task, rows)
        came = np.array([is_embedding(row["url"]) for row in rows], bool)
        image, text = np.zeros((2, len(rows), self.dim), np.float32)
        image[came], text[came] = self._imported([row for row in rows if is_embedding(row["url"])])
        image[~came] = np.concatenate([part["image"] for part in made])
        text[~came] = made[0]["text"]
        offsets = np.cumsum([0, *(len(captions) - 1 for captions in captioned)], dtype=np.int32)
        columns = {
            "key": pa.array([row["key"] for row in rows], pa.string()),
            "image_embedding": _column(image),
            "text_embedding": _column(text),
            "more_text_embeddings": pa.ListArray.from_arrays(pa.array(offsets), _column(made[0]["more"])),
            "similarity": pa.array((image * text).sum(1).astype(np.float32)),
        }
        columns |= {name: pa.array([row[name] for row in rows], pa.int32()) for name in ("width", "height")}
        columns["caption_length"] = pa.array([len(captions[0]) for captions in captioned], pa.int32())
        columns |= {score_column(name): pa.array(head(image)) for name, head in self.heads.items()}
        with steps("pack"):
            data = write_table(columns, dictionary=False)
        encoded = int((~came).sum())
        counts = {"bf16": encoded} if made[0]["bf16"] and encoded else {}
        counts |= {"cut": made[0]["cut"]} if made[0]["cut"] else {}
        return ShardOutput(Ledger(kept=len(rows)), {"embeddings": data}, counts, steps.seconds)

    def _imported(self, rows: Sequence[IndexRow]) -> tuple[np.ndarray, np.ndarray]:
        """Reads imported image and text embeddings: fp32 [n, d] of unit norm.

        Raises:
            CorruptObject: when they have changed.
            UserError: when they are not of this CLIP's dimension.
        """
        found = read_imported([row["url"] for row in rows])
        for row, pair in zip(rows, found, strict=True):
            if isinstance(pair, str) or hashlib.sha256(pair.tobytes()).hexdigest() != row["sha256"]:
                raise CorruptObject(
                    row["url"], f"the embedding of row {row['key']} has other values than the index says"
                )
            if pair.shape[1] != self.dim:
                raise UserError(
                    f"source: {row['url']} has {pair.shape[1]} dimensions, but clip.weights makes {self.dim}: name "
                    "the CLIP that made them"
                )
        stacked = np.array(found, np.float32).reshape(-1, 2, self.dim)
        unit = stacked / np.linalg.norm(stacked, axis=2, keepdims=True)
        return unit[:, 0], unit[:, 1]


def parts_for(
    store: Store, clip: Mapping[str, str], batch: int, heads: Mapping[str, ContentFile], part_bytes: int
) -> ImageParts:
    """Returns how shards are cut for the CLIP of these blobs, into parts whose views have at most ``part_bytes``.

    A part has a batch at least. Raises UserError for a head that cannot be used.
    """
    config = json.loads(read_blob(store, clip["open_clip_config.json"]))["model_cfg"]
    size, dim, text = config["vision_cfg"]["image_size"], config["embed_dim"], config["text_cfg"]
    size = size if isinstance(size, int) else size[0]
    rows = batch * max(1, part_bytes // (3 * size**2 * batch))
    own = {name: blob for name, blob in clip.items() if not name.endswith(".safetensors")}
    own = own if text.get("hf_tokenizer_name") else {}
    return ImageParts(store, rows, size, dim, text.get("context_length", 77), own, load_heads(store, heads, dim))


def kept_rows(store: Store, task: ShardTask) -> list[IndexRow]:
    """Returns the index rows of the kept pairs of a shard, in order."""
    return [
        row for row in read_table(store, task.inputs["pairs"].blobs["index"]).to_pylist() if row["status"] == "kept"
    ]


def captions_of(store: Store, task: ShardTask, rows: Sequence[IndexRow]) -> list[list[str]]:
    """Returns the captions of rows that are embedded, one or more each; one where embeddings are imported."""
    texts = read_captions(store, task.inputs["captions"])
    return [texts[row["key"]][: 1 if is_embedding(row["url"]) else EMBEDDED_CAPTIONS] or [""] for row in rows]


def captions_to_encode(store: Store, task: ShardTask) -> tuple[list[str], list[str]]:
    """Returns the first captions of the rows of a shard that have an image, and the other captions of all rows."""
    rows = kept_rows(store, task)
    captioned = captions_of(store, task, rows)
    first = [captions[0] for row, captions in zip(rows, captioned, strict=True) if not is_embedding(row["url"])]
    return first, [caption for captions in captioned for caption in captions[1:]]


def _column(embeddings: np.ndarray) -> pa.Array:
    """Returns embeddings [n, d] as a column of float16 lists of one length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.astype(np.float16).reshape(-1)), embeddings.shape[1])


def read_embeddings(store: Store, blob: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Reads the embeddings of one shard.

    Returns:
        Keys [n], embeddings of images and of first captions float16 [n, d], and their similarities float32 [n].
    """
    vectors = ("image_embedding", "text_embedding")
    table = read_table(store, blob, ["key", *vectors, "similarity"])
    flat = [table[name].combine_chunks().values.to_numpy(zero_copy_only=False) for name in vectors]
    matrices = [values.reshape(len(table), values.size // max(len(table), 1)) for values in flat]
    return table["key"].to_pylist(), matrices[0], matrices[1], table["similarity"].to_numpy()
