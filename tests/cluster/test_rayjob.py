"""RayJobs: read back, they are the job; and what must never be in one is in none."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster.job import Job
from cluster.manifests import render_job
from pipeline.config import Run, make_config
from pipeline.errors import UserError
from tests.cluster.kuberay import parse, quantity, submit_command
from tests.cluster.published import validate

PACKAGE = "s3://bucket/birds/packages/birds/1-0123456789abcdef.zip"
STAGES = ("pairs", "embeddings", "decoder")
JOB = Job(
    "unclip-birds-0123456789abcdef",
    ("python", "-m", "jobs.cli", "run", "project.yaml", "--until=decoder", "--yes"),
    {"AWS_ENDPOINT_URL": "http://seaweed:8333", "AWS_REGION": "us-west-2"},
    1.0,
    4096,
)
SPOT = {
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
RUN = {
    "kubernetes": {
        "image": "registry.example.org/unclip:0.1.0",
        "namespace": "pictures",
        "service_account": "unclip",
        "secret": "store-keys",
        "spot": True,
        "gpus": 4,
        "gpu_nodes": {"nvidia.com/gpu.product": "NVIDIA-L4"},
        "deadline_hours": 1.5,
    },
    "pairs": {"workers": 12, "nodes": {"pool": "cpu"}},
    "embeddings": {"workers": 2, "gpus": 1, "nodes": {"pool": "gpu"}, "decoders": 6, "decoder_nodes": {"pool": "cpu"}},
    "decoder": {"workers": 5, "device": "cuda"},
}


def run_settings(**kubernetes: Any) -> Run:
    run = RUN | {"kubernetes": RUN["kubernetes"] | kubernetes}
    return make_config({"project": "birds", "store": "s3://b/p", "source": {"paths": ["a.csv"]}, "run": run}).run


def rendered(job: Job = JOB, **kubernetes: Any) -> dict[str, Any]:
    return yaml.safe_load(render_job(job, PACKAGE, run_settings(**kubernetes), STAGES))


def pods(rayjob: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The specs of the head's pod and of the workers'."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    return head["template"]["spec"], [group["template"]["spec"] for group in workers]


def texts(value: Any) -> Iterator[str]:
    """Every key and every value in nested YAML, and in the YAML inside it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (str(key), *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    else:
        yield str(value)


def test_read_back_it_is_the_job_whose_every_node_reaches_the_store() -> None:
    found = parse(render_job(JOB, PACKAGE, run_settings(), STAGES))
    assert dataclasses.replace(found.job, cpus=JOB.cpus, memory_mb=JOB.memory_mb) == JOB
    assert found.package == PACKAGE
    assert found.job.cpus >= JOB.cpus
    assert found.job.memory_mb >= JOB.memory_mb
    for node in found.nodes:  # what fetches the package runs before the job's environment is there
        assert (node.environment, node.secrets) == (JOB.environment, ["store-keys"])
    (_, gpu) = parse(render_job(JOB, PACKAGE, run_settings(), ["decoder", "samples"])).nodes
    assert gpu.group == "gpu"
    assert len(parse(render_job(JOB, PACKAGE, run_settings(), ["evaluation"])).nodes) == 1


def test_token_authentication_is_on_and_nothing_is_published() -> None:
    cluster = rendered()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in cluster["headGroupSpec"]
    assert not {"hostNetwork", "hostPort", "NodePort", "LoadBalancer"} & set(texts(cluster))


def test_spot_is_for_workers_and_never_for_the_head() -> None:
    for spot in (False, True):
        head, workers = pods(rendered(spot=spot, head_gpus=1))
        assert not [t for t in head["tolerations"] if t["key"] in SPOT]
        (term,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        refused = {e["key"]: e["values"] for e in term["matchExpressions"] if e["operator"] == "NotIn"}
        assert refused == {name: [value] for name, value in SPOT.items()}
        for worker in workers:
            tolerated = {t["key"]: t["value"] for t in worker.get("tolerations", []) if t["key"] in SPOT}
            assert tolerated == (SPOT if spot else {})
            # Preferred, not required: without spot nodes they run on others.
            assert ("affinity" in worker) == spot
            assert "requiredDuring" not in json.dumps(worker)


def test_pods_have_what_they_may_use() -> None:
    head, (cpu, gpu) = pods(rendered())
    for pod in (head, cpu, gpu):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"] == "registry.example.org/unclip:0.1.0"
        assert pod["serviceAccountName"] == "unclip"
        (volume,) = pod["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
    for node, pod in zip(parse(yaml.safe_dump(rendered())).nodes, (head, cpu, gpu), strict=True):
        size = quantity(pod["volumes"][0]["emptyDir"]["sizeLimit"])
        assert node.object_store < size < node.memory  # else Ray puts its object store on disk
    assert gpu["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert "nodeSelector" not in cpu
    assert [t["key"] for t in gpu["tolerations"] if t["operator"] == "Exists"] == ["nvidia.com/gpu"]


def test_no_secret_is_in_it() -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "MY_PASSWORD"):
        with pytest.raises(UserError, match=f"{name}: no secret is written into YAML"):
            rendered(dataclasses.replace(JOB, environment={**JOB.environment, name: "hush"}))
    for name in ("MY_TOKEN", "WANDB_API_KEY", "AZURE_STORAGE_KEY", "DB_PASSWD"):
        with pytest.raises(UserError, match=f"{name}: no secret is written into YAML"):
            rendered(env={name: "hush"})
    words = " ".join(texts(rendered(secret="")))
    assert not re.search(r"AWS_SECRET|AWS_ACCESS|AUTH_TOKEN|secretRef", words)


@pytest.mark.parametrize("name", ["", "-birds", "Birds", "birds_1", "9birds", "birds-", "b" * 48])
def test_names_that_kubernetes_refuses_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a name for a RayJob"):
        rendered(dataclasses.replace(JOB, id=name))


EVERYTHING: dict[str, Any] = {
    "pull_secrets": ["registry"],
    "env": {"NCCL_SOCKET_IFNAME": "eth0", "AWS_REGION": "elsewhere"},
    "labels": {"team": "birds"},
    "annotations": {"k8s.v1.cni.cncf.io/networks": 'rdma: "a" # {{ b }}\nc: d'},  # a template quotes it
    "queue": "images",
    "gpu_resources": {"rdma/hca": "1", "hugepages-2Mi": "5120Mi"},
}


def test_what_the_settings_pass_through_reaches_every_pod() -> None:
    rayjob = rendered(**EVERYTHING)
    assert rayjob["metadata"]["labels"] == {
        "app.kubernetes.io/name": "unclip", "team": "birds", "kueue.x-k8s.io/queue-name": "images",
    }  # fmt: skip
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"] == {
            "labels": {"team": "birds"}, "annotations": EVERYTHING["annotations"],
        }  # fmt: skip
        pod = group["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        (container,) = pod["containers"]
        found = {entry["name"]: entry["value"] for entry in container["env"]}
        assert found == {"NCCL_SOCKET_IFNAME": "eth0", **JOB.environment}  # the store's own come from the job
        limits = container["resources"]["limits"]
        has_gpu = "nvidia.com/gpu" in limits
        assert (EVERYTHING["gpu_resources"].items() <= limits.items()) == has_gpu
        capabilities = {"drop": ["ALL"], "add": ["IPC_LOCK"]} if has_gpu else {"drop": ["ALL"]}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": capabilities}
    assert yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"])["env_vars"] == JOB.environment


def test_what_kueue_admits_has_all_its_pods_from_the_start() -> None:
    cluster = rendered(**EVERYTHING)["spec"]["rayClusterSpec"]
    assert not cluster.keys() & {"enableInTreeAutoscaling", "autoscalerOptions"}
    sizes = [[group[f] for f in ("minReplicas", "replicas", "maxReplicas")] for group in cluster["workerGroupSpecs"]]
    assert sizes == [[4] * 3, [3] * 3]  # 12 workers and 12 decoders of a core on 8 cores, 2 and 5 GPUs on 4


def test_the_object_store_is_as_large_as_what_passes_through_it() -> None:
    """Decoded images do on their way to encoders; a training's batches do not."""
    head, cpu, gpu = parse(render_job(JOB, PACKAGE, run_settings(), STAGES)).nodes
    training = parse(render_job(JOB, PACKAGE, run_settings(), ["decoder"])).nodes[1]
    shares = [node.object_store / node.memory for node in (head, cpu, gpu, training)]
    assert shares == pytest.approx([0.05, 0.3, 0.3, 0.05], abs=1e-4)


@pytest.mark.parametrize("kubernetes", [{}, EVERYTHING, {"spot": False, "secret": "", "head_gpus": 1}])
def test_kubernetes_with_kuberay_takes_it(kubernetes: dict[str, Any]) -> None:
    rayjob = rendered(**kubernetes)
    assert (rayjob["metadata"]["namespace"], rayjob["spec"]["activeDeadlineSeconds"]) == ("pictures", 5400)
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    validate(rayjob)
    for spoilt in ({"entrypont": "x"}, {"backoffLimit": "2"}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**rayjob, "spec": rayjob["spec"] | spoilt})


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"run\.kubernetes\.image: missing; build cluster/Dockerfile"):
        rendered(image="")
    with pytest.raises(UserError, match="the driver takes 1 cores and 40960 MiB, but the head has 4"):
        rendered(dataclasses.replace(JOB, memory_mb=40 << 10))
    assert rendered(dataclasses.replace(JOB, memory_mb=40 << 10), head_memory_gb=64)
    for value in ("http://$HOST", "`id`"):
        with pytest.raises(UserError, match="would not reach the cluster as it is"):
            rendered(dataclasses.replace(JOB, environment={"AWS_ENDPOINT_URL": value}))


SHELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
PLAIN = st.text(
    st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs"), exclude_characters="$`"), max_size=30
)


@settings(max_examples=12)  # each is a shell
@given(st.lists(SHELL, min_size=1), PLAIN)
def test_words_and_environment_pass_the_shell_of_kuberays_submitter(words: list[str], value: str) -> None:
    job = dataclasses.replace(JOB, command=("python", *words), environment={"AWS_ENDPOINT_URL": value})
    text = render_job(job, PACKAGE, run_settings(), STAGES)
    assert parse(text).job.command == job.command
    ray = f"ray() {{ {shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"; }}\n"
    shell = ["/bin/bash", "-ce", ray + submit_command(text, "http://head:8265")]
    seen = json.loads(subprocess.run(shell, capture_output=True, text=True, check=True).stdout)
    assert seen[seen.index("--") + 1 :] == list(job.command)
    environment = json.loads(seen[seen.index("--runtime-env-json") + 1])
    assert environment == {"working_dir": PACKAGE, "env_vars": job.environment}
    assert seen[seen.index("--submission-id") + 1] == job.id


def test_rays_autoscaler_reads_it() -> None:
    """By Ray's own reader of a RayCluster: pods come when they are asked for, and only then."""
    cluster = {"metadata": {"name": "birds", "namespace": "pictures"}, "spec": rendered()["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    kinds = config["available_node_types"]
    # No worker gets to the head; 12 workers, then 12 decoders, on 8 cores; 2, then 5 workers, on 4 GPUs.
    assert {name: (kind["min_workers"], kind["max_workers"]) for name, kind in kinds.items()} == {
        "headgroup": (0, 0), "cpu": (0, 4), "gpu": (0, 3),
    }  # fmt: skip
    assert {name: (kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) for name, kind in kinds.items()} == {
        "headgroup": (0, 0), "cpu": (8, 0), "gpu": (8, 4),
    }  # fmt: skip
    assert (kinds["cpu"]["labels"], kinds["gpu"]["labels"]) == ({"pool": "cpu"}, {"pool": "gpu"})
    assert config["idle_timeout_minutes"] == 1
