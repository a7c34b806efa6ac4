"""``unclip sample "CAPTION"``: turn captions into images with a finished bundle."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from models.sampling_config import SamplingConfig
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.local import read_local
from pipeline.parse import parse
from pipeline.store import Store, open_store
from pipeline.store.records import digest, materialise

SLUG_BYTES = 80  # UTF-8; with kind, hash, seed and suffix a name stays below the 143 bytes of encrypted folders
LARGEST_SEED = 2**62
NAME_HASH = 10  # hexadecimal digits


def main(argv: Sequence[str]) -> int:
    """Runs ``unclip sample``."""
    parser = argparse.ArgumentParser(prog="unclip sample", description=__doc__, parents=[drawing_options()])
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    parser.add_argument(
        "-o", "--to", type=Path, metavar="FOLDER", help="where the images go (samples, in the run's output folder)"
    )
    arguments = parser.parse_intermixed_args(argv)
    check_seed(arguments.seed)
    output = arguments.source or newest_output()
    options = dict(sampling_option(text) for text in arguments.set)
    folder = bundle_folder(output)
    to = arguments.to or output / "samples"
    to.mkdir(parents=True, exist_ok=True)

    from models.tokens import check_captions
    from pipeline.sampling.drawing import make_sample, open_bundle

    try:
        check_captions(arguments.captions)
        unclip = open_bundle(folder, arguments.device)
        for i, caption in enumerate(arguments.captions):
            sample = make_sample(unclip, caption, arguments.seed + i, options)
            request = {"caption": caption, "settings": sample.settings, "bundle": folder.name}
            path = to / f"{file_name(caption, request, sample.seed)}.png"
            path.write_bytes(sample.image)
            print(path)
    except ValueError as e:
        raise UserError(str(e)) from e
    return 0


def check_seed(seed: int) -> None:
    """Raises UserError for a seed below 0, and for one so large that the seeds after it have no room in a table."""
    if not 0 <= seed < LARGEST_SEED:
        raise UserError(f"--seed {seed} is {'below 0' if seed < 0 else f'too large; use one below {LARGEST_SEED}'}")


def drawing_options() -> argparse.ArgumentParser:
    """Returns a parser of the options that every command which draws has."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="a run's output folder, such as out/emoji; by default the newest under out/",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next have the next (default 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a sampling option, such as decoder_steps=50"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="draws on it; auto is a GPU if there is one"
    )
    return parser


def remember_bundle(output: Path, store: str, key: str) -> None:
    """Writes into a run's output folder where its bundle is."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "bundle.json").write_text(json.dumps({"store": store, "bundle": key}) + "\n")


def newest_output() -> Path:
    """Returns the output folder under out/ whose bundle is the newest. Raises UserError if there is none."""
    found = sorted(Path("out").glob("*/bundle.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(
            "no finished bundle under out/; run one first (make peek), or name a run's output folder with --from"
        )
    return found[-1].parent


def bundle_artifact(output: Path) -> tuple[Store, Artifact]:
    """Returns the store and the bundle that ``remember_bundle`` wrote into an output folder. Raises UserError."""
    try:
        word = json.loads(read_local(output / "bundle.json", 1 << 16))
        store, key = open_store(word["store"]), word["bundle"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{output}: no finished bundle there; name a run's output folder") from None
    artifact = load_artifact(store, "bundle", key)
    if artifact is None:
        raise UserError(f"{output}: its bundle is not in {store.url} any longer; run its configuration again")
    return store, artifact


def bundle_folder(output: Path) -> Path:
    """Returns the bundle's folder on this machine, copied from the store the first time."""
    store, artifact = bundle_artifact(output)
    folder = output / "bundle" / artifact.key[:12]
    try:
        materialise(store, artifact.blobs, folder)
    except CorruptObject as e:
        raise UserError(f"{e}; run the configuration again, which makes it again") from e
    return folder


def sampling_option(text: str) -> tuple[str, Any]:
    """Returns name and value of a --set, of the option's type. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write NAME=VALUE")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: {value} is not a value; write a number or a word") from None
    kind = get_type_hints(SamplingConfig).get(name)  # ``sampling_with`` names the known options
    return name, parsed if kind is None else parse(kind, parsed, f"--set {name}")


def file_name(words: str, request: Mapping[str, Any], seed: int) -> str:
    """Returns a file's name without its suffix: some words, a hash of everything that was asked for, and the seed.

    Two requests that differ never share a name, also where a file system takes upper and lower case for the same.
    """
    return f"{slug(words)}-{digest(request)[:NAME_HASH]}-{seed}"


def slug(text: str) -> str:
    """Returns a text as part of a file name: letters and digits of any script, lower case, NFC, at most SLUG_BYTES."""
    kept = ""
    for char in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(char)[0]
        # A mark belongs to its letter: many scripts have no vowels without marks. Alone it would be invisible.
        kept += char if kind in "LN" or (kind == "M" and kept[-1:].strip()) else " "
    words = "-".join(kept.split())
    return words.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "image"
