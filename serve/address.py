"""The address that a server listens at. Imports nothing heavy: a port in use is said at once."""

from __future__ import annotations

import socket

from pipeline.errors import UserError
from serve.settings import ServeSettings


def listen(settings: ServeSettings) -> socket.socket:
    """Returns a socket bound to the address of the settings, whose port is any free one for 0.

    It takes no connections yet. Raises UserError if another process listens there.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
        # Linux lets several sockets bind one address with SO_REUSEADDR as long as none of them listens.
        bound.listen()
    except OSError as e:
        bound.close()
        raise UserError(
            f"serve: cannot listen at {settings.host}:{settings.port} ({e.strerror}); name another port with port="
        ) from None
    return bound


def url_host(host: str) -> str:
    """Returns how an address is told from this machine that listens at ``host``, as a URL has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
