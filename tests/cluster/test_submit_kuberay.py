"""``unclip submit --to kuberay``: the RayJob alone on standard output, and its package in the bucket."""

import io
import os
import zipfile
from pathlib import Path

import boto3
import pytest
import yaml

from jobs.cli import main
from tests.chain import done, here, open_at, write_config, write_list
from tests.cluster.kuberay import parse
from tests.seaweed import Server

IMAGE = "run.kubernetes.image=registry.example.org/unclip:0.1.0"


def config(folder: Path, store: str) -> Path:
    return write_config(folder, store, "127.0.0.1:1", [write_list(folder / "pairs.csv", 200, 208)])


def test_the_rayjob_is_all_there_is_on_standard_output(s3: Server, tmp_path: Path) -> None:
    store = f"{s3.url}/kuberay-{os.getpid()}"
    # Another name of this machine, for one that says loopback is refused.
    elsewhere = s3.environment | {"AWS_ENDPOINT_URL": s3.endpoint.replace("127.0.0.1", "127.1")}
    words = ("submit", config(tmp_path, store), "--to", "kuberay", "--until", "pairs", IMAGE, "run.pairs.workers=3")
    process = here(*words, env=elsewhere)
    assert process.returncode == 0, process.stderr
    found = parse(process.stdout)
    assert found.job.command == ("python", "-m", "jobs.cli", "run", "project.yaml", "--until=pairs")
    assert found.job.environment["AWS_ENDPOINT_URL"] == elsewhere["AWS_ENDPOINT_URL"]
    assert [node.group for node in found.nodes] == ["head", "cpu"]
    assert found.package.startswith(f"{store}/packages/")
    bucket, _, key = found.package.removeprefix("s3://").partition("/")
    body = boto3.client("s3", endpoint_url=s3.endpoint).get_object(Bucket=bucket, Key=key)["Body"].read()
    with zipfile.ZipFile(io.BytesIO(body)) as package:
        assert yaml.safe_load(package.read("project.yaml"))["run"]["ray"]["autoscaler"] is True
    assert "pairs" in process.stderr  # the plan
    again = here(*words, env=elsewhere)
    assert again.stdout == process.stdout
    done(here("data", "gc", words[1], "--yes", "--grace-hours", 0))  # what was asked for is needed
    assert [f"{store}/{entry.path}" for entry in open_at(store).list("packages/")] == [found.package]


def test_mistakes_are_told_before_anything_is_sent(
    s3: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for store, words, said in (
        (str(tmp_path / "store"), [IMAGE], "is a folder, which no pod can reach"),
        (f"{s3.url}/none-{os.getpid()}", [IMAGE], "which a machine of the cluster looks for in itself"),
        (f"{s3.url}/none-{os.getpid()}", ["--stop"], "kubectl delete rayjob NAME"),
    ):
        assert main(["submit", str(config(tmp_path, store)), "--to", "kuberay", *words]) == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.out == ""
