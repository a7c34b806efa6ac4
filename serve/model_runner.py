"""Draws the work of requests with one bundle, and emits each image as it is made. Knows neither HTTP nor Ray."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.cascade import Generation, Inversion, UnCLIP
from models.comparison import priors_of
from models.pixels import to_uint8
from models.sampling_config import STEPS
from models.tokens import text_context
from models.view import view
from pipeline.data.embeddings.scores import Head
from pipeline.sampling.drawing import png_with_text
from pipeline.sampling.operations import draw_rows, find_latents, made_smaller, resolve_sampling, with_images
from pipeline.sampling.recipe import ImageRecipe, Row, drawn_side
from serve.bundle import sides
from serve.work import Work

STEP_S = 0.2  # between two reports of steps
PNG_LEVEL = 1  # of zlib: a fifth of the default's time for files that are a tenth larger
Emit = Callable[[tuple[Any, ...]], None]
Encode = Callable[[Callable[[], None]], Any]


class DrawingCancelled(Exception):
    """Raised inside a drawing that no client waits for any longer."""


class ModelRunner:
    """Draws with one bundle, ``batch`` images at once.

    ``judges`` are linear heads for "prompt" and "image" with the highest score that each lets pass. ``slowest`` is the
    longest time between two events of ``warm_up``, in seconds.
    """

    slowest = 0.0

    def __init__(self, key: str, unclip: UnCLIP, batch: int, judges: Mapping[str, tuple[Head, float]] | None = None):
        self.key, self.unclip, self.batch, self.judges = key, unclip, batch, judges or {}

    def describe(self) -> dict[str, Any]:
        """Returns what clients may know of the bundle."""
        return {
            "bundle": self.key,
            "sides": sides(self.unclip),
            "priors": [option for _, option in priors_of(self.unclip)],
            "sampling": dataclasses.asdict(self.unclip.sampling),
            "timesteps": self.unclip.decoder.config.steps,
            "context": text_context(self.unclip),
            "device": str(self.unclip.clip.mean.device),
        }

    def warm_up(self) -> None:
        """Draws one image of the largest side in as few steps as there may be, so that the first request is quick."""
        least = dict.fromkeys(STEPS.values(), 2)
        times = [time.monotonic()]
        recipe = ImageRecipe(caption="", options={**least, "size": drawn_side(sides(self.unclip)[-1])})
        work = Work(recipe, recipe.rows)
        self.draw(work, lambda _: times.append(time.monotonic()), lambda: False)
        self.slowest = max(after - before for before, after in pairwise(times))

    def draw(self, work: Work, emit: Emit, stopped: Callable[[], bool], encode: Encode = lambda task: task()) -> None:
        """Draws the images of ``work``. ``encode`` runs what makes a PNG file and emits it, in order, now or later.

        ``emit`` gets ("step", stage, done, steps), ("stage", stage, seconds), and ("partial", row, side, PNG) if the
        work asks for it. For every row it gets ("image", row, PNG, score) or ("withheld", row, why). The score is the
        cosine of image and caption by CLIP. Raises DrawingCancelled at the first step after ``stopped`` returns True,
        and ValueError for what this bundle cannot draw.
        """
        asked = work.recipe
        settings = dataclasses.asdict(resolve_sampling(self.unclip, asked))
        images = [opened(png) for png in work.images]
        named = with_images(asked, images, [each.name for each in asked.images])
        latents: list[Inversion] = []
        for start in range(0, len(work.rows), self.batch):
            rows = work.rows[start : start + self.batch]
            progress = _ProgressEvents(
                emit, stopped, encode, start, replace(work, partial=work.partial and not self.judges)
            )
            latents = latents or find_latents(self.unclip, asked, images, progress)  # found once
            made = draw_rows(self.unclip, asked, rows, images, latents, progress)
            scores, withheld = self._judged(made, rows)
            for i, row in enumerate(rows):
                if withheld[i]:
                    emit(("withheld", start + i, f"the {withheld[i]} is refused by this server's rules"))
                    continue
                recipe = named.of(row).drawn(settings, self.key)
                encode(partial(_emit_image, emit, start + i, made.image[i].numpy(), asked.side, recipe, scores[i]))

    def _judged(self, made: Generation, rows: Sequence[Row]) -> tuple[list[float | None], list[str | None]]:
        """Returns the cosine of each image and its caption, None where it has none, and what of it is refused."""
        clip = self.unclip.clip
        device = clip.mean.device
        with torch.no_grad():
            views = [torch.tensor(view(Image.fromarray(x.numpy()), clip.image_size)) for x in made.image]
            images = clip.encode_image(torch.stack(views).permute(0, 3, 1, 2).to(device))
            texts = clip.encode_text(clip.tokenize([row.caption or "" for row in rows]).to(device))
        near = (images * texts).sum(-1).tolist()
        withheld: list[str | None] = [None] * len(rows)
        for what, embeddings in (("prompt", texts), ("image", images)):
            if what in self.judges:
                head, most = self.judges[what]
                above = head(embeddings.cpu().numpy()) > most
                withheld = [what if bad else before for bad, before in zip(above, withheld, strict=True)]
        return [None if row.caption is None else score for row, score in zip(rows, near, strict=True)], withheld


class _ProgressEvents:
    """Turns the progress of models into events, and cancels a drawing that no client waits for."""

    def __init__(self, emit: Emit, stopped: Callable[[], bool], encode: Encode, start: int, work: Work):
        self.emit, self.stopped, self.encode, self.start, self.work = emit, stopped, encode, start, work
        self.said = 0.0
        self.began = time.monotonic()

    def __call__(self, stage: str, done: int, steps: int, estimate: Tensor | None = None) -> None:
        if self.stopped():
            raise DrawingCancelled
        now = time.monotonic()
        if done == steps or now - self.said > STEP_S:
            self.said = now
            self.emit(("step", stage, done, steps))
        if done == steps:
            self.emit(("stage", stage, now - self.began))
            self.began = now
        if self.work.partial and estimate is not None and done == steps and estimate.shape[-1] < self.work.recipe.side:
            pixels = to_uint8(estimate).permute(0, 2, 3, 1).cpu().numpy()
            for i, image in enumerate(pixels):
                self.encode(partial(_emit_partial, self.emit, self.start + i, image))


def _emit_image(emit: Emit, row: int, pixels: np.ndarray, side: int, recipe: ImageRecipe, score: float | None) -> None:
    emit(("image", row, png_with_text(made_smaller(pixels, side), recipe.chunks(), PNG_LEVEL), score))


def _emit_partial(emit: Emit, row: int, pixels: np.ndarray) -> None:
    emit(("partial", row, len(pixels), png_with_text(pixels, {}, PNG_LEVEL)))


def opened(png: bytes) -> Image.Image:
    """Opens a PNG that ``decoding.prepare`` has made."""
    return Image.open(io.BytesIO(png))
