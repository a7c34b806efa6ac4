"""Renders a job as a RayJob of KubeRay (ray.io/v1), in YAML. Pure; nothing is sent.

The cluster comes with the job and goes with it. KubeRay's autoscaler adds pods while a stage asks for them and removes
those that are idle, so no GPU stands by while images are fetched. A job that fails is tried again on a new cluster,
because what a stage has done is in the store and is not done again.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

import yaml

from cluster.job import Job
from cluster.pods import OBJECT_STORE, Group, groups
from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.settings import KubernetesSettings

RETRIES = 2  # new clusters after one that failed; a mistake that only a cluster notices costs as many starts
IDLE_S = 60  # after which an idle worker pod is removed
KEPT_S = 300  # a finished cluster stays, for its dashboard
NCCL_MB = 1024  # beside it in /dev/shm, where NCCL has the buffers between GPUs of a pod
HEAD_MB = 2048  # of the head's memory, for Ray's own processes there
LONGEST_NAME = 47  # characters; KubeRay adds to it and has to stay below 63
SECRETS = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)
# Labels, and often taints, of nodes that can be taken away: of EKS, Karpenter, GKE and AKS.
SPOT = {
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def render(job: Job, package: str, run: Run, stages: Collection[str]) -> str:
    """Returns the YAML of the RayJob that runs ``job``.

    Args:
        job: What the driver runs, in the unpacked package.
        package: The s3:// URL of the package.
        run: The run settings, which say what workers take and what pods have.
        stages: The stages that have to be made.

    Raises:
        UserError: The image is missing, the job's environment has a secret or something that would not reach the driver
            as it is, or workers or the driver fit into no pod.
    """
    settings = run.kubernetes
    _check(job, package, settings)
    environment = dict(job.environment)
    spec = {
        "jobId": job.id,
        "entrypoint": _Block(shlex.join(job.command)),
        "runtimeEnvYAML": _Block(yaml.safe_dump({"working_dir": package, "env_vars": environment}, sort_keys=False)),
        "submissionMode": "K8sJobMode",  # kubectl logs job/NAME shows the driver
        "backoffLimit": RETRIES,
        "activeDeadlineSeconds": math.ceil(settings.deadline_hours * 3600),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_S,
        "rayClusterSpec": {
            "rayVersion": metadata.version("ray"),
            "authOptions": {"mode": "token"},  # KubeRay makes the token and its Secret
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_S},  # v1 knows no labels
            "headGroupSpec": _head(settings, environment),
            "workerGroupSpecs": [_workers(group, settings, environment) for group in groups(run, stages)],
        },
    }
    named = {"name": job.id, "namespace": settings.namespace, "labels": {"app.kubernetes.io/name": "unclip"}}
    return yaml.dump(
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": named, "spec": spec},
        Dumper=_Dumper, sort_keys=False, width=120,
    )  # fmt: skip


def _check(job: Job, package: str, settings: KubernetesSettings) -> None:
    if not settings.image:
        raise UserError("run.kubernetes.image: missing; build cluster/Dockerfile, push it, and name it here")
    if len(job.id) > LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.id):
        raise UserError(f"{job.id}: not a name for a RayJob, which has up to {LONGEST_NAME} of a-z, 0-9 and -")
    for name in job.environment:
        if SECRETS.search(name):
            raise UserError(f"{name}: no secret is written into YAML; put it into a Secret, run.kubernetes.secret")
    for name, value in {"package": package, **job.environment}.items():
        if re.search(r"[$`]", value):  # KubeRay hands it to a shell between double quotes
            raise UserError(f"{name}: {value!r} holds $ or `, which would not reach the cluster as it is")
    room_mb = settings.head_memory_gb * 1024 - _object_store_mb(settings.head_memory_gb) - HEAD_MB
    if job.cpus > settings.head_cpus or job.memory_mb > room_mb:
        raise UserError(
            f"run.kubernetes.head_cpus, head_memory_gb: the driver takes {job.cpus:g} cores and {job.memory_mb} MiB, "
            f"but the head has {settings.head_cpus} and, beside Ray's own, {room_mb}; raise them"
        )


def _head(settings: KubernetesSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the head group: Ray hands out none of its cores and GPUs, so no worker crowds the driver."""
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    template = _pod("ray-head", settings.head_cpus, settings.head_memory_gb, settings.head_gpus, settings, environment)
    template["spec"]["containers"][0]["ports"] = [{"name": name, "containerPort": p} for name, p in ports.items()]
    template["spec"]["affinity"] = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [_expression(name, "NotIn") for name in SPOT]}]
            }
        }
    }
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", **_store(settings.head_memory_gb)},
        "template": template,
    }


def _workers(group: Group, settings: KubernetesSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    template = _pod("ray-worker", group.cpus, group.memory_gb, group.gpus, settings, environment)
    template["spec"]["restartPolicy"] = "Never"  # else Kubernetes would start again what the autoscaler removes
    if settings.spot:
        template["spec"].setdefault("tolerations", []).extend(
            {"key": name, "operator": "Equal", "value": value, "effect": "NoSchedule"} for name, value in SPOT.items()
        )
        template["spec"]["affinity"] = {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 100, "preference": {"matchExpressions": [_expression(name, "In")]}} for name in SPOT
                ]
            }
        }
    return {
        "groupName": group.name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": group.most,
        **({"labels": dict(group.labels)} if group.labels else {}),
        "rayStartParams": _store(group.memory_gb),
        "template": template,
    }


def _expression(name: str, operator: str) -> dict[str, Any]:
    return {"key": name, "operator": operator, "values": [SPOT[name]]}


def _pod(
    name: str, cpus: int, memory_gb: int, gpus: int, settings: KubernetesSettings, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns a pod template with one container. Requests equal limits, so no pod dies of what another one uses."""
    resources: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory_gb}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    container = {
        "name": name,
        "image": settings.image,
        # Not the job's runtime environment alone: what fetches the package runs before there is one.
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        **({"envFrom": [{"secretRef": {"name": settings.secret}}]} if settings.secret else {}),
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    size = f"{_object_store_mb(memory_gb) + NCCL_MB}Mi"
    spec: dict[str, Any] = {
        "serviceAccountName": settings.service_account,
        "securityContext": {"runAsNonRoot": True},
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}}],
    }
    if gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if settings.gpu_nodes:
            spec["nodeSelector"] = dict(settings.gpu_nodes)
    return {"spec": spec}


def _object_store_mb(memory_gb: int) -> int:
    return int(memory_gb * 1024 * OBJECT_STORE)


def _store(memory_gb: int) -> dict[str, str]:
    return {"object-store-memory": str(_object_store_mb(memory_gb) << 20)}


class _Block(str):
    """Text that YAML writes as a block."""


class _Dumper(yaml.SafeDumper):
    """Writes values that are used twice in full, without references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))
