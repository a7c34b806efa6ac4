"""Adds a command: shows curated pairs in one image, to see what the models learn from.

    python examples/add_command.py CONFIG

Installed (docs/extend.md says how), it is ``unclip contact-sheet CONFIG``.
"""

import argparse
from itertools import islice

from unclip.commands import Command, Parser, say, takes_config

SIDE, LINE, LETTERS, COLUMNS = 192, 16, 30, 6  # pixels of an image and of its caption, letters of it, images in a row


def words(parser: Parser) -> None:
    """Adds what the command takes; help, completion and messages about mistakes come from here."""
    takes_config(parser)
    parser.add_argument("--pairs", type=int, default=24, metavar="N", help="how many of the first pairs (24)")
    parser.add_argument("-o", "--to", default="contact-sheet.png", metavar="FILE", help="where (contact-sheet.png)")


def main(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Imports here what help need not wait for."""
    from PIL import Image, ImageDraw, ImageOps

    import unclip

    pairs = list(islice(unclip.open(arguments.config, *arguments.overrides).pairs(), arguments.pairs))
    if not pairs:
        raise unclip.UserError("no pair is left to be shown; unclip report says why rows are rejected")
    sheet = Image.new("RGB", (min(len(pairs), COLUMNS) * SIDE, -(-len(pairs) // COLUMNS) * (SIDE + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, pair in enumerate(pairs):
        x, y = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + LINE)
        sheet.paste(ImageOps.fit(pair.image, (SIDE, SIDE)), (x, y))
        draw.text((x + 2, y + SIDE + 2), pair.caption[:LETTERS], "black")
    sheet.save(arguments.to)
    say(f"{len(pairs)} pairs: {arguments.to}")
    return 0


CONTACT_SHEET = Command("show curated pairs in one image", words, main)

if __name__ == "__main__":
    parser = Parser()
    words(parser)
    main(parser.parse_args())
