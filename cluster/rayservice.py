"""Renders ``unclip serve`` as a RayService of KubeRay (ray.io/v1), in YAML. Pure; nothing is sent.

KubeRay brings the cluster, keeps the application running, and replaces a cluster by a new one beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import yaml

from cluster.pods import Group
from cluster.rayjob import GROWING, LONGEST_NAME, Block, check_no_secret, dump, head, workers
from pipeline.errors import UserError
from pipeline.settings import KubernetesSettings

PORT = 8000
GRACE_S = 30  # for the processes of a pod to end when its requests are answered
BUILDER = "serve.app:application"  # in the image


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
    if not settings.image:
        raise UserError("run.kubernetes.image: missing; build cluster/Dockerfile, push it, and name it here")
    if not settings.secret:
        raise UserError(
            "run.kubernetes.secret: missing; name a Secret whose entry UNCLIP_TOKENS holds lines NAME TOKEN, without "
            "which anybody could draw"
        )
    check_no_secret(environment)
    environment = {**environment, **settings.env}
    name = f"unclip-{re.sub(r'[^a-z0-9]+', '-', project.lower()).strip('-')}"[:LONGEST_NAME].strip("-")
    application = {"name": "unclip", "route_prefix": "/", "import_path": BUILDER, "args": dict(arguments)}
    # Load balancers keep connections for 60 s, and must be the ones to close them.
    http = {"host": "0.0.0.0", "port": PORT, "keep_alive_timeout_s": 65}
    served = {"http_options": http, "applications": [application]}
    gpus = settings.gpus
    shape = settings.cpus, settings.memory_gb
    if gpus:  # a pod draws on one GPU, so it takes that GPU's share of a node
        shape = max(1, settings.gpu_cpus // gpus), max(1, settings.gpu_memory_gb // gpus)
    group = Group("replicas", replicas, *shape, min(gpus, 1))
    drain_s = math.ceil(arguments["settings"]["drain_s"])
    spec = {
        "rayClusterDeletionDelaySeconds": drain_s,  # of the old cluster, when a new one has taken its traffic
        "serveConfigV2": Block(yaml.safe_dump(served, sort_keys=False)),
        "rayClusterConfig": {
            "rayVersion": metadata.version("ray"),
            "authOptions": {"mode": "token"},
            **GROWING,
            "headGroupSpec": _serving(_drained(head(settings, environment), drain_s)),
            "workerGroupSpecs": [_drained(workers(group, settings, environment), drain_s)],
        },
    }
    labels = {"app.kubernetes.io/name": "unclip", **settings.labels}
    named = {"name": name, "namespace": settings.namespace, "labels": labels}
    return dump({"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": named, "spec": spec})


def _serving(group: dict[str, Any]) -> dict[str, Any]:
    """Returns the head's group with the port for which older KubeRay makes the Service of the API."""
    group["template"]["spec"]["containers"][0]["ports"].append({"name": "serve", "containerPort": PORT})
    return group


def _drained(group: dict[str, Any], drain_s: int) -> dict[str, Any]:
    """Returns a group whose pods go on for ``drain_s`` seconds after they were told to end.

    Kubernetes sends them nothing new by then. It would end the gateway and what draws for it at once, and kill both
    after 30 s.
    """
    spec = group["template"]["spec"]
    spec["terminationGracePeriodSeconds"] = drain_s + GRACE_S
    spec["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(drain_s)]}}}
    return group
