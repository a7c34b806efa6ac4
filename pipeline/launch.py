"""Ray, started once and only when something needs it."""

from __future__ import annotations

import logging
import os
from typing import Any

from pipeline.errors import UserError
from pipeline.settings import RaySettings


def start_ray(settings: RaySettings) -> Any:
    """Join the cluster that RAY_ADDRESS names, or start one in this machine that ends with this process.

    Returns the ``ray`` module. Raises UserError if the named cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core warns on the console of what Ray Data does with its own actors; nobody here can act on it.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import ray

    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as e:
            raise UserError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {str(e).splitlines()[0]}") from e
    else:
        ray.init(
            address="local",
            num_cpus=settings.cpus,
            object_store_memory=settings.object_store_mb << 20,
            include_dashboard=False,
            **quiet,
        )
    return ray
