"""Calls an object that all workers of a driver share, such as what they have found out for each other."""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

ANSWER_S = 30.0  # after which a call is given up: what is shared only saves work
log = logging.getLogger("unclip")


def call_shared(kind: type, method: str, *values: Any) -> Any:
    """Calls a method of the one object of this class that all workers of this driver share.

    It lives in a process of its own, which ends with the worker that asked first; the next starts without its state.

    Returns None where this process has no Ray, or the object does not answer.
    """
    if (ray := sys.modules.get("ray")) is None or not ray.is_initialized():
        return None
    try:
        return ray.get(getattr(_shared(kind), method).remote(*values), timeout=ANSWER_S)
    except (ray.exceptions.RayError, ValueError) as e:  # ValueError: that worker's end took the name with it just now
        log.debug("%s did not answer: %s", kind.__name__, e)
        _shared.cache_clear()
        return None


@cache  # it lives as long as the first handle to it
def _shared(kind: type) -> Any:
    import ray

    return ray.remote(kind).options(name=f"unclip {kind.__name__}", get_if_exists=True, num_cpus=0).remote()
