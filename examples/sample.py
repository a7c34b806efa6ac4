"""Draws captions, varies an image and goes from one image to another.

    python examples/sample.py [WHERE]

WHERE is a run's output folder, a project's YAML file or a bundle's folder; by default the newest run under out/.
"""

import sys
from pathlib import Path

import unclip

to = Path("out/examples")
to.mkdir(parents=True, exist_ok=True)
model = unclip.load(*sys.argv[1:2])
print(model)

monster, cactus = model.generate(["a square yellow monster", "a cactus in a pink bowl"], seed=7)
monster.save(to / "monster.png")
cactus.save(to / "cactus.png")

for i, image in enumerate(model.vary(monster, n=2, size=64)):
    image.save(to / f"monster-varied-{i}.png")

first, *between = model.interpolate(monster, cactus, n=6, size=64)
first.save(to / "monster-to-cactus.webp", save_all=True, append_images=between, duration=200, loop=0)

# CLIP's cosine of each image (a row) to each caption.
print((model.embed([monster, cactus]) @ model.embed(["a square yellow monster", "a cactus in a pink bowl"]).T).round(3))
