"""``unclip edit KIND ...``: change images of your own with a finished bundle, and show the result as a strip."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bundles import find_bundle
from jobs.output import say
from jobs.sample import check_seed, file_name, sampling_option
from pipeline.data.pairs.decoding import open_image
from pipeline.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from models.cascade import UnCLIP
    from pipeline.sampling.edits import Edit

SIZE = 256  # px unless asked for otherwise: a strip of 1024 px images takes minutes on a CPU
# Arguments that all kinds have, and that others tell.
NOT_ITS_OWN = ("command", "source", "to", "seed", "overrides", "device")


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip edit``."""
    _check(arguments)
    options = dict(sampling_option(text) for text in arguments.overrides)
    images = [open_image(path) for path in _named(arguments)]
    bundle = find_bundle(arguments.source)
    folder, where = bundle.folder, arguments.to.parent if arguments.to else bundle.output / "edits"
    where.mkdir(parents=True, exist_ok=True)  # before minutes of drawing

    from pipeline.sampling.drawing import open_bundle, refusals

    with refusals():
        unclip = open_bundle(folder, arguments.device)
        edit = _make(unclip, arguments, images, {"size": min(SIZE, unclip.sampling.size)} | options)
    path = arguments.to or where / _name(arguments, images, edit, bundle.name)
    _write(path, edit, arguments)
    say(path)
    for i, name in enumerate(edit.names, 1):
        say(f"  {i}: {name}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what would otherwise be found out only after minutes of sampling."""
    values = vars(arguments)
    least = 1 if arguments.kind == "variations" else 2
    check_seed(arguments.seed)
    if values.get("count", least) < least:
        raise UserError(f"--count {arguments.count} is below {least}")
    if not 0 <= values.get("eta", 0) <= 1:
        raise UserError(f"--eta {arguments.eta} is outside 0 to 1; 0 gives the reconstruction, 1 changes most")
    if not 0 < values.get("most", 1) <= 1:
        raise UserError(f"--most {arguments.most} is not above 0 and at most 1; the paper goes up to 0.25 to 0.5")
    if "before" in values and arguments.before == arguments.after:
        raise UserError(f"both captions are {arguments.before!r}; let AFTER say what should become of the image")
    if arguments.to and arguments.to.suffix.lower() != _suffix(arguments):
        raise UserError(f"--to {arguments.to}: what is made is a {_suffix(arguments)} file; name one")
    if values.get("counts"):
        _counts(arguments.counts)


def _counts(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--counts {text}: write whole numbers with commas, such as 20,30,40") from None


def _named(arguments: argparse.Namespace) -> list[Path]:
    """Returns the images that the arguments name."""
    values = vars(arguments)
    return [values[name] for name in ("image", "first", "second") if values.get(name)]


def _make(unclip: UnCLIP, a: argparse.Namespace, images: Sequence[Image], options: Mapping[str, Any]) -> Edit:
    from pipeline.sampling import edits

    settings = edits.EditSettings(a.seed, options)
    if a.kind == "variations":
        return edits.variations(unclip, images[0], a.count, a.eta, a.caption, settings)
    if a.kind == "interpolate":
        return edits.interpolation(unclip, images[0], images[1], a.count, settings)
    if a.kind == "textdiff":
        shares = [a.most * i / (a.count - 1) for i in range(a.count)]
        return edits.text_difference(unclip, images[0], a.before, a.after, shares, settings)
    if a.kind == "reconstruct":
        return edits.reconstruction(unclip, images[0], a.caption, settings)
    if a.kind == "components":
        return edits.components(unclip, images[0], _counts(a.counts) if a.counts else None, settings)
    return edits.priors(unclip, a.caption, images[0] if images else None, settings)


def _write(path: Path, edit: Edit, arguments: argparse.Namespace) -> None:
    """Writes the strip or the animation, with all that it came from in text chunks."""
    from pipeline.sampling.drawing import png_with_text
    from pipeline.sampling.edits import animation, strip

    text = {
        "edit": json.dumps(_asked(arguments), sort_keys=True),
        "images": json.dumps(edit.names),
        "seed": str(arguments.seed),
        "settings": json.dumps(edit.settings, sort_keys=True),
    }
    animated = _suffix(arguments) == ".webp"
    data = animation(edit.images, text) if animated else png_with_text(strip(edit.images), text)
    path.write_bytes(data)


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the kind and its own arguments, an image by the name of its file."""
    own = {name: value for name, value in vars(arguments).items() if name not in NOT_ITS_OWN}
    return {name: value.name if isinstance(value, Path) else value for name, value in own.items()}


def _name(arguments: argparse.Namespace, images: Sequence[Image], edit: Edit, bundle: str) -> str:
    said = [file.stem for file in _named(arguments)]
    said += [vars(arguments)[name] for name in ("after", "caption") if vars(arguments).get(name)]
    contents = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    request = {"edit": _asked(arguments), "contents": contents, "settings": edit.settings, "bundle": bundle}
    return f"{arguments.kind}-{file_name(' '.join(said), request, arguments.seed)}{_suffix(arguments)}"


def _suffix(arguments: argparse.Namespace) -> str:
    return ".webp" if vars(arguments).get("animate") else ".png"
