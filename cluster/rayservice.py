"""Renders ``unclip serve`` as a RayService of KubeRay (ray.io/v1), in YAML. Pure; nothing is sent.

KubeRay brings the cluster, keeps the application running, and replaces a cluster by a new one beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cluster.pods import Group
from cluster.rayjob import LONGEST_NAME, check_pods, fill
from pipeline.errors import UserError
from pipeline.settings import KubernetesSettings

PORT = 8000


def render_service(
    project: str,
    arguments: Mapping[str, Any],
    replicas: int,
    settings: KubernetesSettings,
    environment: Mapping[str, str],
) -> str:
    """Returns the YAML of the RayService of a project.

    Args:
        project: Name of the project, from which the RayService gets its own.
        arguments: Arguments of the application's builder.
        replicas: Pods that draw, at most; the autoscaler adds and removes them.
        settings: Settings of the pods.
        environment: Environment variables of the submitter, which pods get besides those of the settings.

    Raises:
        UserError: Without an image or the Secret that holds the tokens, and for a secret among the environment.
    """
    check_pods(settings, environment)
    if not settings.secret:
        raise UserError(
            "run.kubernetes.secret: missing; name a Secret whose entry UNCLIP_TOKENS holds lines NAME TOKEN, without "
            "which anybody could draw"
        )
    gpus = settings.gpus
    shape = settings.cpus, settings.memory_gb
    if gpus:  # a pod draws on one GPU, so it takes that GPU's share of a node
        shape = max(1, settings.gpu_cpus // gpus), max(1, settings.gpu_memory_gb // gpus)
    return fill(
        "rayservice",
        settings,
        {**environment, **settings.env},
        [Group("replicas", replicas, *shape, min(gpus, 1))],
        grows=True,
        labels={},
        name=f"unclip-{re.sub(r'[^a-z0-9]+', '-', project.lower()).strip('-')}"[:LONGEST_NAME].strip("-"),
        arguments=arguments,
        port=PORT,
        drain_s=math.ceil(arguments["settings"]["drain_s"]),
    )
