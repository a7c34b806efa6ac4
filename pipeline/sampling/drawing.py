"""Opens a bundle in this process and draws images of captions with it."""

from __future__ import annotations

import dataclasses
import io
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.cascade import UnCLIP
from models.sampling_config import BASE
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.device import OutOfMemory, choose_device, memory_for
from pipeline.graph.resources import cores
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress, counted
from pipeline.sampling.recipe import ImageRecipe
from pipeline.store.records import materialise, put_blob

log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Sample:
    """Holds a caption's image as PNG, its base image of 64 px, and the settings that it was drawn with.

    Both images carry their recipes.
    """

    caption: str
    seed: int
    settings: Mapping[str, Any]
    image: bytes
    base: bytes


def make_sample(unclip: UnCLIP, caption: str, seed: int, options: Mapping[str, Any], bundle: str) -> Sample:
    """Draws one image with the bundle of a key, showing progress over all steps of all models.

    Raises ValueError for an option that is out of range.
    """
    settings = dataclasses.asdict(unclip.sampling_with(dict(options)))
    steps = prior_steps(unclip, settings, settings["prior"]) + decode_steps(unclip, settings)
    with Progress(f"sampling {caption[:40]!r}", steps, "steps") as progress:
        generation = unclip.generate([caption], [seed], lambda stage, *_: progress.advance(1, stage), **options)
    recipe = ImageRecipe(caption=caption, seed=seed)
    base = generation.images[min(generation.images)]
    images = [
        png_with_text(pixels[0].numpy(), recipe.drawn({**settings, "size": size}, bundle).chunks())
        for pixels, size in ((generation.image, settings["size"]), (base, BASE))
    ]
    return Sample(caption, seed, settings, *images)


def prior_steps(unclip: UnCLIP, settings: Mapping[str, Any], prior: str) -> int:
    """Returns the number of progress reports of the prior "ar" or "diffusion" for one batch."""
    return settings["prior_steps"] if prior == "diffusion" or unclip.ar_prior is None else unclip.ar_prior.codes


def decode_steps(unclip: UnCLIP, settings: Mapping[str, Any]) -> int:
    """Returns the number of progress reports of decoder and upsamplers for one batch."""
    return sum(settings[f"{name}_steps"] for name in ("decoder", *unclip.upsamplers(settings["size"])))


def png_with_text(pixels: np.ndarray, text: Mapping[str, str], level: int = 6) -> bytes:
    """Returns uint8 [h, w, 3] as a PNG file with text chunks, compressed with a level of zlib."""
    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", pnginfo=info, compress_level=level)
    return out.getvalue()


def open_bundle(folder: str | Path, device: str = "auto") -> UnCLIP:
    """Loads a bundle to draw with in this process, and says on which device.

    Raises UserError for a device that is not there, and for a bundle that is damaged.
    """
    return read_bundle(folder, drawing_device(device))


def read_bundle(folder: str | Path, device: torch.device) -> UnCLIP:
    """Loads a bundle onto a device. Raises UserError where it is damaged or a part of it is missing."""
    try:
        return UnCLIP.from_folder(folder, device)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(str(e)) from e


@contextmanager
def refusals() -> Iterator[None]:
    """Raises UserError for errors of drawing, such as an option out of range, and for a lack of memory."""
    try:
        with memory_for("drawing"):
            yield
    except ValueError as e:
        raise UserError(str(e)) from e
    except OutOfMemory as e:
        raise UserError(
            "a batch does not fit into memory; ask for fewer images at once, a smaller size, or tile=256, which draws "
            "large images in parts"
        ) from e


def drawing_device(name: str = "auto") -> torch.device:
    """Returns a device of ``choose_device`` to draw on, says which it is, and takes all cores. Raises UserError."""
    device = choose_device(name)
    torch.set_num_threads(cores())  # Ray and job runners lower the number of threads in the environment
    if device.type == "cuda":
        log.info("drawing on %s, %s", device, torch.cuda.get_device_name(device))
    else:
        why = "" if torch.cuda.is_available() else ": torch finds no GPU"
        log.info("drawing on the CPU, %s%s", counted(cores(), "core"), why)
    return device


def publish_samples(ctx: Context) -> Artifact:
    """Draws every caption of the stage's recipe and publishes the images."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        materialise(ctx.store, ctx.inputs["bundle"].blobs, folder)
        unclip = open_bundle(folder)
        key = ctx.inputs["bundle"].key
        samples = [
            make_sample(unclip, text, ctx.recipe.seed + i, {}, key) for i, text in enumerate(ctx.recipe.captions)
        ]
    blobs = {}
    for i, sample in enumerate(samples):
        blobs[f"{i:04d}.png"] = put_blob(ctx.store, sample.image)
        blobs[f"{i:04d}-64.png"] = put_blob(ctx.store, sample.base)
    metrics = {
        "captions": [s.caption for s in samples],
        "seeds": [s.seed for s in samples],
        "settings": samples[0].settings,
    }
    environment = {"device": str(unclip.clip.mean.device)}
    artifact = ctx.publishable(blobs=blobs, ledger=Ledger(kept=len(samples)), metrics=metrics, environment=environment)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)
