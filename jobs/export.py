"""``unclip export WHERE --to PLACE``: writes a bundle as a folder to share, as one small file, or for diffusers."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from jobs.archives import HASH, SUFFIX, pack
from jobs.bundles import Bundle, find_bundle
from jobs.output import say
from pipeline.data.card import CARD
from pipeline.errors import UserError
from pipeline.graph.artifacts import load_artifact
from pipeline.local import PathPolicy, read_local
from pipeline.progress import counted
from pipeline.release.card import model_card
from pipeline.store import open_store

CARD_BYTES = 1 << 20
INDEX = "model_index.json"
FULL = ("codec", "training")  # folders of a bundle whose numbers stay as they are: codes are counted by them
LOADING = {
    "bundle": 'unclip sample "a red heart" --from {to}',
    "diffusers": "DiffusionPipeline.from_pretrained({to}, trust_remote_code=True), with the code in that folder",
}


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip export``."""
    if arguments.to.endswith(SUFFIX):
        return _export_archive(arguments)
    if arguments.license:
        raise UserError(
            f"--license: training images are packed into a single file only; name one, such as --to my{SUFFIX}"
        )
    target = open_store(arguments.to)
    if next(target.list(""), None) is not None:
        raise UserError(f"{arguments.to} is not empty; name a new folder with --to")
    with tempfile.TemporaryDirectory() as made:
        if arguments.format == "diffusers" or (Path(arguments.source) / INDEX).is_file():
            _convert(arguments, Path(made))
        else:
            bundle = find_bundle(arguments.source, arguments.overrides)
            if bundle.store:
                _copy(bundle, Path(made))
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


def _export_archive(arguments: argparse.Namespace) -> int:
    """Writes a bundle as one file, its weights in half precision, with training images of the licences named."""
    from models.tensors import save_half
    from pipeline.sampling.nearest import CARRIED, StoredImages, carry

    if arguments.format == "diffusers":
        raise UserError("--format diffusers writes a folder; name one with --to, or leave --format out")
    place, _, name = arguments.to.rpartition("/")
    target = open_store(place or ".")
    if target.stat(name) is not None:
        raise UserError(f"{arguments.to} exists already; name another file with --to")
    bundle = find_bundle(arguments.source, arguments.overrides)
    about = ["", "Matrices of the weights are in half precision (fp16), and computed with in fp32."]
    with tempfile.TemporaryDirectory() as made:
        folder, file = Path(made, "bundle"), Path(made, name)
        if bundle.store:
            _copy(bundle, folder)
        else:
            shutil.copytree(bundle.folder, folder)
        for weights in folder.glob("*/*.safetensors"):
            if weights.parent.name not in FULL:
                save_half(weights, half := weights.with_name("half"))
                half.replace(weights)
        if arguments.license:
            training = bundle.training()
            if not isinstance(training, StoredImages):
                raise UserError(f"--license: {arguments.source} has no store to take images from; leave it out")
            carried, rows = carry(training, set(arguments.license), folder)
            about.append(
                f"{carried:,} of {rows:,} training images ({', '.join(arguments.license)}) travel along, "
                f"{CARRIED.image_size} px, with caption, licence and attribution."
            )
        card = folder / CARD
        card.write_text((card.read_text("utf-8") if card.is_file() else "") + "\n".join([*about, ""]), "utf-8")
        sha256 = pack(folder, file)
        size = file.stat().st_size
        if not target.create(name, file, move=True):
            raise UserError(f"{arguments.to} exists already; name another file with --to")
    say(f"{arguments.to}: {size / 2**20:,.1f} MiB, sha256 {sha256}")
    say("\n".join(about[2:]))
    say(f'next: unclip sample "a red heart" --from {shlex.quote(arguments.to)}')
    say(f"elsewhere: --from https://HOST/{name}{HASH}{sha256}")
    return 0


def _copy(bundle: Bundle, folder: Path) -> None:
    """Writes the files of a stored bundle, with a card that tells of data and claims, too. Raises CorruptObject."""
    bundle.copy(folder)
    if bundle.store and (artifact := load_artifact(bundle.store, "bundle", bundle.key)):
        (folder / CARD).write_text(model_card(bundle.store, artifact), "utf-8")


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
                    _copy(bundle, folder)
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
