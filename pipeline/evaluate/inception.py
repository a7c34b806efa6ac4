"""FID of the drawn images of 64 px, for anyone who has the weights of Inception-v3 that it is defined by.

Features are torchmetrics' own. Its metric is not used: that keeps sums and forgets the rows, while every model here is
compared with the first rows of one real set; and it takes the eigenvalues of a product of covariances, which are
singular for fewer than 2048 images. ``statistics`` has the same distance.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from pipeline.errors import UserError, install
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.images import IMAGES
from pipeline.evaluate.paired import whole
from pipeline.evaluate.quality import named
from pipeline.evaluate.rows import HeldOut
from pipeline.evaluate.statistics import frechet_distance
from pipeline.parse import ContentFile
from pipeline.store import Store
from pipeline.store.content import read_content

WEIGHTS_BYTES = 256 << 20  # the published file has 91 MiB
PACKAGES = ("torchmetrics", "torch-fidelity")
MISSING = f"evaluation.inception needs torch-fidelity: {install('fid')}"
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Inception:
    """The network whose features FID compares."""

    network: nn.Module

    def look(self, images: Tensor) -> Tensor:
        """Returns features of images uint8 [n, s, s, 3], which become 299 px wide: fp32 [n, 2048] on the CPU."""
        device = next(self.network.parameters()).device
        parts = images.permute(0, 3, 1, 2).split(IMAGES)
        return torch.cat([self.network(part.to(device)).cpu() for part in parts])


def load_inception(store: Store, file: ContentFile | None, device: torch.device) -> Inception | None:
    """Returns the network with the weights of ``evaluation.inception``; None for none.

    Raises UserError if a package is missing, or for a file that cannot be read, that has changed since the
    configuration was read, or that holds other weights.
    """
    if file is None:
        return None
    state = _read(store, file)
    weights: Any = io.BytesIO()  # the network unpickles whatever a file holds, so it gets what was read with care
    torch.save(state, weights)
    weights.seek(0)
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
    except ModuleNotFoundError as e:
        raise UserError(MISSING) from e
    except RuntimeError as e:  # by name or shape
        raise UserError(_other(file)) from e
    return Inception(network.to(device))


def package_versions() -> dict[str, str]:
    """Returns the versions of what the features depend on besides weights and torch, for a record's environment."""
    return {name: version(name) for name in PACKAGES}


def _read(store: Store, file: ContentFile) -> dict[str, Tensor]:
    data = read_content(store, file, "evaluation.inception", WEIGHTS_BYTES)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # a file of another kind, or a damaged one, fails in many ways
        raise UserError(_other(file)) from e
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(_other(file))
    if file != PUBLISHED:
        what = file.path or file
        log.warning("evaluation.inception: %s is not the file that is published; compare FID by it with no other", what)
    return dict(state)


def _other(file: ContentFile) -> str:
    return (
        f"evaluation.inception: {file.path or file} does not hold the weights that FID is defined by; "
        "fetch pt_inception-2015-12-05-6726825d.pth"
    )


def fid_figures(drawn: Mapping[str, Tensor], real: Tensor, training: Tensor, rows: HeldOut) -> list[Figure]:
    """Returns FID of every set of ``drawn`` features [m, 2048], m at least 2, each of the first m of ``rows``.

    Sets are named as for ``quality_figures``. ``real`` [n, 2048] are the rows' own images and ``training``
    [n, 2048] those of training rows.
    """
    figures = []
    for kind, seen in drawn.items():
        model, end, subject = named(kind)
        m = len(seen)
        ours, theirs = (frechet_distance(x, real[:m]) for x in (seen, training[:m]))
        says = f"FID of {subject} images to real ones; baseline: training images"
        figures.append(whole("f", model, f"fid{end}", says, ours, theirs, rows.first(m)))
    return figures
