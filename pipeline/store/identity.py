"""Who works, and where: for people who share a store. Never part of a key."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping
from typing import Any


def whoami() -> dict[str, str]:
    """User and host of this process; no user where the system has no name for it, as in some containers."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = ""
    return {"user": user, "host": socket.gethostname()}


def named(by: Mapping[str, Any]) -> str:
    """'ana@gpu-7'; "" if nothing is known, as of records that are older than this."""
    return "@".join(str(by[name]) for name in ("user", "host") if by.get(name))
