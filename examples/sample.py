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

heart, apple = model.generate(["a red heart", "a green apple"], seeds=7)
heart.save(to / "heart.png")
apple.save(to / "apple.png")

for i, image in enumerate(model.vary(heart, count=2, size=64)):
    image.save(to / f"heart-varied-{i}.png")

first, *between = model.interpolate(heart, apple, count=6, size=64)
first.save(to / "heart-to-apple.webp", save_all=True, append_images=between, duration=200, loop=0)

# CLIP's cosine of each image (a row) to each caption.
print((model.embed([heart, apple]) @ model.embed(["a red heart", "a green apple"]).T).round(3))
