"""``unclip export WHERE --to FOLDER``: writes a bundle's models as a folder to share, or for diffusers."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import suppress
from pathlib import Path

from jobs.bundles import find_bundle
from pipeline.errors import UserError
from pipeline.local import Reach, read_local
from pipeline.progress import counted
from pipeline.store import open_store

CARD, CARD_BYTES = "README.md", 1 << 20
INDEX = "model_index.json"
LOADING = {
    "bundle": 'unclip sample "a red heart" --from {to}',
    "diffusers": 'DiffusionPipeline.from_pretrained("{to}", trust_remote_code=True), with the code in that folder',
}


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip export``."""
    target = open_store(arguments.to)
    if next(target.list(""), None) is not None:
        raise UserError(f"{arguments.to} is not empty; name a new folder with --to")
    with tempfile.TemporaryDirectory() as made:
        if (Path(arguments.source) / INDEX).is_file() or arguments.format == "diffusers":
            folder, move = _converted(arguments, Path(made)), True
            names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        else:
            bundle, move = find_bundle(arguments.source, arguments.overrides), False
            folder, names = bundle.folder, list(bundle.blobs)
        for name in names:
            target.create(name, folder / name, move)
    size = sum(entry.size for entry in target.list(""))
    print(f"{arguments.to}: {counted(len(names), 'file')}, {size / 2**20:,.1f} MiB")
    print(f"next: {LOADING[arguments.format].format(to=arguments.to)}")
    return 0


def _converted(arguments: argparse.Namespace, made: Path) -> Path:
    """Writes the models that are named, of a bundle or in diffusers' layout, into ``made``, as is asked for.

    Raises UserError for models that do not fit.
    """
    from models.cascade import UnCLIP
    from models.interchange import export_unclip, import_unclip

    folder = Path(arguments.source)
    try:
        if (folder / INDEX).is_file():
            unclip = import_unclip(folder)
        else:
            folder = find_bundle(arguments.source, arguments.overrides).folder
            unclip = UnCLIP.from_folder(folder)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(str(e)) from e
    if arguments.format == "bundle":
        unclip.save(made)
    else:
        native = export_unclip(unclip, made)
        print(f"in classes of diffusers: {', '.join(native) or 'none'}; all others are in ours/")
    with suppress(OSError):  # a folder need not have a card
        (made / CARD).write_bytes(read_local(folder / CARD, CARD_BYTES, Reach((str(folder.absolute()),))))
    return made
