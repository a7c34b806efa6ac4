"""Rows whose missing embeddings a CLIP makes, once, before a model trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy

import torch

from models.clip import Clip
from models.tokens import CONTEXT
from pipeline.data.embeddings.encoder import Encoder
from pipeline.progress import Progress
from pipeline.training.task import Batch
from unclip.rows import Rows, check_row

MADE_OF = {"image_embedding": "image", "text_embedding": "tokens"}


class EmbeddedRows:
    """Rows with embeddings in memory, fp16 [n, d] as a store has them, beside those that they have themselves."""

    def __init__(self, rows: Rows, made: Batch):
        self.rows, self.made = rows, made

    def __len__(self) -> int:
        return len(self.rows)

    def has(self, name: str) -> bool:
        return name in self.made or self.rows.has(name)

    def take(self, rows: Sequence[int], names: Sequence[str], side: int = 0) -> Batch:
        found = self.rows.take(rows, [name for name in names if name not in self.made], side)
        return found | {name: self.made[name][list(rows)].float() for name in names if name in self.made}


def makes(clip: Clip | None, rows: Rows) -> frozenset[str]:
    """Returns the columns of embeddings that a CLIP can make of rows."""
    made = {name for name, source in MADE_OF.items() if clip is not None and rows.has(source)}
    # The rows' tokens are CLIP's own BPE.
    return frozenset(made - {"text_embedding"} if clip is not None and clip.own_tokenizer is not None else made)


def embedded(
    rows: Rows, columns: Sequence[str], clip: Clip, device: torch.device, batch: int, bf16: bool, progress: bool
) -> Rows:
    """Returns rows with those embeddings among ``columns`` that they lack, made as the stage of embeddings does.

    Args:
        rows: Rows of which ``makes`` has the columns that are lacking.
        columns: Columns that a model reads.
        clip: CLIP that embeds. It stays as it is.
        device: Device that encodes.
        batch: Rows that are encoded at once.
        bf16: True for bf16, where a GPU computes it.
        progress: True for a progress line on stderr.

    Raises:
        UserError: For images of another size than CLIP reads, and for a row without image or caption.
    """
    names = [name for name in columns if name in MADE_OF and not rows.has(name)]
    if not names:
        return rows
    read, side = [MADE_OF[name] for name in names], clip.image_size
    for name, column in rows.take([0], read, side).items():
        check_row("CLIP", name, column[0], (3, side, side) if name == "image" else (CONTEXT,))
    bf16 = bf16 and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    encoder = Encoder(deepcopy(clip).eval().to(device), batch, bf16)
    made = {name: torch.empty(len(rows), clip.embed_dim, dtype=torch.float16) for name in names}
    # Convolutions in TF32 would differ by more than rounding.
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        Progress("embeddings", len(rows), "rows") if progress else nullcontext() as line,
    ):
        for start in range(0, len(rows), batch):
            places = range(start, min(start + batch, len(rows)))
            found = rows.take(places, read, side)
            under_way = {}
            if "image_embedding" in made:
                under_way["image_embedding"] = encoder.images(found["image"].permute(0, 2, 3, 1).numpy())
            if "text_embedding" in made:
                under_way["text_embedding"] = encoder.texts(found["tokens"].numpy())
            for name, fetch in under_way.items():
                made[name][start : places.stop] = torch.from_numpy(fetch())
            if line:
                line.advance(len(places))
    return EmbeddedRows(rows, made)
