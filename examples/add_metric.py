"""Adds a metric to every evaluation: are drawn images as colourful as the real ones that they are drawn for?

    python examples/add_metric.py IMAGE ...

prints how colourful images are. A package that has this file as ``add_metric.py`` names it in its pyproject.toml, and
is installed beside unclip:

    [project.entry-points."unclip.metrics"]
    colourfulness = "add_metric:COLOURFULNESS"

Its claim then stands in the table of ``unclip run``, in the report and in evaluation.json, and ``unclip release
promote`` judges it. docs/extend.md explains the parts.
"""

import sys

import numpy as np
import torch
from PIL import Image

from unclip.metrics import DRAWERS, Figure, Metric, SplitRows, Subject


def colourfulness(images: torch.Tensor) -> torch.Tensor:
    """Returns the colourfulness of images uint8 [n, h, w, 3], fp64 [n]: M3 of Hasler and Suesstrunk, 2003."""
    red, green, blue = images.double().flatten(1, 2).unbind(-1)
    opponents = (red - green, (red + green) / 2 - blue)
    spread = sum(x.var(1, unbiased=False) for x in opponents) ** 0.5
    mean = sum(x.mean(1) ** 2 for x in opponents) ** 0.5
    return spread + 0.3 * mean


def measure(subject: Subject, drawn: torch.Tensor, rows: SplitRows) -> list[Figure]:
    """Returns how far drawn images are from their own real image, beside how far from that of another row."""
    real = colourfulness(rows.batch["image"].permute(0, 2, 3, 1).cpu())
    made = colourfulness(drawn)
    return [subject.compare(rows, (made - real).abs(), (made - real[rows.other.cpu()]).abs())]


COLOURFULNESS = Metric(
    name="colourfulness",
    text="Drawn images are as colourful as their real images: nearer to them than to another row's",
    models=DRAWERS,
    needs=("drawn", "images"),
    measure=measure,
    better="below",
    together=True,
)

if __name__ == "__main__":
    for path in sys.argv[1:]:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        print(f"{float(colourfulness(image[None])):.1f}  {path}")
