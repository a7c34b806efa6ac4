"""Reads the words of a command: options anywhere, KEY=VALUE anywhere, and a mistake is one line."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pipeline.errors import UserError, did_you_mean

# A dotted name, or a plain one whose value has no space in it; "E=mc2 on a blackboard" is a caption.
OVERRIDE = re.compile(r"[A-Za-z_]\w*((\.\w+)+=.*|=\S*)", re.DOTALL)
# What people look for who know other tools.
HABITS = {
    "status": "unclip show CONFIG shows its progress",
    "logs": "unclip show CONFIG shows its progress, and unclip submit with the same words follows a job",
    "stop": "Ctrl-C stops a run, and unclip submit with --stop a job; the same command resumes it later",
    "download": "unclip run CONFIG --until pairs fetches the images of its lists",
    "train": "unclip run CONFIG trains all models, with --until STAGE up to one",
    "finetune": "unclip init NAME LIST --from WHERE fine-tunes the models there",
    "--output": "write run.output=FOLDER",
    "--preset": "write preset=NAME",
    "--resume": "leave it out: the same command resumes",
    "--force": "leave it out: stages made stale by a changed value or list are remade",
    "--gpus": "leave it out: all GPUs are used; run.STAGE.workers=N takes fewer",
    "--num-processes": "write run.STAGE.workers=N, such as run.decoder.workers=2",
    "--nproc-per-node": "write run.STAGE.workers=N, such as run.decoder.workers=2",
}
_SAID = (
    (r"the following arguments are required: (.*)", r"\1 is missing"),
    (r"unrecognized arguments: (.*)", r"\1: not understood here"),
    (r"one of the arguments (\S+) (\S+) is required", r"\1 or \2: one of them is needed"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2 exclude each other; leave one of them out"),
    (r"argument (\S+): invalid (?:int|float) value: (.*)", r"\1: \2 is not a number"),
    (r"argument (.*)", r"\1"),
)


class _Formatter(argparse.HelpFormatter):
    """Wraps between words only, so that a path stays whole, however long, and can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )


class Parser(argparse.ArgumentParser):
    """A parser of a command's words. Where it has ``--set``, a bare KEY=VALUE means the same.

    Attributes:
        names: Function that returns names which stand as options, too: ``--num-images 4`` is num_images=4.
    """

    names: Callable[[], Collection[str]] = staticmethod(lambda: ())

    def __init__(self, **words: Any):
        super().__init__(formatter_class=_Formatter, **words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses words, the options among them first. Raises UserError for a mistake."""
        if self._subparsers:
            # Raises for an unknown option before the command: argparse would take its value for the command.
            self._takes_next(args[0] if args and args[0].startswith("-") else "--help")
            return super().parse_known_args(args, namespace)
        words = sys.argv[1:] if args is None else args
        found, unknown = super().parse_known_args(self._options_first(words), namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, []

    def _options_first(self, words: Sequence[str]) -> list[str]:
        options: list[str] = []
        others: list[str] = []
        rest = iter(words)
        for word in rest:
            if word == "--":
                others += [word, *rest]
            elif word == "-" or not word.startswith("-"):
                if "--set" in self._option_string_actions and OVERRIDE.fullmatch(word):
                    options.append(f"--set={word}")
                else:
                    others.append(word)
            elif (named := self._named(word)) is not None:
                name, equals, value = named
                options.append(f"--set={name}={value if equals else next(rest, '')}")
            else:
                options += [word, *islice(rest, self._takes_next(word))]
        return [*options, *others]

    def _named(self, word: str) -> tuple[str, str, str] | None:
        """Returns the parts of an option that is none of ours but one of ``names``."""
        option, equals, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        known = option in self._option_string_actions or not option.startswith("--")
        return None if known or name not in self.names() else (name, equals, value)

    def _takes_next(self, word: str) -> int:
        """Returns 1 if the value of this option is the next word, else 0. Raises UserError for an unknown option."""
        known = self._option_string_actions
        name, equals, _ = word.partition("=")
        if name in known:
            return int(known[name].nargs is None and not equals)
        if not name.startswith("--") and word[:2] in known:
            return 0
        begun = [action for option, action in known.items() if name.startswith("--") and option.startswith(name)]
        if not begun:
            bare = word.lstrip("-")
            if "--set" in known and OVERRIDE.fullmatch(bare):
                raise UserError(f"{word}: write values without dashes: {bare}")
            raise UserError(f"{self.prog}: unknown option {name}{self._meant(name)}")
        return int(begun[0].nargs is None and not equals)

    def _meant(self, option: str) -> str:
        """Returns the end of a message about an unknown option: what is written here in its place."""
        known, bare = self._option_string_actions, option.lstrip("-")
        if habit := HABITS.get(option.replace("_", "-")):
            elsewhere = "--set" not in known and habit.startswith("write ")
            return f"; with unclip run CONFIG, {habit}" if elsewhere else f"; {habit}"
        if "--set" in known and known["--set"].metavar == "KEY=VALUE":
            from pipeline.parse import ELSEWHERE  # with pydantic, for which no help should wait

            if other := ELSEWHERE.get(bare.replace("-", "_")):
                field, _, means = other.partition(", ")
                return f"; write STAGE.{field}=VALUE, such as decoder.{field}=...{means and f', {means}'}"
        said = did_you_mean(bare, [each[2:] for each in known if each.startswith("--")], "--")
        if said.startswith("; known"):
            near = did_you_mean(bare.replace("-", "_"), self.names(), "--")
            if near.startswith("; did"):
                return near
            if "--set" in known:
                said += f"; values are written {known['--set'].metavar}"
        return said

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"{action.option_strings[-1]}:" if action.option_strings else f"{self.prog}:"
            kind = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            words = action.choices if isinstance(value, str) else map(str, action.choices)
            near = did_you_mean(value, words) if isinstance(value, str) else f"; known are {', '.join(words)}"
            near = f"; {HABITS[value]}" if kind == "command" and value in HABITS else near
            if isinstance(action, argparse._SubParsersAction) and (below := self._with_command(action, value)):
                near = f"; did you mean {' or '.join(below)}?"
            raise UserError(f"{what} unknown {kind} {value}{near}")

    def _with_command(self, action: argparse._SubParsersAction[Any], name: str) -> list[str]:
        """Returns the commands of ``action`` below which there is one of this name, with that name."""
        return [
            f"{self.prog} {command} {name}"
            for command, parser in action.choices.items()
            for each in parser._actions
            if isinstance(each, argparse._SubParsersAction) and name in each.choices
        ]

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message in plain words."""
        for pattern, words in _SAID:
            if re.fullmatch(pattern, message):
                message = re.sub(pattern, words, message)
                break
        raise UserError(f"{self.prog}: {message}; write {self._usage()}, or see {self.prog} --help")

    def format_help(self) -> str:
        """Returns the help, with a usage that names what is needed first."""
        self.usage = self.usage or self._usage()
        return super().format_help()

    def _usage(self) -> str:
        forms: dict[Any, str] = {None: "{}", "?": "[{}]", "*": "[{} ...]", "+": "{} ...", argparse.PARSER: "{} ..."}
        places = [forms[action.nargs].format(action.metavar) for action in self._get_positional_actions()]
        options = [action for action in self._get_optional_actions() if action.dest != "help"]
        needed = [f"{action.option_strings[-1]} {action.metavar}" for action in options if action.required]
        values = [f"[{action.metavar} ...]" for action in options if action.dest == "overrides"]
        more = ["[OPTION ...]"] if len(options) > len(needed) + len(values) else []
        return " ".join([self.prog, *places, *needed, *values, *more])


def takes_lists(parser: Parser, nargs: str, more: str = "") -> None:
    """Adds ``sources``, lists as ``source.paths`` names them, and options that say how they are read."""
    text = "a table, a JSON file, a folder of images with texts, tars, embeddings, or hf://datasets/OWNER/NAME"
    parser.add_argument("sources", nargs=nargs, metavar="SOURCE", type=given, help=text + more)
    text = "column of image URLs or paths (default url)"
    parser.add_argument("--image-column", default="url", metavar="COLUMN", help=text)
    text = "column of captions (default caption)"
    parser.add_argument("--caption-column", default="caption", metavar="COLUMN", help=text)
    text = "folder to which image paths are relative, instead of the list's own"
    parser.add_argument("--image-folder", default="", metavar="FOLDER", help=text)
    parser.add_argument("--encoding", default="", help="encoding of text that is not UTF-8, such as cp1252")


def takes_values(parser: Parser, metavar: str, text: str) -> None:
    """Adds ``overrides``, values as KEY=VALUE."""
    text = f"{text}; --set may be left out"
    parser.add_argument("--set", dest="overrides", metavar=metavar, action="append", default=[], help=text)


def takes_quiet(parser: Any) -> None:
    """Adds ``quiet``."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but warnings and errors")


def takes_place(parser: Parser, metavar: str, text: str) -> None:
    """Adds ``to``, where something is written."""
    parser.add_argument("-o", "--to", type=Path, metavar=metavar, help=text)


def add_below(commands: Any, name: str, text: str, aliases: Sequence[str] = ()) -> Parser:
    """Returns the parser of one more command, whose help is a sentence."""
    return commands.add_parser(name, aliases=aliases, help=text, description=f"{text[0].upper()}{text[1:]}.")


def given(text: str) -> str:
    """Returns a word that may not be empty, as the value of a shell's variable that is not set would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; is a variable of the shell not set?")
    return text


def count(text: str) -> int:
    """Returns a whole number written as 100, 100k or 1e6."""
    from pipeline.parse import read_count  # with pydantic, for which no help should wait

    number = read_count(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 100, 10k or 1e6")
    return number


class Command(NamedTuple):
    """A command.

    Attributes:
        text: Sentence that says what it does, without a capital or a full stop.
        add: Function that adds the command's words to its parser.
        main: Function that runs it and returns the exit code; None for ``main`` of the module in ``jobs`` of its name.
    """

    text: str
    add: Callable[[Parser], None]
    main: Callable[[argparse.Namespace], int] | None = None
