"""Readers of lists that misbehave, for a child of pipeline.data.source.parsers (see test_child.py)."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa  # as real readers do, which starts a thread

from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.sidecars import sidecar


def rights(file: BinaryIO, path: Path, budget: Budget) -> Iterator[list[Any]]:
    """Says what the child may do."""
    yield ["secret", os.environ.get("AWS_SECRET_ACCESS_KEY")]
    for name, what in (
        ("read", lambda: path.read_bytes()),
        ("write", lambda: Path(f"{path}.new").write_bytes(b"x")),
        ("remove", lambda: path.unlink()),
        ("connect", lambda: socket.create_connection(("127.0.0.1", int(path.stem)), 1)),
        ("environment", lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes()),
    ):
        try:
            what()
        except OSError:
            yield [name, "refused"]
        else:
            yield [name, "done"]


def failing(file: BinaryIO, path: Path, budget: Budget, how: str) -> Iterator[Any]:
    """Yields 5,000 rows, and then fails."""
    for i in range(5_000):
        yield [str(i), "a"]
    held = [pa.scalar(0)]
    match how:
        case "crash":
            os.abort()
        case "killed":
            os.kill(os.getpid(), 9)
        case "raise":
            raise KeyError("a bug")
        case "sleep":
            time.sleep(60)
    while how in ("spin", "eat"):
        held += [bytes(1 << 20)] * (how == "eat")


def broken(file: BinaryIO, path: Path, budget: Budget, *arguments: Any) -> Iterator[Any]:
    """Reads what lies beside images, until that of the image 1 crashes the child."""
    if path.stem == "1":
        os.abort()
    yield from sidecar(file, path, budget, *arguments)
