"""Scores what Ray's autoscaler launches next: spot machines while AWS has some, else the same on demand.

Ray asks for a function of these arguments in RAY_AUTOSCALER_UTILIZATION_SCORER, which cluster/aws.yaml sets. Its own
knows no spot: it would go on asking for machines that AWS does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SPOT = "-spot"  # ends the names of node types that can be taken away
Score = tuple[bool, bool, bool, int]


def score(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> Score | None:
    """Returns how well one more node of a type serves the requests, or None if nothing fits.

    The type that serves best is launched. First comes a type without an unneeded GPU, then a type that AWS did not
    refuse in the last half hour (which Ray keeps in ``node_availability_summary``), then spot, then the most requests.
    """
    fitting = _fitting(node_resources, resources)
    if not fitting:
        return None
    idle_gpu = node_resources.get("GPU", 0) > 0 and not any(request.get("GPU") for request in resources)
    record = node_availability_summary.node_availabilities.get(node_type)
    return not idle_gpu, record is None or record.is_available, node_type.endswith(SPOT), fitting


def _fitting(node_resources: Mapping[str, float], resources: Sequence[Mapping[str, float]]) -> int:
    """Returns how many of the requests, taken in turn, fit on one node."""
    free, fitting = dict(node_resources), 0
    for request in resources:
        if all(free.get(name, 0) >= amount for name, amount in request.items()):
            fitting += 1
            for name, amount in request.items():
                free[name] = free.get(name, 0) - amount
    return fitting
