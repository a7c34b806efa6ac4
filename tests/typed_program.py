# mypy: disallow-untyped-calls, disallow-any-generics, disallow-incomplete-defs, warn-return-any, no-implicit-reexport
# mypy: strict-equality, warn-redundant-casts, enable-error-code="arg-type,assignment,call-overload,index,operator"
# mypy: enable-error-code="union-attr,list-item,misc,return-value,dict-item"
"""A program of a user as mypy sees it; nothing runs it. ``make check`` fails where a type of ours is lost, and where

a mistake is not found: its comment would be unused.
"""

from pathlib import Path

import numpy as np
from PIL import Image

import unclip


def draw(folder: Path) -> Image.Image:
    model: unclip.Model = unclip.load(folder, device="cpu")
    heart: Image.Image = model.generate("a red heart", seed=3, size=256, steps=20)
    several: list[unclip.DrawnImage] = model.generate(["a cat", "a dog"], seed=[1, 2], prior="ar")
    more = model.generate("a cat", n=4, guidance_scale=2.0, progress=False)
    return several[0] if len(more) == 4 else heart


def change(model: unclip.Model, image: unclip.ImageLike, mask: Path) -> list[unclip.DrawnImage]:
    varied = model.vary(image, n=2, eta=0.5, decoder_sampler="ddim")
    between = model.interpolate(varied[0], np.zeros((64, 64, 3), np.uint8), n=5)
    changed = model.change(image, "a cat", "an angry cat", strength=0.4)
    part = model.inpaint(image, mask, "a cat with a hat", seed=7)
    return [*between, *changed, *part, *model.redraw(varied[0], [image], seed=8)]


def recipe(image: unclip.DrawnImage) -> str:
    found = image.recipe
    return f"{found.caption} {found.seed + 1} {found.options.get('size')}"


def cosines(model: unclip.Model, image: Image.Image) -> np.ndarray:
    vectors: np.ndarray = model.embed([image])
    found: np.ndarray = vectors @ model.embed("a cat")
    return found


def train(config: str) -> int:
    project = unclip.open(config, "decoder.seed=1")
    plan: unclip.RunPlan = project.plan(until="curation")
    result = project.run(tell=print) if plan.stale else None
    pairs: unclip.Pairs = project.pairs("train", embeddings=True)
    for pair in pairs:
        print(pair.caption.upper(), pair.image.size)
    return 0 if result is None else len(result.artifacts)


def mistakes(model: unclip.Model, project: unclip.Project) -> None:
    model.generate("a cat", sise=64)  # type: ignore[call-overload]
    model.generate("a cat", prior="arr")  # type: ignore[call-overload]
    model.generate(7)  # type: ignore[call-overload]
    model.vary("a.png", seeds=3)  # type: ignore[call-arg]
    model.vary("a.png", n="2")  # type: ignore[arg-type]
    model.generate("a cat").resise((8, 8))  # type: ignore[attr-defined]
    project.pairs("trian")  # type: ignore[arg-type]
    print(project.plan().stail, project.run().artefacts)  # type: ignore[attr-defined]
    unclip.load(folder="out")  # type: ignore[call-arg]
