"""A command is one file in an installed package, found by the command line: that of ``examples/add_command.py``."""

from pathlib import Path

import pytest
from PIL import Image

from tests.chain import ROOT, done, write_config, write_list
from tests.pipeline.data.bench import save_clip
from tests.plugin import install, run_with

EXAMPLE = (ROOT / "examples/add_command.py").read_text()


def test_it_is_found_helped_and_run(tmp_path: Path, pictures: str) -> None:
    site = install(tmp_path / "site", "unclip.commands", "contact-sheet", "add_command:CONTACT_SHEET", EXAMPLE)
    assert "\n    contact-sheet\n                 show curated pairs" in done(run_with(site, "--help"))
    assert "contact-sheet CONFIG [KEY=VALUE ...]" in done(run_with(site, "contact-sheet", "--help"))
    assert "contact-sheet" in done(run_with(site, "completion", "bash"))
    mistake = run_with(site, "contact-shet", "a.yaml")
    assert mistake.returncode == 2
    assert "unknown command contact-shet; did you mean contact-sheet?" in mistake.stderr
    rows, clip = [write_list(tmp_path / "list.csv", 30, 50)], {"weights": save_clip(tmp_path / "clip")}
    config = write_config(tmp_path, str(tmp_path / "store"), pictures, rows, clip=clip)
    file = tmp_path / "sheet.png"
    early = run_with(site, "contact-sheet", config, "-o", file)
    assert early.returncode == 2
    assert early.stderr.startswith("error: micro: not made for the current list and recipes: pairs")
    done(run_with(site, "run", config, "--until", "curation"))
    assert done(run_with(site, "contact-sheet", config, "-o", file, "--pairs", "8")) == f"8 pairs: {file}\n"
    assert Image.open(file).size == (6 * 192, 2 * 208)


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("mine", "1 / 0", "ZeroDivisionError: division by zero"),
        ("mine", "MINE = 7", "it is not a unclip.commands.Command with a main"),
        ("run", EXAMPLE + "MINE = CONTACT_SHEET", "its name is taken"),
    ],
)
def test_a_broken_one_is_named_and_leaves_our_commands_alone(tmp_path: Path, name: str, code: str, why: str) -> None:
    site = install(tmp_path, "unclip.commands", name, "a_broken_command:MINE", code)
    said = run_with(site, "--help")
    sentence = f"command {name} (a_broken_command:MINE) cannot be used: {why}; correct or uninstall a_broken_command"
    assert (said.returncode, said.stderr) == (2, f"error: {sentence}-of-mine\n")
    assert done(run_with(site, "plan", "--help"))
