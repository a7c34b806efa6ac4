"""A folder of embeddings as img2dataset and clip-retrieval leave it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIM = 64  # of the nano preset's CLIP
PARTS = {"2": 14, "10": 25}  # rows by number, in this order although text sorts otherwise
ROWS = sum(PARTS.values())
NAN, ZERO, BARE = 3, 20, 30  # rows that are no embedding, that have no length, that have no caption


def url(row: int) -> str:
    return f"https://pictures.test/{row}.jpg"


def write_parts(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The folder, and the image and text embeddings of all rows, float16 and not of unit norm."""
    image, text = np.random.default_rng(0).normal(size=(2, ROWS, DIM)).astype(np.float16)
    image[NAN, 5], text[ZERO] = np.nan, 0
    start = 0
    for part, rows in PARTS.items():
        own = range(start, start + rows)
        columns = {
            "image_path": [f"{i:09d}" for i in own],
            "caption": ["" if i == BARE else f"caption {i}" for i in own],
            "url": [url(i) for i in own],
            "sha256": ["of the picture"] * rows,
            "license": ["CC0"] * rows,
        }
        for name, matrix in (("img_emb", image), ("text_emb", text)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{name}_{part}.npy", matrix[start : start + rows])
        (folder / "metadata").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"metadata/metadata_{part}.parquet")
        start += rows
    return image, text
