"""The arguments of the commands that draw. Imports nothing heavy, as jobs.command_line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from jobs.arguments import Parser, add_below, count, given, takes_place, takes_quiet, takes_values

OPTIONS = "a sampling option, such as size=64 or steps=50"
PLACES = (
    "a run's output folder (out/demo), a project (demo.yaml), its release (release:demo.yaml), a bundle's folder or "
    "zip, the address of a zip with #sha256=, or demo, which fetches the quick start's"
)
EDITS = {
    "vary": "other images with the same meaning (the paper's section 3.1)",
    "interpolate": "images between two (3.2)",
    "change": "an image, moved along the difference of two captions (3.3)",
    "inpaint": "an image, redrawn where a mask is transparent",
    "nearest": "the training images that are nearest to an image",
    "reconstruct": "an image beside its reconstruction from both latents (3)",
    "components": "images from the first principal components of an embedding (4)",
    "priors": "a caption, decoded from each prior's embedding and from its text embedding (5.1)",
}
ALIASES = {"vary": ["variations"], "interpolate": ["blend"], "change": ["textdiff"]}


def add_sample(parser: Parser) -> None:
    """Adds the words of ``unclip sample``."""
    parser.add_argument("captions", nargs="+", metavar="CAPTION", type=given, help="what the image shows")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images of each caption (1)")
    takes_place(parser, "WHERE", "a folder, or the file of one image (samples, in the run's output folder)")
    _takes_bundle(parser)
    _takes_seed(parser)


def add_redraw(parser: Parser) -> None:
    """Adds the words of ``unclip redraw``."""
    parser.add_argument("recipe", type=Path, metavar="IMAGE", help="a PNG that unclip has drawn")
    parser.add_argument("--caption", metavar="CAPTION", help="caption in place of the recipe's")
    parser.add_argument("-n", type=int, metavar="N", help="number of images in place of the recipe's")
    parser.add_argument("--seed", type=int, help="seed of the first image in place of the recipe's")
    text = "input image, if it is not beside the file; may be given again"
    parser.add_argument("--image", dest="images", type=Path, metavar="FILE", action="append", default=[], help=text)
    takes_place(parser, "WHERE", "a file or a folder (redrawn, in the run's output folder)")
    _takes_bundle(parser)


def add_generate(parser: Parser) -> None:
    """Adds the words of ``unclip generate``."""
    kinds = "a .txt with a prompt a line, or a .csv, .tsv, .jsonl or .parquet with a column of them"
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help=kinds)
    text = "column with the prompts (the first of prompt, caption, text)"
    parser.add_argument("--column", metavar="COLUMN", help=text)
    takes_place(parser, "FOLDER", "where tars and tables are written (FOLDER/generated)")
    parser.add_argument("--png", action="store_true", help="also write each image as a PNG with its recipe")
    parser.add_argument("--batch", type=count, default=8, help="images per batch of a worker (8)")
    text = "number of processes; 0 draws in this one (default: one per GPU, or one per core)"
    parser.add_argument("--workers", type=int, help=text)
    text = "GPUs per worker (default: 1 if there are any, otherwise 0)"
    parser.add_argument("--gpus", type=float, help=text)
    takes_quiet(parser)
    _takes_bundle(parser)
    _takes_seed(parser)


def add_edit(parser: Parser) -> None:
    """Adds the words of ``unclip edit``."""
    commands = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    kinds = {name: add_below(commands, name, text, ALIASES.get(name, ())) for name, text in EDITS.items()}
    for name in ("vary", "change", "inpaint", "nearest", "reconstruct", "components"):
        kinds[name].add_argument("image", type=Path, metavar="IMAGE", help="an image file, such as PNG or JPEG")
    _takes_number(kinds["vary"], 8, "images")
    kinds["vary"].add_argument("--eta", type=float, default=1.0, help="how much they vary, from 0 to 1 (1)")
    kind = kinds["interpolate"]
    kind.add_argument("first", type=Path, metavar="A", help="an image file, such as PNG or JPEG")
    kind.add_argument("second", type=Path, metavar="B", help="another")
    _takes_number(kind, 9, "images, both ends included")
    kind = kinds["change"]
    kind.add_argument("before", metavar="BEFORE", help="a caption of the original image")
    kind.add_argument("after", metavar="AFTER", help="caption of the wanted image")
    text = "how far the last image goes towards AFTER, from 0 to 1 (0.5)"
    kind.add_argument("--strength", type=float, default=0.5, metavar="SHARE", help=text)
    _takes_number(kind, 6, "images, the first unchanged")
    kind = kinds["inpaint"]
    kind.add_argument("mask", type=Path, metavar="MASK", help="an image, transparent where to redraw")
    kind.add_argument("caption", metavar="CAPTION", help="what the whole image should show")
    _takes_number(kind, 4, "images")
    _takes_number(kinds["nearest"], 8, "training images")
    for name in ("interpolate", "change"):
        text = "a WebP that plays forward and back, instead of a strip, like --to FILE.webp or FILE.gif"
        kinds[name].add_argument("--animate", action="store_true", help=text)
    for name in ("vary", "reconstruct"):
        kinds[name].add_argument("--caption", help="a caption of the image, for the decoder")
    kinds["components"].add_argument("--counts", help="such as 20,30,40; by default as in the paper's figure 7")
    kinds["priors"].add_argument("caption", metavar="CAPTION", help="what the image shows")
    kinds["priors"].add_argument("--image", type=Path, metavar="FILE", help="an image that matches the caption")
    for name, kind in kinds.items():
        kind.set_defaults(kind=name)  # whichever of its names was said
        takes_place(kind, "WHERE", "a file for the strip, or a folder for single images (edits, in the run's output)")
        _takes_bundle(kind)
        if name != "nearest":
            _takes_seed(kind)


def _takes_number(parser: Parser, usual: int, text: str) -> None:
    parser.add_argument("-n", type=int, default=usual, metavar="N", help=f"{text} ({usual})")


def _takes_seed(parser: Parser) -> None:
    text = "seed of the first image; each next image adds one (default 0)"
    parser.add_argument("--seed", type=int, default=0, help=text)


def _takes_bundle(parser: Parser) -> None:
    text = f"the bundle: {PLACES}; by default the newest under out/"
    parser.add_argument("--from", dest="source", metavar="WHERE", help=text)
    text = "where to draw; auto uses a GPU if there is one"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
    takes_values(parser, "NAME=VALUE", OPTIONS)
    parser.names = _names


def _names() -> Collection[str]:
    """Returns what may stand as NAME=VALUE and as --NAME VALUE."""
    from dataclasses import fields

    from models.sampling_config import INSTEAD, OTHER_NAMES, SamplingConfig

    return {*INSTEAD, *OTHER_NAMES, *OTHER_NAMES.values(), *(each.name for each in fields(SamplingConfig))}
