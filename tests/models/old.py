"""``python -m tests.models.old``: keeps a small bundle and what it draws, as this version does, as a file.

Run it when a version is released, so that later ones are seen to open its bundles and to draw the same.
"""

import io
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.chain import ROOT
from tests.models.small_models import make

FOLDER = Path(__file__).parent / "formats"
IMAGES = "images.npz"
CAPTION, SEED = "a red fox", 7


def bundle() -> Any:
    """Returns models whose weights are a pattern, which takes kilobytes where random ones take megabytes."""
    unclip = make()
    for name in ("clip", "decoder", "diffusion_prior", "ar_prior", "upsampler_256", "upsampler_1024"):
        for parameter in getattr(unclip, name).parameters():
            pattern = (torch.arange(parameter.numel()) * 5 % 7 - 3) / 20
            parameter.data.copy_(pattern.reshape(parameter.shape))
    return unclip


def drawn(unclip: Any) -> dict[str, np.ndarray]:
    """Returns the image of each side by each prior, uint8 [side, side, 3], by names such as "ar-64"."""
    return {
        f"{prior}-{side}": image[0].numpy()
        for prior in ("ar", "diffusion")
        for side, image in unclip.generate([CAPTION], [SEED], prior=prior).images.items()
    }


def unpack(file: Path, folder: Path) -> dict[str, np.ndarray]:
    """Writes a kept bundle into a folder, and returns what it drew."""
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    with np.load(io.BytesIO((folder / IMAGES).read_bytes())) as images:
        return dict(images)


def main() -> None:
    """Keeps the bundle of the version in pyproject.toml."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(FOLDER / f"{version}.tar.xz", "w:xz") as tar:
        unclip = bundle()
        unclip.save(Path(folder) / "bundle")
        np.savez_compressed(Path(folder) / IMAGES, **drawn(unclip))
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            tar.add(file, file.relative_to(folder))


if __name__ == "__main__":
    main()
