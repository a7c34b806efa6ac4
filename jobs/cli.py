"""``unclip COMMAND``: finds the command and turns a user's mistake into one line."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from jobs.interrupt import INTERRUPTED, ending_on_ctrl_c, say_interrupted
from pipeline.errors import UserError
from pipeline.terminal import printable_streams

COMMANDS = {
    "init": "write a commented configuration for pairs of your own",
    "doctor": "check machine, packages, store and Ray before a run",
    "run": "make everything a configuration asks for, where it is stale",
    "plan": "show what a run would make, why, and about what it costs",
    "submit": "run it on a cluster, on this machine or elsewhere, and follow",
    "sample": "draw images for captions with a finished bundle",
    "generate": "draw images for a list of prompts, on many workers",
    "serve": "draw from a page, and from any client of OpenAI's image API",
    "edit": "vary, interpolate, change or decompose your own images",
    "show": "show runs, what is being made and by which machine, and the lineage of an artefact",
    "report": "write the report again, for example with images of some licences only",
    "data": "search images, retry failed rows, forget rows, collect garbage",
    "release": "promote a bundle that is not worse, roll back, compare",
    "pin": "keep an artefact for later data too",
    "unpin": "lift a pin",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script. Returns the exit code: 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: unclip COMMAND ...\n" + "".join(f"\n  {name:10}{text}" for name, text in COMMANDS.items()))
        print("\nunclip COMMAND --help says more.")
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        print(f"error: unknown command {name}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2

    def command(argv: Sequence[str]) -> int:  # imported inside the guard: Ctrl-C may come that early
        return importlib.import_module("jobs.pin" if name == "unpin" else f"jobs.{name}").main(argv)

    return guard(command, words[1:] if name not in ("pin", "unpin") else words)


def guard(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; a user's mistake, a disk that is full or closed, or Ctrl-C end it with one line, no traceback.

    Nothing that is printed meanwhile controls the terminal.
    """
    with printable_streams():
        try:
            return _guarded(command, argv)
        except Exception:  # a fault of ours; printed here, since its words may be those of a list
            traceback.print_exc()
            return 1


def _guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("unclip").setLevel(logging.INFO)
    try:
        with ending_on_ctrl_c():
            return command(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say_interrupted()
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # the reader of the output, such as head, has closed it; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            where = e.filename or "of temporary files, TMPDIR, or where this command's output goes"
            print(f"error: the disk is full ({where}); free space and run the same command again", file=sys.stderr)
            return 1
        if e.errno in (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS):
            print(f"error: {e.filename}: {e.strerror}; name a place that can be read and written", file=sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main())
