"""Nothing that a command prints controls the terminal, whoever wrote it."""

import re
import subprocess
import sys
import textwrap

import pytest

from pipeline.progress import ProgressLine
from pipeline.terminal import Printable, printable
from tests.chain import ROOT
from tests.pipeline.conftest import Terminal

HOSTILE = "\x1b]0;PWNED\x07 \x9b2J\r\b\x7f\x00 \u202egnp.exe\u2066 \udc80"


def test_what_controls_a_terminal_is_escaped_and_the_rest_stays() -> None:
    escaped = r"\x1b]0;PWNED\x07 \x9b2J\r\x08\x7f\x00 \u202egnp.exe\u2066 \udc80"
    assert printable(HOSTILE) == escaped
    assert printable("a\tb\nç 心 🎉 עברית\u200f") == "a\tb\nç 心 🎉 עברית\u200f"


def test_the_reset_of_colours_at_exit_is_not_printed() -> None:
    """A run on a terminal ended with a line of four escaped characters."""
    terminal = Terminal()
    Printable(terminal).write("\x1b[0m")  # as colorama does, which comes with Ray
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ('UserError("refused " + argv[0])', 2, ("noted", "warned", "refused")),
        ('KeyError("lost " + argv[0]) from ValueError("why " + argv[0])', 1, ("noted", "warned", "why")),
    ],
)
def test_every_word_of_a_command_passes_the_gate(ends: str, code: int, words: tuple[str, ...]) -> None:
    """What it prints, warns of, logs and ends with, a traceback too."""
    command = f"""
        import logging, sys
        from jobs.cli import guard
        from pipeline.errors import UserError

        def command(argv):
            print("said", argv[0])
            sys.stdout.writelines(["line ", argv[0], chr(10)])
            print("noted", argv[0], file=sys.stderr)
            logging.getLogger("unclip").warning("warned %s", argv[0])
            raise {ends}

        sys.exit(guard(command, [{HOSTILE!r}]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(command)], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    assert (b"Traceback" in done.stderr) == (code == 1)
    said, noted = done.stdout.decode(), done.stderr.decode()
    for text, expected in ((said, ("said", "line")), (noted, words)):
        assert text.replace("\n", "") == printable(text).replace("\n", "")
        for word in expected:
            assert f"{word} {printable(HOSTILE)}\n" in text


def test_nothing_writes_around_the_gate() -> None:
    """Words of ours at Ctrl-C, and what Ray's core of this machine says as it starts, are all that does."""
    around = re.compile(r"os\.write\(\s*[12]\b|sys\.__std|\.buffer\.write|std(out|err)\.unfiltered")
    files = [
        file
        for folder in ("jobs", "pipeline", "cluster", "serve", "models", "unclip")
        for file in (ROOT / folder).rglob("*.py")
    ]
    found = {file.relative_to(ROOT).as_posix() for file in files if around.search(file.read_text())}
    assert found == {"jobs/interrupt.py", "pipeline/graph/ray.py"}
    commands = [file for file in (ROOT / "jobs").glob("*.py") if "__main__" in file.read_text()]
    assert all("guard(" in file.read_text() or file.name == "cli.py" for file in commands)
    assert "with printable_streams():" in (ROOT / "serve" / "__main__.py").read_text()


def test_a_line_that_is_rewritten_in_place_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    with ProgressLine(stream=Printable(terminal)) as line:
        line.shown -= 10
        line.show(lambda: f"pairs: following {HOSTILE}")
    assert terminal.getvalue() == f"\r\x1b[K  pairs: following {printable(HOSTILE)}\r\x1b[K"
