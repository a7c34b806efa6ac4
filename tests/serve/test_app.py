"""What a server does before it listens, and how a process that draws follows a release: without Ray."""

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from serve.app import Drawer, _hold_port
from serve.settings import ServeSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_another_server_listens_at_is_refused(host: str) -> None:
    """Also one that would share it, as Ray Serve does."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"{port} cannot be listened at .* port="):
            _hold_port(ServeSettings(host=host, port=port))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_free_port_is_held_until_ray_serve_listens_there(host: str) -> None:
    """Nobody else gets it meanwhile, and connections go to Ray Serve, not to the socket that holds it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _hold_port(ServeSettings(host=host, port=0)) as held:
        address = held.getsockname()
        with pytest.raises(OSError, match="in use"):
            socket.create_server(address[:2], family=family)
        with socket.socket(family) as proxy:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # both, as Ray Serve does
                proxy.setsockopt(socket.SOL_SOCKET, option, 1)
            proxy.bind(address)
            proxy.listen()
            for _ in range(20):
                with socket.create_connection(address[:2], timeout=10), proxy.accept()[0]:
                    pass
            held.close()
            with socket.create_connection(address[:2], timeout=10), proxy.accept()[0]:
                pass


class Releases:
    """A store whose release, and whether it can be looked up and opened, are as they are set."""

    key = ""

    def __init__(self) -> None:
        self.release, self.silent, self.broken = "a", False, False

    def current(self) -> str:
        if self.silent:
            raise OSError("the bucket does not answer")
        return self.release


def test_a_release_is_followed_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    releases: Any = Releases()

    def opened(_: Drawer, key: str) -> Any:
        if releases.broken:
            raise OSError("connection reset")
        return SimpleNamespace(key=key, describe=lambda: {"bundle": key})

    def until(wanted: Any) -> None:
        deadline = time.monotonic() + 30
        while (found := (drawer.next or drawer.painter).key, bool(drawer.warning)) != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    monkeypatch.setattr(Drawer, "_open", opened)
    drawer = Drawer(releases, ServeSettings(follow_s=0.02))
    releases.silent = True
    until(("a", True))
    releases.silent = False
    until(("a", False))
    releases.broken, releases.release = True, "b"
    until(("a", True))
    releases.broken = False
    until(("b", False))
