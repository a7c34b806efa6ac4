"""``unclip COMMAND``: finds the command and turns a user's mistake into one line."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from jobs.command_line import MODULES, command_line
from jobs.interrupt import ending_on_signals, exit_code, say_interrupted
from jobs.output import warn
from pipeline.errors import CorruptObject, UserError
from pipeline.progress import ProgressLine
from pipeline.terminal import printable_streams

# Errors of a place that cannot be read or written.
UNFIT = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)

MADE = ("blobs/", "shards/", "artifacts/", "checkpoints/", "runs/")  # paths of what a run can make again begin so


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script. Returns the exit code: 0 done, 1 failed, 2 a mistake of the user's, or a signal's."""
    return guard(_command, list(sys.argv[1:] if argv is None else argv))


def _command(words: Sequence[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    parser = command_line(words)
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return 2
    name = MODULES.get(arguments.command, arguments.command)
    ProgressLine.quiet = getattr(arguments, "quiet", False)
    if ProgressLine.quiet:
        logging.getLogger("unclip").setLevel(logging.WARNING)
    command = arguments.main or importlib.import_module(f"jobs.{name}").main
    return command(arguments)


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
        with ending_on_signals():
            return command(argv)
    except UserError as e:
        warn(f"error: {e}")
        return 2
    except CorruptObject as e:
        warn(f"error: {e.path} {e.why}: {_way_out(e.path, argv)}")
        return 2
    except KeyboardInterrupt as e:
        say_interrupted()
        return exit_code(e)
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        # Python flushes stdout at exit, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            where = e.filename or "of temporary files, TMPDIR, or where this command's output goes"
            warn(f"error: the disk is full ({where}); free space and run the same command again")
            return 2
        if e.errno in UNFIT:
            warn(f"error: {e.filename}: {e.strerror}; name a place that can be read and written")
            return 2
        raise


def _way_out(path: str, argv: Sequence[str]) -> str:
    """Returns what to do about a damaged object that a command has met."""
    if not path.startswith(MADE):
        return "it is a file of yours: restore it, or list it again as a new source"
    named = (word.removeprefix("release:") for word in argv if word.endswith((".yaml", ".yml")))
    store = [word for word in argv if word.startswith("store=")]
    words = shlex.join(["unclip", "data", "check", next(named, "CONFIG"), path, *store, "--repair"])
    return f"{words} quarantines it, and the next run makes it again"


if __name__ == "__main__":
    sys.exit(main())
