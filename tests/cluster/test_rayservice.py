"""The RayService of a release: what KubeRay reads, and what Ray Serve builds from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from jobs.cli import main
from pipeline.errors import UserError
from pipeline.parse import parse
from serve.bundle import ServedBundle
from serve.guard import read_tokens
from serve.settings import ServeSettings
from tests.chain import refused

KEY = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{'B' * 43} ana@example.org"
KUBERNETES: dict[str, Any] = {"image": "registry.example.org/unclip:1", "secret": "unclip"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # of an S3 server of other tests
        monkeypatch.delenv(name, raising=False)
    config = {"project": "Birds_2", "preset": "nano", "store": "s3://bucket/birds", "source": {"paths": ["a.csv"]}}
    (tmp_path / "a.csv").write_text("url,caption\n")
    (tmp_path / "birds.yaml").write_text(
        yaml.safe_dump({**config, "release": {"keys": [KEY]}, "run": {"kubernetes": KUBERNETES}})
    )
    return tmp_path / "birds.yaml"


def change(project: Path, **kubernetes: Any) -> None:
    config = yaml.safe_load(project.read_text())
    config["run"]["kubernetes"] |= kubernetes
    project.write_text(yaml.safe_dump(config))


def test_a_release_is_rendered_as_a_service_that_ray_serve_takes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", f"release:{project}", "--to", "kuberay", "replicas=3", "idle_replicas=0", "batch=16"]) == 0
    service = yaml.safe_load(capsys.readouterr().out)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["metadata"]["name"] == "unclip-birds-2"
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert deployed.http_options.host == "0.0.0.0"
    (application,) = deployed.applications
    assert application.import_path == "serve.app:application"
    served = ServedBundle("Birds_2", "s3://bucket/birds", project="Birds_2", keys=(KEY,))
    assert ServedBundle(**application.args["served"]) == served
    settings = parse(ServeSettings, application.args["settings"], "serve")
    assert (settings.replicas, settings.idle_replicas, settings.batch, settings.device) == (3, 0, 16, "cuda")
    with pytest.raises(UserError, match="accepts other machines"):  # as a pod does whose Secret has no UNCLIP_TOKENS
        read_tokens(settings)
    (container,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": 8000} in container["ports"]  # or older KubeRay makes no Service for it
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["maxReplicas"] == 3
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["envFrom"] == [{"secretRef": {"name": "unclip"}}]
    assert "UNCLIP_TOKENS" not in json.dumps(service)


def test_pods_end_when_their_requests_are_answered(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"release:{project}", "--to", "kuberay", "drain_s=89.5"]) == 0
    spec = yaml.safe_load(capsys.readouterr().out)["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] == 90
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "90"]
        assert pod["terminationGracePeriodSeconds"] == 120


def test_pods_reach_the_store_of_the_submitter_and_take_one_gpus_share_of_a_node(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    change(project, gpus=4, gpu_cpus=48, gpu_memory_gb=180, env={"LOG": "1"})
    assert main(["serve", f"release:{project}", "--to", "kuberay"]) == 0
    said = capsys.readouterr().out
    assert "hush" not in said
    cluster = yaml.safe_load(said)["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        told = {one["name"]: one.get("value") for one in container["env"]}
        assert (told["AWS_ENDPOINT_URL"], told["LOG"]) == ("http://minio:9000", "1")
    limits = container["resources"]["limits"]
    assert (limits["cpu"], limits["memory"], limits["nvidia.com/gpu"]) == ("12", "45Gi", "1")
    change(project, env={"AWS_SECRET_ACCESS_KEY": "hush"})
    refused("serve", f"release:{project}", "--to", "kuberay", says="no secret is written into YAML")


def test_what_pods_need_is_asked_for(project: Path) -> None:
    refused("serve", "out/nano", "--to", "kuberay", says="name release:PROJECT.yaml")
    change(project, secret="")
    refused("serve", f"release:{project}", "--to", "kuberay", says="UNCLIP_TOKENS holds lines NAME TOKEN")
    change(project, image="")
    refused("serve", f"release:{project}", "--to", "kuberay", says="run.kubernetes.image: missing")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tokens=mine.txt", "mine.txt is not copied to pods; put its lines into UNCLIP_TOKENS"),
        ("prompt_head=head.safetensors", "head.safetensors is not copied to pods; name its absolute path"),
        ("port=9000", "port=9000: a RayService listens at 8000"),
    ],
)
def test_what_pods_cannot_follow_is_refused(project: Path, setting: str, says: str) -> None:
    refused("serve", f"release:{project}", "--to", "kuberay", setting, says=says)
