"""``unclip completion SHELL``: prints the completion script of a shell, to be kept in a file that the shell reads."""

from __future__ import annotations

import argparse

import shtab

from jobs.command_line import FILES, command_line, leaves
from jobs.output import say


def main(arguments: argparse.Namespace) -> int:
    """Prints the script; with it, the shell completes without starting Python."""
    parser = command_line()
    for leaf in leaves(parser):
        for action in leaf._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    say(shtab.complete(parser, arguments.shell))
    return 0
