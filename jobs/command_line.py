"""The arguments of every command, in one place that imports nothing heavy: help and completion come at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.arguments import Command, Parser, add_below, count, given, takes_lists, takes_quiet, takes_values
from jobs.drawing_words import PLACES, add_edit, add_generate, add_redraw, add_sample
from jobs.output import say
from pipeline.pages import page

OVERRIDES = "a value in place of the file's, such as decoder.samples=100k or preset=small"
# What a shell completes to names of files.
FILES = ("CONFIG", "FILE", "FOLDER", "IMAGE", "MASK", "A", "B", "PROMPTS", "SOURCE", "WHERE", "BUNDLE")
SPLITS = ("train", "validation", "test")
EXPORTS = ("pairs", "clip-retrieval", "embeddings")
FORMATS = ("bundle", "diffusers")
SHELLS = ("bash", "zsh", "fish", "tcsh")
GROUP = "unclip.commands"  # of entry points, each named as its command
MODULES = {"peek": "run", "demo": "run", "unpin": "pin"}  # in jobs, where they are not named as the command


def command_line(words: Sequence[str] = ()) -> Parser:
    """Returns the parser of ``unclip``, whose result has the command's name in ``command``, and maybe its ``main``.

    Commands of installed packages are left out, and not imported, where ``words`` begin with one of ours. Raises
    UserError for one that cannot be used.
    """
    parser = Parser(
        prog="unclip",
        usage="unclip COMMAND ...",
        description="Train your own text-to-image model, from image-caption pairs to 1024 px images.",
        epilog=f"unclip COMMAND --help shows the options of a command; exit codes are in {page('commands')}.",
    )
    parser.add_argument("-V", "--version", nargs=0, action=_Version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog="unclip")
    for name, command in (COMMANDS if words and words[0] in COMMANDS else COMMANDS | _installed()).items():
        below = add_below(commands, name, command.text)
        below.set_defaults(main=command.main)
        command.add(below)
    return parser


def _installed() -> dict[str, Command]:
    from pipeline.plugins import broken, plugins  # imports importlib.metadata, as _Version does

    for name, command in plugins(GROUP).items():
        if not isinstance(command, Command) or command.main is None:
            raise broken(GROUP, name, "it is not a unclip.commands.Command with a main")
        if name in COMMANDS:
            raise broken(GROUP, name, "its name is taken")
    return plugins(GROUP)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata  # half of the time that any other command takes to read its words

        say(f"unclip {importlib.metadata.version('unclip-ray')}")
        parser.exit()


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields the parsers below one that have no further commands."""
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for choices in below:
        for one in dict.fromkeys(choices.values()):  # some have two names
            yield from leaves(one)


def takes_config(parser: Parser, nargs: str | None = None) -> None:
    """Adds ``config``, a project's file, and ``overrides``, values in place of the file's."""
    text = "a project's YAML file, or nano or demo"
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", type=given, help=text)
    takes_values(parser, "KEY=VALUE", OVERRIDES)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def _verbose(parser: Any) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="print each stage's cost, and every change")


def _stages(parser: Parser) -> None:
    parser.add_argument("--only", metavar="STAGE", help="make only this stage; its inputs must exist")
    parser.add_argument("--until", metavar="STAGE", help="make this stage and all its inputs")
    parser.add_argument("--yes", action="store_true", help="continue above run.budget_hours, and without a GPU")


def _init(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the project's name; NAME.yaml is written")
    takes_lists(parser, "*")
    parser.add_argument("--from", dest="origin", metavar="WHERE", help=f"fine-tune: start from the bundle of {PLACES}")


def _doctor(parser: Parser) -> None:
    takes_config(parser, "?")
    _json(parser)


def _run(parser: Parser, shipped: str = "") -> None:
    if shipped:
        parser.set_defaults(config=shipped)
        takes_values(parser, "KEY=VALUE", OVERRIDES)
    else:
        takes_config(parser)
    _stages(parser)
    how = parser.add_mutually_exclusive_group()
    _verbose(how)
    takes_quiet(how)
    parser.add_argument("-n", "--dry-run", action="store_true", help="print the plan and make nothing")
    parser.add_argument("--events", type=Path, metavar="FILE", help="append events to this file as JSON lines")


def _plan(parser: Parser) -> None:
    takes_config(parser)
    text = "first measure for some ten minutes, with few rows and samples; shows how far repeated measurements differ"
    parser.add_argument("--probe", action="store_true", help=text)
    text = "plan from scratch for a list of this size, such as 650M"
    parser.add_argument("--pairs", type=count, metavar="N", help=text)
    parser.add_argument("--gpus", metavar="NxKIND", help="plan trainings and embeddings on GPUs, such as 64xH100")
    text = "assumed share of a GPU's bf16 peak, if none was measured (0.3)"
    parser.add_argument("--utilisation", type=float, metavar="SHARE", help=text)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="use rates measured by make gpu-check")
    _verbose(parser)
    _json(parser)


def _submit(parser: Parser) -> None:
    takes_config(parser)
    text = (
        "local: two nodes on this machine; the address of a cluster's dashboard, such as http://HOST:8265; or kuberay: "
        "print a RayJob for kubectl, and start nothing"
    )
    parser.add_argument("--to", metavar="WHERE", required=True, help=text)
    _stages(parser)
    _verbose(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stop", action="store_true", help="stop the jobs of this project there")
    what.add_argument("-d", "--detach", action="store_true", help="submit the job without following it")


def _serve(parser: Parser) -> None:
    text = f"{PLACES}; a release is followed; by default the newest under out/"
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help=text)
    text = (
        "the address of a cluster's dashboard, such as http://HOST:8265; or kuberay: print a RayService of "
        "release:PROJECT.yaml for kubectl"
    )
    parser.add_argument("--to", metavar="WHERE", help=text)
    parser.add_argument("--stop", action="store_true", help="stop the server at --to")
    parser.add_argument("--host", metavar="HOST", help="the address to listen on, as host=HOST")
    parser.add_argument("--port", metavar="PORT", help="the port to listen on, as port=PORT")
    takes_values(parser, "NAME=VALUE", "a setting, such as port=9000")
    parser.epilog = f"Settings are in {page('serve')}."


def _export(parser: Parser) -> None:
    parser.add_argument("source", metavar="WHERE", help=f"{PLACES}, or a folder in diffusers' layout")
    text = "a new folder, s3://BUCKET/PREFIX, or one file, FILE.zip, whose weights are in half precision"
    parser.add_argument("-o", "--to", required=True, metavar="FOLDER", help=text)
    text = "pack training images with this licence, spelled as in your list, into FILE.zip; may be given again"
    parser.add_argument("--license", metavar="NAME", action="append", default=[], help=text)
    text = "bundle (default), for every --from; or diffusers, its layout with a pipeline class"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=text)
    takes_quiet(parser)
    takes_values(parser, "KEY=VALUE", OVERRIDES)


def _show(parser: Parser) -> None:
    takes_config(parser, "?")
    text = "key of an artefact, whose lineage is shown; its first 12 characters are enough"
    parser.add_argument("key", nargs="?", metavar="KEY", help=text)
    parser.add_argument("--store", metavar="URL", help="show all projects in this store, instead of a configuration")
    _json(parser)


def _report(parser: Parser) -> None:
    takes_config(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write it (report.html in run.output)")
    text = "show only images with this licence, spelled as in your list; may be given again"
    parser.add_argument("--license", metavar="NAME", action="append", help=text)
    text = (
        "compare with another bundle: of a project (b.yaml), of a run's output folder, of a release (release:b.yaml), "
        "or current, previous or a key of this project's store"
    )
    parser.add_argument("--against", metavar="OTHER", help=text)


def _actions(parser: Parser, texts: Mapping[str, str], lists: Sequence[str] = ()) -> dict[str, Parser]:
    """Adds a command below one for each text. Each names a configuration, but those of ``lists`` name lists."""
    commands = parser.add_subparsers(dest="action", metavar="COMMAND", required=True)
    found = {name: add_below(commands, name, text) for name, text in texts.items()}
    for name in found.keys() - {*lists}:
        takes_config(found[name])
    return found


def _data(parser: Parser) -> None:
    actions = _actions(
        parser,
        {
            "look": "preview a list before training: its content, rejects and cost",
            "search": "find the images nearest to a caption or an image",
            "retry": "retry rows whose fetch ended with given reasons",
            "forget": "drop images and their captions from all future results",
            "gc": "delete objects that no pin, recent run or running stage needs",
            "check": "verify all objects of the project, and quarantine damaged ones",
            "export": "write curated pairs and embeddings for other tools",
        },
        lists=("look",),
    )
    look, search, retry, forget, gc, check, export = actions.values()
    takes_lists(look, "+", "; or a project's YAML file")
    takes_values(look, "KEY=VALUE", OVERRIDES)
    look.add_argument("--images", type=count, default=100, metavar="N", help="images to fetch, drawn at random (100)")
    look.add_argument("-o", "--output", metavar="FILE", help="where the page goes (look.html)")
    what = search.add_mutually_exclusive_group(required=True)
    what.add_argument("caption", nargs="?", metavar="CAPTION", help="text to search with")
    what.add_argument("--image", metavar="FILE", help="an image to search with, in place of a caption")
    search.add_argument("--count", type=count, default=10, help="number of results (10)")
    search.add_argument("--split", choices=SPLITS, help="search this split only (all)")
    retry.add_argument("--reason", metavar="REASONS", help="such as timeout,http_4xx (all deferred)")
    forget.add_argument("what", nargs="*", metavar="WHAT", help="row keys, references (URLs), sha256 of stored images")
    forget.add_argument("--file", metavar="FILE", help="a text file with one of them per line; - for standard input")
    export.add_argument("-o", "--to", required=True, metavar="FOLDER", help="a folder, or s3://BUCKET/PREFIX")
    export.add_argument("--only", choices=EXPORTS, action="append", default=[], help="write only this one (all three)")
    export.add_argument("--split", choices=SPLITS, action="append", default=[], help="rows of this split only (all)")
    takes_quiet(export)
    gc.add_argument("--yes", action="store_true", help="delete garbage; without it, only list it")
    check.add_argument("names", nargs="*", default=[], metavar="OBJECT", help="paths of objects (all that is needed)")
    check.add_argument("--repair", action="store_true", help="quarantine damage; without it, only report it")
    takes_quiet(check)
    for one, verb in ((gc, "keep"), (check, "verify")):
        text = f"{verb} all that a run of the last days needs (30)"
        one.add_argument("--keep-days", type=float, default=30.0, metavar="DAYS", help=text)
        _json(one)
    gc.add_argument("--grace-hours", type=float, default=24.0, metavar="HOURS", help="from finding to deletion (24)")
    for one in (look, search):
        _json(one)


def _release(parser: Parser) -> None:
    actions = _actions(
        parser,
        {
            "promote": "make this configuration's bundle the release, if the gates hold",
            "rollback": "go back to the previous release",
            "diff": "show how two bundles differ in data, recipe and figures",
            "list": "list all moves of the release",
            "evaluate": "measure the release on the rows of this configuration",
            "take": "let sample and generate --from FOLDER draw with the release",
            "weights": "print the configuration that starts from the release's weights",
        },
    )
    actions["promote"].add_argument(
        "--force", metavar="REASON", help="promote despite the gates; the reason is recorded"
    )
    actions["rollback"].add_argument("--reason", default="", help="reason, for the record")
    for name in ("promote", "rollback"):
        text = "sign the move with this private Ed25519 key, as ssh-keygen writes it"
        actions[name].add_argument("--key", metavar="FILE", help=text)
    named = "current, previous, own (this configuration's), or the beginning of a bundle's key"
    diff = actions["diff"]
    diff.add_argument("first", nargs="?", default="current", metavar="OLD", help=f"{named}; by default current")
    diff.add_argument("second", nargs="?", default="own", metavar="NEW", help="the same; by default own")
    actions["take"].add_argument("folder", metavar="FOLDER", help="output folder to point at the release")
    for name in ("diff", "list"):
        _json(actions[name])


def _unpin(parser: Parser) -> None:
    takes_config(parser)
    parser.add_argument("stage", metavar="STAGE", help="clip, codec or thresholds")
    parser.add_argument("--dry-run", action="store_true", help="list what would become stale, and change nothing")


def _pin(parser: Parser) -> None:
    _unpin(parser)
    text = "pin this artefact (a key, or its first 12 characters); by default the current one"
    parser.add_argument("--key", help=text)


def _completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


COMMANDS = {
    "init": Command("write a commented configuration for image-caption pairs of your own", _init),
    "doctor": Command("check machine, packages, store, list, CLIP and Ray before a run", _doctor),
    "peek": Command("run the whole chain at nano size, in minutes (run nano)", partial(_run, shipped="nano")),
    "demo": Command("train the quick start's models, in 20 to 30 minutes (run demo)", partial(_run, shipped="demo")),
    "run": Command("make all stale stages of a configuration", _run),
    "plan": Command("show what a run would make, why, and its estimated cost", _plan),
    "submit": Command("run a configuration on a cluster and follow it", _submit),
    "sample": Command("draw images for captions", add_sample),
    "generate": Command("draw images for a list of prompts, on many workers", add_generate),
    "serve": Command("draw from a page, and from any client of OpenAI's image API", _serve),
    "edit": Command("vary, interpolate, change or decompose images of your own", add_edit),
    "redraw": Command("redraw an image from its recipe, unchanged or with other values", add_redraw),
    "export": Command("write a bundle as a folder or one file to share, or for diffusers", _export),
    "show": Command("show runs, what is being made and where, or the lineage of an artefact", _show),
    "report": Command("write the report again, for example with images of some licences only", _report),
    "data": Command("search and export images, retry failed rows, forget rows, check, collect garbage", _data),
    "release": Command("promote a bundle that is not worse, roll back, compare", _release),
    "pin": Command("keep this CLIP, codec or thresholds when data is added", _pin),
    "unpin": Command("lift a pin", _unpin),
    "completion": Command("print the completion script of a shell", _completion),
}
