"""Draws faces with captions into a folder, to try docs/your-data.md without images of your own.

    python examples/draw_faces.py FOLDER [COUNT]

writes 0000.png (256 px) and 0000.txt, and so on: 1,000 different faces unless COUNT says otherwise. They are DiceBear's
style Moods (https://www.dicebear.com, CC0 1.0), drawn by the packages of the ``demo`` extra.
"""

import importlib.resources
import json
import random
import sys
from itertools import islice, product
from pathlib import Path

import resvg_py
from dicebear import Avatar, Style

SHAPES = {"circle": "round", "squircle": "square", "wide": "wide", "tall": "tall", "bean": "bean-shaped"}
COLOURS = {
    "#7dd3fc": "sky blue", "#c4b5fd": "lilac", "#f0abfc": "pink", "#fca5a5": "red", "#fdba74": "orange",
    "#fcd34d": "yellow", "#bef264": "lime", "#e2e8f0": "grey",
}  # fmt: skip
GROUNDS = {"#1d4ed8": "blue", "#6d28d9": "purple", "#be123c": "crimson", "#047857": "green", "#1e293b": "black"}
EYES = {
    "bigPupils": "big eyes", "happy": "happy eyes", "closed": "closed eyes", "wink": "a wink", "angry": "angry eyes",
}  # fmt: skip
MOUTHS = {
    "bigSmile": "a big smile", "open": "an open mouth", "frown": "a frown", "wavy": "a wavy mouth", "teeth": "teeth",
    "tongue": "its tongue out",
}  # fmt: skip

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
style = Style(json.loads(importlib.resources.files("dicebear_styles").joinpath("moods.json").read_text("utf-8")))
faces = list(product(SHAPES, COLOURS, GROUNDS, EYES, MOUTHS))
random.Random(0).shuffle(faces)
for i, (shape, colour, ground, eyes, mouth) in enumerate(islice(faces, int(*sys.argv[2:3] or ["1000"]))):
    options: dict[str, object] = {"faceVariant": [shape], "faceColor": [colour], "backgroundColor": [ground]}
    options |= {"eyesVariant": [eyes], "mouthVariant": [mouth], "cheeksProbability": 0}
    options |= {"animationVariant": ["none"], "size": 256}
    svg = Avatar(style, {"seed": "face", **options}).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256, skip_system_fonts=True)
    (folder / f"{i:04d}.png").write_bytes(bytes(png))
    caption = f"a {SHAPES[shape]} {COLOURS[colour]} face with {EYES[eyes]} and {MOUTHS[mouth]}, on {GROUNDS[ground]}"
    (folder / f"{i:04d}.txt").write_text(f"{caption.replace('a orange', 'an orange')}\n")
print(f"{folder}: {len(list(folder.glob('*.png'))):,} faces")
