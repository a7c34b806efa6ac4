"""A rendered RayJob run on this machine: its nodes, labels, environment, package and entrypoint, scaled to two cores.

What stands in for KubeRay is tests/cluster/kuberay.py: no Kubernetes is here.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import boto3
import pytest
import yaml

from cluster.job import Job
from cluster.local import free_ports
from cluster.rayjob import render
from pipeline.config import load_config
from pipeline.data.source.drawings.server import serving
from tests.chain import MICRO, keys, open_at, shard_paths, write_list
from tests.cluster.kuberay import Node, parse, submit_command
from tests.seaweed import BUCKET, Server

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
HEAD = ("port", "dashboard-port", "ray-client-server-port")


@contextmanager
def started(node: Node, where: Sequence[str], names: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict]:
    """A pod's Ray, with at most one of its cores; yields its ports. A Secret's entries are in ``environment``."""
    ports = free_ports(*names)
    labels = ",".join(f"{name}={value}" for name, value in node.labels.items())
    words = [
        BIN / "ray", "start", "--block", *where, f"--num-cpus={min(node.cpus, 1)}", f"--num-gpus={node.gpus}",
        f"--node-ip-address={HOST}", f"--object-store-memory={min(node.object_store, 200 << 20)}",
        "--dashboard-agent-listen-port=0", *(f"--{name}={port}" for name, port in ports.items()),
        *([f"--labels={labels}"] if labels else []),
    ]  # fmt: skip
    process = subprocess.Popen(
        words, env={**environment, **node.environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield ports
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def cluster(nodes: Sequence[Node], secret: Mapping[str, str], home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The cluster of a RayJob, one pod a group. Yields its dashboard's address and the submitter's environment."""
    scratch = f"/tmp/ray-{os.getpid()}-{secrets.token_hex(2)}"  # socket paths inside must stay short
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(home)}
    here = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_worker_niceness": "0"}  # other tests run beside it
    submitter = bare | token | here | {"RAY_USAGE_STATS_ENABLED": "0"}
    head, *workers = nodes
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        stack.callback(kill_all, token["RAY_AUTH_TOKEN"])
        where = ["--head", f"--dashboard-host={HOST}", f"--temp-dir={scratch}/head"]
        ports = stack.enter_context(started(head, where, HEAD, submitter | secret))
        address = f"http://{HOST}:{ports['dashboard-port']}"
        wait_for(address, token["RAY_AUTH_TOKEN"])
        for worker in workers:
            # A folder of its own, for its agent unpacks the package over what is there: the driver works in that.
            at = [f"--address={HOST}:{ports['port']}", f"--temp-dir={scratch}/{worker.group}"]
            stack.enter_context(started(worker, at, (), submitter | secret))
        yield address, submitter


def wait_for(address: str, token: str) -> None:
    """Wait, without a process of Ray's a try, until the head answers."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(request, timeout=10).close()
            return
        time.sleep(0.5)
    pytest.fail("the Ray head does not answer")


def kill_all(token: str) -> None:
    """Kill what has this cluster's token in its environment: a driver may outlive the head."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if f"RAY_AUTH_TOKEN={token}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def put_package(server: Server, folder: Path, project: Mapping[str, object]) -> str:
    """This code, a configuration and its list as a zip in the bucket; its URL."""
    inside = folder / "package" / "unclip"
    for name in ("unclip", "pipeline", "models", "jobs", "cluster", "serve"):
        shutil.copytree(ROOT / name, inside / name, ignore=shutil.ignore_patterns("__pycache__"))
    (inside / "project.yaml").write_text(yaml.safe_dump(dict(project)))
    write_list(inside / "pairs.csv", 200, 208)  # small pictures
    archive = shutil.make_archive(str(folder / "package"), "zip", folder / "package")
    key = f"packages/{os.getpid()}-{folder.name}.zip"
    boto3.client("s3", endpoint_url=server.endpoint).upload_file(archive, BUCKET, key)
    return f"s3://{BUCKET}/{key}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_entrypoint_environment_and_nodes_make_the_pairs(s3: Server, tmp_path: Path) -> None:
    store = f"{s3.url}/rayjob-{os.getpid()}"
    with serving() as pictures:
        project = MICRO | {
            "store": store,
            "source": {"paths": ["pairs.csv"], "shard_rows": 4},
            "run": {
                "kubernetes": {"image": "registry.example.org/unclip:0.1.0", "secret": "store-keys"},
                "pairs": {"workers": 1, "nodes": {"pool": "cpu"}, "hosts": {"drawings.test": pictures}},
            },
        }
        package = put_package(s3, tmp_path, project)
        settings = load_config(tmp_path / "package/unclip/project.yaml").run
        keyless = {name: value for name, value in s3.environment.items() if "KEY" not in name}
        job = Job("unclip-micro-0123456789abcdef", ("python", "-m", "jobs.cli", "run", "project.yaml", "--until=pairs"),
                  keyless, 1.0, 4096)  # fmt: skip
        text = render(job, package, settings, ["source", "pairs"])
        found = parse(text)
        assert found.package == package
        assert [(node.group, node.cpus, node.labels) for node in found.nodes] == [
            ("head", 0, {}), ("cpu", 8, {"pool": "cpu"}),
        ]  # fmt: skip
        secret = {name: value for name, value in s3.environment.items() if name not in keyless}
        with cluster(found.nodes, secret, tmp_path) as (address, submitter):
            command = ["/bin/bash", "-ce", submit_command(text, address)]
            run = subprocess.run(command, env=submitter, capture_output=True, text=True, timeout=540)
            while "No available agent" in run.stdout + run.stderr:  # a head that has just started
                run = subprocess.run(command, env=submitter, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert f"Job '{job.id}' succeeded" in run.stdout
    made = open_at(store)
    assert keys(made).keys() == {"source", "pairs"}
    assert len(shard_paths(made, "pairs")) == 2  # by the worker on the node with the label: the head has no core
