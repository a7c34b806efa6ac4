"""The progress line of workers that are elsewhere."""

import logging
import threading
from collections.abc import Callable

import pytest

from pipeline.training.follow import following


def test_it_ends_where_the_workers_ended(capsys: pytest.CaptureFixture[str]) -> None:
    samples = iter([16, 32, 64])
    last = 64
    with following("decoder", 96, lambda: next(samples, last), every_s=0.01):
        pass
    assert "decoder: " in capsys.readouterr().err
    assert "follow" not in {thread.name for thread in threading.enumerate()}


def test_a_store_that_does_not_answer_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> int:
        raise OSError("no route to the store")

    silent: Callable[[], int] = broken
    with caplog.at_level(logging.WARNING), following("decoder", 96, silent, every_s=0.01):
        pass
    assert "decoder: its progress cannot be shown any more: no route to the store" in caplog.text


def test_errors_of_the_training_pass_through() -> None:
    with pytest.raises(KeyError), following("decoder", 96, lambda: 0, every_s=0.01):
        raise KeyError("x")
