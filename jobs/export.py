"""``unclip export WHERE --to PLACE``: writes a bundle as a folder to share, as one small file, or for diffusers."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class ExportResult:
    """Describes what an export has written.

    Attributes:
        files: Number of files.
        size: Bytes of all of them.
        remarks: Lines about the images that travel along, or about the classes that diffusers loads.
        sha256: Digest of a single file; "" for a folder.
    """

    files: int
    size: int
    remarks: tuple[str, ...] = ()
    sha256: str = ""


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip export``."""
    to = arguments.to
    made = export(arguments.source, to, *arguments.overrides, format=arguments.format, licenses=arguments.license)
    mib = f"{made.size / 2**20:,.1f} MiB"
    say(f"{to}: {mib}, sha256 {made.sha256}" if made.sha256 else f"{to}: {counted(made.files, 'file')}, {mib}")
    for remark in made.remarks:
        say(remark)
    quote = shlex.quote if arguments.format == "bundle" else json.dumps
    copied = "copy it to a folder, then " if "://" in to and not made.sha256 else ""
    say(f"next: {copied}{LOADING[arguments.format].format(to=quote('FOLDER' if copied else to))}")
    if made.sha256:
        say(f"elsewhere: --from https://HOST/{to.rpartition('/')[2]}{HASH}{made.sha256}")
    return 0


def export(
    source: str | Path,
    to: str | Path,
    *overrides: str,
    format: Literal["bundle", "diffusers"] = "bundle",
    licenses: Collection[str] = (),
) -> ExportResult:
    """Writes a bundle as a folder to share, as one small file, or for diffusers.

    Args:
        source: A place that ``unclip.load`` takes, or a folder in diffusers' layout.
        to: A new folder, s3://BUCKET/PREFIX, or a single file, FILE.zip, whose weights are in half precision.
        overrides: Values in place of those of ``source``, if that is a project's YAML file.
        format: Layout of a folder: "bundle", which ``unclip.load`` opens, or "diffusers", with a pipeline class.
        licenses: Licences, spelled as in the list, of the training images that a single file holds.

    Raises:
        UserError: For a place that is not empty, and for models that do not exist, do not fit or are damaged.

    Examples:
        >>> sha256 = unclip.export("out/nano", "my-nano.zip").sha256
    """
    source, to = str(source), str(to)
    if format not in LOADING:
        raise UserError(f"unknown format {format}; use one of {', '.join(LOADING)}")
    if to.endswith(SUFFIX):
        if format == "diffusers":
            raise UserError(
                f"{to} is a file, and the format diffusers is a folder; name a folder, or the format bundle"
            )
        return _export_file(source, to, overrides, licenses)
    if licenses:
        raise UserError(
            f"{to} is a folder, and training images are packed into a single file only; name one, such as my{SUFFIX}, "
            "or no licences"
        )
    return _export_folder(source, to, overrides, format)


def _export_folder(source: str, to: str, overrides: Sequence[str], format: str) -> ExportResult:
    """Writes a bundle as a folder, in a format."""
    target, remarks = open_store(to), tuple[str, ...]()
    if next(target.list(""), None) is not None:
        raise UserError(f"{to} is not empty; name a new folder")
    with tempfile.TemporaryDirectory() as made:
        if format == "diffusers" or (Path(source) / INDEX).is_file():
            remarks = _convert(source, overrides, format, Path(made))
        else:
            bundle = find_bundle(source, overrides)
            if bundle.store:
                _copy(bundle, Path(made))
            else:
                for name in bundle.blobs:
                    target.create(name, bundle.folder / name)
        for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            target.create(file.relative_to(made).as_posix(), file, move=True)
    sizes = [entry.size for entry in target.list("")]
    return ExportResult(len(sizes), sum(sizes), remarks)


def _export_file(source: str, to: str, overrides: Sequence[str], licenses: Collection[str]) -> ExportResult:
    """Writes a bundle as one file, its weights in half precision, with training images of the licences named."""
    from models.tensors import save_half
    from pipeline.sampling.nearest import CARRIED, StoredImages, carry

    place, _, name = to.rpartition("/")
    target = open_store(place or ".")
    if target.stat(name) is not None:
        raise UserError(f"{to} exists already; name another file")
    bundle, remarks = find_bundle(source, overrides), tuple[str, ...]()
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
        if licenses:
            training = bundle.training()
            if not isinstance(training, StoredImages):
                raise UserError(f"{source} has no store to take training images from; name no licences")
            carried, rows = carry(training, set(licenses), folder)
            remarks = (
                f"{carried:,} of {rows:,} training images ({', '.join(licenses)}) travel along, "
                f"{CARRIED.image_size} px, with caption, licence and attribution.",
            )
        half_precision = "Matrices of the weights are in half precision (fp16), and computed with in fp32."
        card = folder / CARD
        own = card.read_text("utf-8") if card.is_file() else ""
        card.write_text(own + "\n".join(["", half_precision, *remarks, ""]), "utf-8")
        sha256 = pack(folder, file)
        size = file.stat().st_size
        if not target.create(name, file, move=True):
            raise UserError(f"{to} exists already; name another file")
    return ExportResult(1, size, remarks, sha256)


def _copy(bundle: Bundle, folder: Path) -> None:
    """Writes the files of a stored bundle, with a card that tells of data and claims, too. Raises CorruptObject."""
    bundle.copy(folder)
    if bundle.store and (artifact := load_artifact(bundle.store, "bundle", bundle.key)):
        (folder / CARD).write_text(model_card(bundle.store, artifact), "utf-8")


def _convert(source: str, overrides: Sequence[str], format: str, made: Path) -> tuple[str, ...]:
    """Writes the models of a bundle, or of a folder in diffusers' layout, into ``made``, in a format.

    Returns remarks. Raises UserError for models that do not fit or are damaged.
    """
    from models.cascade import UnCLIP
    from models.interchange import export_unclip, import_unclip

    folder, remarks = Path(source), tuple[str, ...]()
    try:
        with tempfile.TemporaryDirectory() as copy:
            if (folder / INDEX).is_file():
                unclip = import_unclip(folder)
            else:
                bundle = find_bundle(source, overrides)
                folder = bundle.place or Path(copy)
                if bundle.store:
                    _copy(bundle, folder)
                unclip = UnCLIP.from_folder(folder)
            card = b""
            with suppress(OSError):  # a folder need not have one
                card = read_local(folder / CARD, CARD_BYTES, PathPolicy((str(folder.absolute()),)))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(str(e)) from e
    if format == "bundle":
        unclip.save(made)
    else:
        native = export_unclip(unclip, made)
        remarks = (f"classes of diffusers itself: {', '.join(native) or 'none'}; all others are in ours/",)
    if card:
        (made / CARD).write_bytes(card)
    return remarks
