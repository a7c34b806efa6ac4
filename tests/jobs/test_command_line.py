"""The words of the commands: options and values anywhere, help and completion without anything heavy."""

import gc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from jobs.command_line import COMMANDS, EXPORTS, FORMATS, MODULES, SHELLS, SPLITS, command_line, leaves
from jobs.export import LOADING
from pipeline.data import export
from pipeline.data.pairs import row_index
from pipeline.errors import UserError
from tests.chain import ROOT, done, here

SEARCH = {"config": "a.yaml", "caption": "a pink flower", "count": 3, "overrides": ["preset=nano"]}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["data", "search", "a.yaml", "preset=nano", "a pink flower", "--count", "3"], SEARCH),
        (["data", "search", "--count=3", "--set", "preset=nano", "a.yaml", "a pink flower"], SEARCH),
        (["data", "search", "a.yaml", "--count", "3", "--set=preset=nano", "a pink flower"], SEARCH),
        (["peek", "scale=2", "-q"], {"config": "nano", "overrides": ["scale=2"], "quiet": True}),
        (["pin", "a.yaml", "preset=nano", "clip"], {"stage": "clip", "overrides": ["preset=nano"]}),
        (["release", "diff", "a", "current", "x=1", "--set", "y=2"], {"first": "current", "overrides": ["x=1", "y=2"]}),
        (["sample", "E=mc2 on a board", "size=64"], {"captions": ["E=mc2 on a board"], "overrides": ["size=64"]}),
        (["sample", "size=64", "--", "a=b", "-x"], {"captions": ["a=b", "-x"], "overrides": ["size=64"]}),
        (["sample", "a cat", "--num-images", "4", "--steps=9"], {"overrides": ["num_images=4", "steps=9"]}),
        (["edit", "textdiff", "a.png", "a", "b"], {"kind": "change"}),
        (["edit", "priors", "a cat", "prior=ar"], {"caption": "a cat", "overrides": ["prior=ar"]}),
        (["run", "a.yaml", 'samples.captions=["a cat"]'], {"overrides": ['samples.captions=["a cat"]']}),
        (["release", "promote", "a.yaml", "--force", "x=y"], {"force": "x=y", "overrides": []}),
        (["report", "-omine.html", "a.yaml"], {"output": "mine.html"}),
        (["data", "forget", "a.yaml", "http://a/b?c=d", "0001"], {"what": ["http://a/b?c=d", "0001"]}),
        (["plan", "a.yaml", "--pairs", "1e6"], {"pairs": 1_000_000}),
    ],
)
def test_options_and_values_stand_anywhere(words: list[str], values: dict[str, object]) -> None:
    found = vars(command_line().parse_args(words))
    assert {name: found[name] for name in values} == values


def test_help_version_and_completion_import_nothing_heavy() -> None:
    heavy = {"pydantic", "dataclasses", "pyarrow", "yaml", "numpy", "torch", "ray"}
    code = "import sys; from jobs.cli import main\ntry: main(sys.argv[1:])\nfinally: assert not HEAVY & {*sys.modules}"
    code = code.replace("HEAVY", str(heavy))
    for words in (["--help"], ["help", "plan"], ["edit", "priors", "-h"], ["-V"], ["completion", "bash"], ["rnu"]):
        process = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert "Error" not in process.stderr
        assert process.stdout.startswith(("usage: unclip", "unclip 0", "#")) or words == ["rnu"]


def test_a_long_path_in_the_help_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of an installed package: a terminal may be narrower, and paths have hyphens."""
    path = f"/home/some-body/{'a-long-folder/' * 6}site-packages/pipeline/docs/commands.md"
    monkeypatch.setattr("jobs.command_line.page", lambda name: path)
    monkeypatch.setenv("COLUMNS", "60")
    said = command_line().format_help()
    assert path in said
    assert all(len(line) <= 60 or path in line for line in said.splitlines())


def test_every_command_is_a_module_that_takes_its_words() -> None:
    for name in COMMANDS:
        assert callable(import_module(f"jobs.{MODULES.get(name, name)}").main)
        assert f"\n    {name}" in done(here("help"))
    for leaf in leaves(command_line()):
        assert all(action.help for action in leaf._actions)
        assert "``" not in leaf.format_help()


def test_words_that_stand_here_are_those_of_the_code() -> None:
    """The parsers import nothing heavy, so they cannot read these."""
    assert SPLITS == row_index.SPLITS
    assert tuple(export.KINDS) == EXPORTS
    assert tuple(LOADING) == FORMATS


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_options_and_files(shell: str, tmp_path: Path) -> None:
    script = done(here("completion", shell))
    assert gc.isenabled()  # it is off while a command is imported
    assert "interpolate" in script
    assert "--until" in script or "until" in script
    if shell == "bash":
        (tmp_path / "mine.yaml").touch()
        (tmp_path / "complete.sh").write_text(script)
        code = (
            'source ./complete.sh; tried() { COMP_WORDS=(unclip "$@"); COMP_CWORD=$#; COMPREPLY=(); _shtab_unclip '
            'unclip "${!#}" ""; echo "${COMPREPLY[@]}"; }; tried re; tried run --unt; tried plan mi; tried data se'
        )
        said = done(subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True))
        assert [line.strip() for line in said.splitlines()] == [
            "redraw report release",
            "--until",
            "mine.yaml",
            "search",
        ]


def test_a_module_and_an_unknown_command_are_told_apart() -> None:
    with pytest.raises(UserError, match="unknown command command_line"):
        command_line().parse_args(["command_line"])
