"""What KubeRay makes of a RayJob, as far as the tests need it: read from its source of version 1.6, not run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.job import Job


@dataclass(frozen=True)
class Node:
    """A pod as a Ray node: what KubeRay would start it with, and its container's environment."""

    group: str
    memory: int  # bytes
    object_store: int
    environment: Mapping[str, str]
    secrets: Sequence[str]  # names of Secrets whose entries are in its environment too


@dataclass(frozen=True)
class Rendered:
    """A RayJob, read back: the job, its package, and the nodes of its cluster, the head first."""

    job: Job
    package: str
    nodes: tuple[Node, ...]


def parse(text: str) -> Rendered:
    """A rendered RayJob, read back. The job's cores and memory are those of the head, where its driver runs."""
    spec = yaml.safe_load(text)["spec"]
    runtime = yaml.safe_load(spec["runtimeEnvYAML"])
    cluster = spec["rayClusterSpec"]
    groups = ({"groupName": "head", **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"])
    limits = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    job = Job(
        spec["jobId"],
        tuple(shlex.split(spec["entrypoint"])),
        runtime["env_vars"],
        float(limits["cpu"]),
        quantity(limits["memory"]) >> 20,
    )
    return Rendered(job, runtime["working_dir"], tuple(map(_node, groups)))


def _node(group: Mapping[str, Any]) -> Node:
    container = group["template"]["spec"]["containers"][0]
    return Node(
        group["groupName"],
        quantity(container["resources"]["limits"]["memory"]),
        int(group["rayStartParams"]["object-store-memory"]),
        {entry["name"]: entry["value"] for entry in container["env"]},
        [entry["secretRef"]["name"] for entry in container.get("envFrom", [])],
    )


def quantity(text: str) -> int:
    """Bytes of a quantity of memory."""
    unit = {"Gi": 30, "Mi": 20, "Ki": 10}[text[-2:]]
    return int(text[:-2]) << unit


def submit_command(text: str, address: str) -> str:
    """The shell command by which KubeRay's submitter, in K8sJobMode, hands a RayJob to its cluster."""
    spec = yaml.safe_load(text)["spec"]
    environment = json.dumps(yaml.safe_load(spec["runtimeEnvYAML"]))
    quoted = json.dumps(environment, ensure_ascii=False)  # as Go's strconv.Quote does for text that can be printed
    return (
        f"ray job submit --address {address} --runtime-env-json {quoted} --submission-id {spec['jobId']} "
        f"-- {spec['entrypoint'].strip()} ;"
    )
