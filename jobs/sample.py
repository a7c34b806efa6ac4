"""``unclip sample "CAPTION"``: turn captions into images with a finished bundle."""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Mapping
from typing import Any, get_type_hints

from jobs.bundles import find_bundle
from jobs.output import say
from models.sampling_config import SamplingConfig
from pipeline.errors import UserError
from pipeline.parse import parse, read_value
from pipeline.store.records import digest

SLUG_BYTES = 80  # UTF-8; with kind, hash, seed and suffix a name stays below the 143 bytes of encrypted folders
LARGEST_SEED = 2**62  # seeds are int64 in tables, and each next image adds one
NAME_HASH = 10  # hexadecimal digits


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip sample``."""
    check_seed(arguments.seed)
    options = dict(sampling_option(text) for text in arguments.overrides)
    bundle = find_bundle(arguments.source)
    folder, to = bundle.folder, arguments.to or bundle.output / "samples"
    to.mkdir(parents=True, exist_ok=True)

    from models.tokens import check_captions
    from pipeline.sampling.drawing import make_sample, open_bundle, refusals

    with refusals():
        check_captions(arguments.captions)
        unclip = open_bundle(folder, arguments.device)
        for i, caption in enumerate(arguments.captions):
            sample = make_sample(unclip, caption, arguments.seed + i, options)
            request = {"caption": caption, "settings": sample.settings, "bundle": bundle.name}
            path = to / f"{file_name(caption, request, sample.seed)}.png"
            path.write_bytes(sample.image)
            say(path)
    return 0


def check_seed(seed: int) -> None:
    """Raises UserError for a seed below 0, and for one so large that the seeds after it have no room in a table."""
    if not 0 <= seed < LARGEST_SEED:
        raise UserError(f"--seed {seed} is {'below 0' if seed < 0 else f'too large; use one below {LARGEST_SEED}'}")


def sampling_option(text: str) -> tuple[str, Any]:
    """Returns name and value of a --set, of the option's type. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write NAME=VALUE")
    parsed = read_value(value, f"--set {text}")
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
