"""``unclip export WHERE --to FOLDER``: writes a bundle's models as a folder to share, or for diffusers."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from contextlib import suppress
from pathlib import Path

from jobs.bundles import find_bundle
from jobs.output import say
from pipeline.errors import UserError
from pipeline.local import PathPolicy, read_local
from pipeline.progress import counted
from pipeline.store import open_store

CARD, CARD_BYTES = "README.md", 1 << 20
INDEX = "model_index.json"
LOADING = {
    "bundle": 'unclip sample "a red heart" --from {to}',
    "diffusers": "DiffusionPipeline.from_pretrained({to}, trust_remote_code=True), with the code in that folder",
}


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip export``."""
    target = open_store(arguments.to)
    if next(target.list(""), None) is not None:
        raise UserError(f"{arguments.to} is not empty; name a new folder with --to")
    with tempfile.TemporaryDirectory() as made:
        if arguments.format == "diffusers" or (Path(arguments.source) / INDEX).is_file():
            _convert(arguments, Path(made))
        else:
            bundle = find_bundle(arguments.source, arguments.overrides)
            if bundle.store:
                bundle.copy(Path(made))
            else:
                for name in bundle.blobs:
                    target.create(name, bundle.folder / name)
        for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            target.create(file.relative_to(made).as_posix(), file, move=True)
    entries = list(target.list(""))
    say(f"{arguments.to}: {counted(len(entries), 'file')}, {sum(e.size for e in entries) / 2**20:,.1f} MiB")
    quote = shlex.quote if arguments.format == "bundle" else json.dumps
    copied = "copy it to a folder, then " if "://" in arguments.to else ""
    say(f"next: {copied}{LOADING[arguments.format].format(to=quote('FOLDER' if copied else arguments.to))}")
    return 0


def _convert(arguments: argparse.Namespace, made: Path) -> None:
    """Writes the models that are named, of a bundle or in diffusers' layout, into ``made``, as is asked for.

    Raises UserError for models that do not fit or are damaged.
    """
    from models.cascade import UnCLIP
    from models.interchange import export_unclip, import_unclip

    folder = Path(arguments.source)
    try:
        with tempfile.TemporaryDirectory() as copy:
            if (folder / INDEX).is_file():
                unclip = import_unclip(folder)
            else:
                bundle = find_bundle(arguments.source, arguments.overrides)
                folder = bundle.place or Path(copy)
                if bundle.store:
                    bundle.copy(folder)
                unclip = UnCLIP.from_folder(folder)
            card = b""
            with suppress(OSError):  # a folder need not have one
                card = read_local(folder / CARD, CARD_BYTES, PathPolicy((str(folder.absolute()),)))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(str(e)) from e
    if arguments.format == "bundle":
        unclip.save(made)
    else:
        native = export_unclip(unclip, made)
        say(f"classes of diffusers itself: {', '.join(native) or 'none'}; all others are in ours/")
    if card:
        (made / CARD).write_bytes(card)
