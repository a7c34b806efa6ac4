"""Reads a project's embeddings, finds the pairs that CLIP thinks fit worst, and looks at one.

python examples/read_embeddings.py [CONFIG]
"""

import sys

import numpy as np

import unclip

project = unclip.open(*(sys.argv[1:2] or ["configs/nano.yaml"]))
project.run(until="curation")  # nothing to do where it is made

table = project.artifact("embeddings").table(columns=["key", "image_embedding", "text_embedding"])
image, text = (np.stack(table[name].to_numpy()).astype(np.float32) for name in table.column_names[1:])
similarity = dict(zip(table["key"].to_pylist(), (image * text).sum(1), strict=True))

pairs = project.pairs("train")
print(pairs)
worst = sorted(pairs, key=lambda pair: similarity[pair.key])[:5]
for pair in worst:
    print(f"{similarity[pair.key]:.3f}  {pair.width} x {pair.height}  {pair.caption}")

# The same pairs for a training of one's own; .shuffle(), .batched() and a DataLoader go on from here.
image, caption = next(iter(pairs.webdataset().shuffle(100).decode("pil").to_tuple("jpg;png;webp", "txt")))
print(image.size, caption)
