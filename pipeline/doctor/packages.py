"""Checks that the required packages are installed, within their bounds, and can be imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.doctor.finding import Finding, brief

PROJECT = "unclip-ray"
MODULES = {
    "faiss-cpu": "faiss",
    "open-clip-torch": "open_clip",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "tensorboardx": "tensorboardX",
}  # by canonical names; the rest are imported by theirs


def check_packages() -> Iterator[Finding]:
    """Yields a finding for each package with a fault, or one for all of them."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        wanted = [Requirement(text) for text in metadata.requires(PROJECT) or ()]
    except metadata.PackageNotFoundError:
        yield Finding("warning", "packages", f"{PROJECT} is not installed, so its bounds are unknown", "pip install .")
        return
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = [fault for fault in map(_fault, needed) if fault is not None]
    yield from faults
    if not faults:
        yield Finding("ok", "packages", f"{len(needed)} are installed, within their bounds, and can be imported")


def _fault(requirement: Requirement) -> Finding | None:
    install = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding("problem", "packages", f"{requirement.name} is not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            "problem", "packages", f"{requirement.name} {version} is outside {requirement.specifier}", install
        )
    try:
        name = canonicalize_name(requirement.name)  # metadata may have the project's spelling or this one
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as e:  # a shared library that is missing is an OSError, and so on
        return Finding(
            "problem",
            "packages",
            f"{requirement.name} {version} cannot be imported ({brief(e)})",
            f"install what is missing, or {install} --force-reinstall",
        )
    return None
