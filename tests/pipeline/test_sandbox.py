"""Children: the code that they find, and messages of one that somebody may have taken over."""

import io
import os
import site

import pytest

from pipeline.sandbox import python_path, receive, send
from tests.chain import ROOT


def test_a_child_of_installed_code_finds_the_standard_library_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside the installed code is called ``dataclasses``."""
    monkeypatch.setenv("PYTHONPATH", "given")
    assert python_path() == os.pathsep.join([str(ROOT), "given"])
    monkeypatch.setattr(site, "getsitepackages", lambda: ["/elsewhere", str(ROOT)])
    assert python_path() == "given"


def test_a_message_is_received_as_it_was_sent() -> None:
    pipe = io.BytesIO()
    send(pipe, ["rows", 1], b"body")
    send(pipe, None, b"")
    pipe.seek(0)
    assert receive(pipe) == (["rows", 1], b"body")
    assert receive(pipe, most=0) == (None, b"")
    with pytest.raises(EOFError):
        receive(pipe)


@pytest.mark.parametrize(
    "line",
    ['["rows", -1]', '["rows", 11]', '["rows", 1.0]', '["rows", true]', '["rows", Infinity]', "1", "[1]", "[" * 990],
    ids=lambda line: line[:16],
)
def test_anything_but_a_message_is_a_value_error(line: str) -> None:
    pipe = io.BytesIO(line.encode() + b"\n" + b"x" * 100)
    with pytest.raises(ValueError, match="message"):
        receive(pipe, most=10)
