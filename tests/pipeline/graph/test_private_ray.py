"""The Ray that is started in this machine is for this machine, and for who has its token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT

SCRIPT = """
import ipaddress, json, os
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings
ray = start_ray(RaySettings(cpus=1, object_store_mb=100))
import grpc, psutil  # the latter is among Ray's own packages
mode = ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote())
me = psutil.Process()
ports = [
    [process.name(), ipaddress.ip_address(socket.laddr.ip)]
    for process in (me, *me.children(recursive=True))
    for socket in process.net_connections("inet")
    if socket.status == psutil.CONN_LISTEN
]
seen = [[name, (address.version == 6 and address.ipv4_mapped or address).is_loopback] for name, address in ports]
channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
ask = channel.unary_unary("/ray.rpc.JobInfoGcsService/GetAllJobInfo")
token = os.environ["RAY_AUTH_TOKEN"]
answers = []
for metadata in ([], [("authorization", "Bearer wrong" + token)], [("authorization", "Bearer " + token)]):
    try:
        ask(b"", metadata=metadata, timeout=20)
        answers.append("OK")
    except grpc.RpcError as e:
        answers.append(e.code().name)
dashboard = ray._private.worker.get_dashboard_url()
print(json.dumps({"mode": mode, "ports": seen, "answers": answers, "dashboard": dashboard}))
"""


@pytest.mark.timeout(300)
def test_it_listens_on_loopback_has_no_dashboard_and_wants_a_token(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= {name for name, _ in found["ports"]}
    assert [name for name, loopback in found["ports"] if not loopback] == []
    assert found["mode"] == "token"
    assert found["answers"] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]
    assert not found["dashboard"]
    assert not (tmp_path / ".ray").exists()  # where Ray would put a token for every user of the machine to read
