"""Checkpoints written beside the steps."""

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.training.distributed.world import World
from pipeline.training.saver import Saver
from tests.pipeline.training.test_checkpoints import make_state


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux only")
def test_writing_gives_way_to_the_steps() -> None:
    before, found = niceness(), []
    course: Any = SimpleNamespace(at=lambda samples: SimpleNamespace(publish=lambda *_: found.append(niceness())))
    with Saver(course, World()) as saver:
        saver.save(make_state())
    assert found == [19]
    assert niceness() == before
