"""Readers of lists that misbehave, for a child of pipeline.data.source.child (see test_child.py)."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.source.child import Budget
from pipeline.data.source.rows import sidecar  # imports pyarrow, as real readers do, which starts a thread


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
    if how == "crash":
        os.abort()
    elif how == "spin":
        while True:
            pass
    elif how == "sleep":
        time.sleep(60)
    elif how == "eat":
        held = []
        while True:
            held.append(bytes(1 << 20))
    elif how == "raise":
        raise KeyError("a bug")
    elif how == "killed":
        os.kill(os.getpid(), 9)


def broken(file: BinaryIO, path: Path, budget: Budget, *arguments: Any) -> Iterator[Any]:
    """Reads what lies beside images, until that of the image 1 crashes the child."""
    if path.stem == "1":
        os.abort()
    yield from sidecar(file, path, budget, *arguments)


def lie(message: bytes) -> None:
    """Answers a request as a child that has been taken over may."""
    connection = socket.socket(fileno=os.dup(0))
    connection.recv(1 << 16)
    connection.sendall(message)
    time.sleep(60)
