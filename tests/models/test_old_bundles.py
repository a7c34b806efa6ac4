"""Bundles of released versions, kept as files: they open, and draw what they drew."""

from pathlib import Path

import numpy as np
import pytest

from models.cascade import UnCLIP
from tests.models.old import FOLDER, drawn, unpack

KEPT = sorted(FOLDER.glob("*.tar.xz"))


def test_the_bundle_of_the_first_release_is_kept() -> None:
    assert "0.1.0.tar.xz" in [file.name for file in KEPT]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.name.removesuffix(".tar.xz"))
def test_a_bundle_of_an_older_version_draws_the_same_images(tmp_path: Path, file: Path) -> None:
    then = unpack(file, tmp_path)
    now = drawn(UnCLIP.from_folder(tmp_path / "bundle"))
    assert now.keys() == then.keys()
    for name, image in then.items():
        assert image.std() > 1, name  # it shows something
        difference = np.abs(image.astype(int) - now[name].astype(int))
        assert (difference > 2).mean() < 0.01, name  # rounding, of another processor or version of torch
