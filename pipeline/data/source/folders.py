"""Looks through folders: of images with texts or metadata beside them, of webdataset tars, or of tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.source.columns import IMAGES
from pipeline.data.source.rows import SIDECARS
from pipeline.data.source.tables import table_kind
from pipeline.data.source.tars import is_tar
from pipeline.errors import UserError
from pipeline.progress import counted

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of a Hugging Face imagefolder
SPLITS = {  # the words that Hugging Face's datasets know
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def walk(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yields the files below a folder in order, hidden ones left out, each with the metadata that speaks for it.

    That is the METADATA of its own folder, or else of the nearest one above it. What lies in a folder without
    permission is left out (see unread_files). Raises UserError for one that cannot be listed for another reason.
    """
    nearest: dict[str, Path | None] = {}
    for root, folders, names in os.walk(folder, onerror=_check_listed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        own = next((Path(root, name) for name in METADATA if name in names), nearest.get(os.path.dirname(root)))
        nearest[root] = own
        yield from ((Path(root, name), own) for name in sorted(names) if not name.startswith("."))


def _check_listed(error: OSError) -> None:
    if not isinstance(error, PermissionError):
        raise UserError(
            f"source {error.filename}: cannot be listed ({error.strerror}); look at its disk or its server, then run "
            "the same command again"
        ) from error


def is_image(file: Path) -> bool:
    """Returns whether a file has the name of an image."""
    return file.name.lower().endswith(IMAGES)


def folder_kind(folder: Path) -> str:
    """Returns "folder" for one that has images, else "tars" or "tables" for one that has these."""
    kinds = set()
    for file, _ in walk(folder):
        if is_image(file):
            return "folder"
        kinds.add("tars" if is_tar(file.name) else "tables" if table_kind(file.name) else "")
    return next((kind for kind in ("tars", "tables") if kind in kinds), "folder")


def read_files(folder: Path, kind: str) -> Iterator[Path]:
    """Yields the files of which the rows of a folder are made."""
    for file, metadata in walk(folder):
        if kind == "folder":
            used = is_image(file) or file == metadata or file.suffix.lower()[1:] in SIDECARS
        else:
            used = is_tar(file.name) if kind == "tars" else table_kind(file.name) is not None
        if used:
            yield file


def folder_splits(folder: Path) -> dict[str, str]:
    """Returns the split that each folder of an imagefolder names, by its name.

    Where one of the held-out splits has no folder, a hash splits what lies in ``train``.
    """
    found = {name: SPLITS[name.lower()] for name in os.listdir(folder) if name.lower() in SPLITS}
    whole = {"validation", "test"} <= set(found.values())
    return {name: split for name, split in found.items() if split != "train" or whole}


def unread_files(folder: Path, kind: str, named: frozenset[str]) -> str:
    """Returns how many files of a folder, and links to folders, are not read, by kind and with one of each.

    Returns "" if there are none.

    Args:
        folder: Folder that is a list.
        kind: Kind of the folder, as ``folder_kind`` returns it.
        named: Paths of the images that metadata name.
    """
    files = list(walk(folder))
    images = {file.with_suffix("") for file, _ in files if is_image(file)}
    tars = tuple(str(file.with_suffix("")) for file, _ in files if kind == "tars" and is_tar(file.name))
    found: dict[str, list[Path]] = {}

    def closed(error: OSError) -> None:
        found.setdefault("folder without permission", []).append(Path(error.filename))

    for root, folders, _ in os.walk(folder, onerror=closed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if links := [Path(root, name) for name in folders if Path(root, name).is_symlink()]:
            found.setdefault("link to a folder", []).extend(links)
    for file, metadata in files:
        suffix = file.suffix.lower()
        if kind == "folder" and is_image(file):
            what = "" if metadata is None or str(file) in named else f"image that {metadata.name} does not name"
        elif kind == "folder" and suffix[1:] in SIDECARS and file != metadata:
            what = "" if file.with_suffix("") in images else f"{suffix} without an image"
        elif kind == "folder":
            what = "" if file == metadata else suffix or "without a suffix"
        elif kind == "tars":  # img2dataset writes 00000.parquet and 00000_stats.json beside 00000.tar
            what = "" if is_tar(file.name) or str(file).startswith(tars) else suffix or "without a suffix"
        else:
            what = "" if table_kind(file.name) else suffix or "without a suffix"
        if what:
            found.setdefault(what, []).append(file)
    if not found:
        return ""
    kinds = [f"{len(of):,} {what} (such as {os.path.relpath(of[0], folder)})" for what, of in sorted(found.items())]
    total = sum(map(len, found.values()))
    return f"{counted(total, 'file')} in {folder} {'are' if total > 1 else 'is'} not read: {', '.join(kinds)}"
