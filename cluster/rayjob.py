"""Renders a job as a RayJob of KubeRay (ray.io/v1), in YAML. Pure; nothing is sent.

The cluster comes with the job and goes with it. KubeRay's autoscaler adds pods while a stage asks for them and removes
those that are idle, so no GPU stands by while images are fetched. A job that fails is tried again on a new cluster,
because what a stage has done is in the store and is not done again.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from typing import Any

import yaml

from cluster.job import Job
from cluster.pods import OF_TASKS, Group, groups, object_store_mb
from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.settings import NO_SECRET, SECRETS, KubernetesSettings

RETRIES = 2  # new clusters after one that failed; a mistake that only a cluster notices costs as many starts
IDLE_S = 60  # after which an idle worker pod is removed
KEPT_S = 300  # a finished cluster stays, for its dashboard
NCCL_MB = 1024  # beside it in /dev/shm for each GPU: NCCL has the buffers between GPUs of a pod there
HEAD_MB = 2048  # of the head's memory, for Ray's own processes there
LONGEST_NAME = 47  # characters; KubeRay adds to it and has to stay below 63
# What Kueue admits has a fixed size from its start to its end. The first autoscaler knows no labels.
GROWING = {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_S}}
QUEUE = "kueue.x-k8s.io/queue-name"
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
        job: Job with the command of the driver, which runs in the unpacked package.
        package: URL of the package, s3://...
        run: Run settings, which say what workers take and what pods have.
        stages: Stages that have to be made.

    Raises:
        UserError: The image is missing, the job's environment has a secret or something that would not reach the driver
            as it is, or workers or the driver fit into no pod.
    """
    settings = run.kubernetes
    _check(job, package, settings)
    environment = {**settings.env, **job.environment}
    spec = {
        "jobId": job.id,
        "entrypoint": Block(shlex.join(job.command)),
        "runtimeEnvYAML": Block(
            yaml.safe_dump({"working_dir": package, "env_vars": dict(job.environment)}, sort_keys=False)
        ),
        "submissionMode": "K8sJobMode",  # kubectl logs job/NAME shows the driver
        "backoffLimit": RETRIES,
        "activeDeadlineSeconds": math.ceil(settings.deadline_hours * 3600),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_S,
        "rayClusterSpec": {
            "rayVersion": metadata.version("ray"),
            "authOptions": {"mode": "token"},  # KubeRay makes the token and its Secret
            **({} if settings.queue else GROWING),
            "headGroupSpec": head(settings, environment),
            "workerGroupSpecs": [workers(group, settings, environment) for group in groups(run, stages)],
        },
    }
    labels = {
        "app.kubernetes.io/name": "unclip",
        **settings.labels,
        **({QUEUE: settings.queue} if settings.queue else {}),
    }
    named = {"name": job.id, "namespace": settings.namespace, "labels": labels}
    return dump({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": named, "spec": spec})


def _check(job: Job, package: str, settings: KubernetesSettings) -> None:
    if not settings.image:
        raise UserError("run.kubernetes.image: missing; build cluster/Dockerfile, push it, and name it here")
    if len(job.id) > LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.id):
        raise UserError(f"{job.id}: not a name for a RayJob, which has up to {LONGEST_NAME} of a-z, 0-9 and -")
    check_no_secret(job.environment)
    for name, value in {"package": package, **job.environment}.items():
        if re.search(r"[$`]", value):  # KubeRay hands it to a shell between double quotes
            raise UserError(f"{name}: {value!r} holds $ or `, which would not reach the cluster as it is")
    room_mb = settings.head_memory_gb * 1024 - object_store_mb(settings.head_memory_gb, OF_TASKS) - HEAD_MB
    if job.cpus > settings.head_cpus or job.memory_mb > room_mb:
        raise UserError(
            f"run.kubernetes.head_cpus, head_memory_gb: the driver takes {job.cpus:g} cores and {job.memory_mb} MiB, "
            f"but the head has {settings.head_cpus} and, beside Ray's own, {room_mb}; raise them"
        )


def check_no_secret(names: Iterable[str]) -> None:
    """Raises UserError for a variable of the environment that is called like a secret."""
    for name in names:
        if SECRETS.search(name):
            raise UserError(f"{name}: {NO_SECRET}")


def head(settings: KubernetesSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the head group: Ray hands out none of its cores and GPUs, so no worker crowds the driver."""
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    own = Group("head", 1, settings.head_cpus, settings.head_memory_gb, settings.head_gpus)
    template = _pod("ray-head", own, settings, environment)
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
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", **_store(own)},
        "template": template,
    }


def workers(group: Group, settings: KubernetesSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns a worker group, which has no pod while nobody asks for one unless a queue admits all at once."""
    template = _pod("ray-worker", group, settings, environment)
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
        **dict.fromkeys(("replicas", "minReplicas"), group.most if settings.queue else 0),
        "maxReplicas": group.most,
        **({"labels": dict(group.labels)} if group.labels else {}),
        "rayStartParams": _store(group),
        "template": template,
    }


def _expression(name: str, operator: str) -> dict[str, Any]:
    return {"key": name, "operator": operator, "values": [SPOT[name]]}


def _pod(name: str, group: Group, settings: KubernetesSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns a pod template with one container. Requests equal limits, so no pod dies of what another one uses."""
    resources: dict[str, Any] = {"cpu": str(group.cpus), "memory": f"{group.memory_gb}Gi"}
    capabilities = {"drop": ["ALL"]}
    if group.gpus:
        resources |= {"nvidia.com/gpu": str(group.gpus), **settings.gpu_resources}
    if group.gpus and settings.gpu_resources:  # network adapters read and write memory that is locked
        capabilities["add"] = ["IPC_LOCK"]
    container = {
        "name": name,
        "image": settings.image,
        # Not the job's runtime environment alone: what fetches the package runs before there is one.
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        **({"envFrom": [{"secretRef": {"name": settings.secret}}]} if settings.secret else {}),
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    size = f"{object_store_mb(group.memory_gb, group.object_store) + NCCL_MB * max(1, group.gpus)}Mi"
    spec: dict[str, Any] = {
        "serviceAccountName": settings.service_account,
        # Without seccompProfile: RuntimeDefault forbids the namespace, without network and credentials, in which
        # strangers' images are decoded (pipeline/sandbox.py). It would cost more than it gains.
        "securityContext": {"runAsNonRoot": True},
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}}],
    }
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in settings.pull_secrets]
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if settings.gpu_nodes:
            spec["nodeSelector"] = dict(settings.gpu_nodes)
    about = {"labels": dict(settings.labels), "annotations": dict(settings.annotations)}
    metadata = {name: values for name, values in about.items() if values}
    return {**({"metadata": metadata} if metadata else {}), "spec": spec}


def _store(group: Group) -> dict[str, str]:
    return {"object-store-memory": str(object_store_mb(group.memory_gb, group.object_store) << 20)}


class Block(str):
    """Text that YAML writes as a block."""


def dump(values: Mapping[str, Any]) -> str:
    """Returns a resource of Kubernetes as YAML."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes values that are used twice in full, without references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))
