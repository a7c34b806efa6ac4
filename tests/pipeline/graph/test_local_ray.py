"""The Ray of this machine: its folder is for its user alone, what is left of it goes, its end is told in a line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import UserError
from pipeline.graph import local_ray
from pipeline.graph.local_ray import PREFIX, PrivateFolder, start_local_ray
from tests.chain import ROOT

pytestmark = pytest.mark.integration

NOBODY = 65534
START = """
import json, os, sys, time
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings
ray = start_ray(RaySettings(cpus=1, object_store_mb=100))
node = ray._private.worker._global_node
print(json.dumps({"logs": node.get_logs_dir_path(), "processes":
    {name: [each.process.pid for each in started] for name, started in node.all_processes.items()}}), flush=True)
"""
# Whether Ray listens on loopback alone, has a dashboard, and answers who has another token or none.
LISTENS = """
import ipaddress, grpc, psutil  # the last is among Ray's own packages
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
        ask(b"", metadata=metadata, timeout=60)
        answers.append("OK")
    except grpc.RpcError as e:
        answers.append(e.code().name)
dashboard = ray._private.worker.get_dashboard_url()
print(json.dumps({"mode": mode, "ports": seen, "answers": answers, "dashboard": dashboard}), flush=True)
"""
# What another user could do with Ray's socket and its logs, if the folders were open.
INTRUDE = """
import os, sys
from pathlib import Path
os.setgroups([]); os.setgid(65534); os.setuid(65534)
entered = []
for root in map(Path, sys.argv[1:]):
    for attempt in (
        lambda: os.listdir(root),
        lambda: os.chdir(root),
        lambda: os.stat(root / "ray"),
        lambda: os.listdir(root / "ray"),
        lambda: os.rename(root / "ray/session_latest", root / "ray/mine"),
        lambda: (root / "ray/mine").touch(),
        lambda: root.chmod(0o777),
        lambda: root.rename(root.with_name("mine")),
    ):
        try:
            attempt()
            entered.append(str(root))
        except PermissionError:
            pass
print(entered)
"""


@contextmanager
def running(base: Path, then: str, *, start: str = START) -> Iterator[tuple["subprocess.Popen[str]", dict]]:
    """A process that has started a Ray below a folder, and goes on; and what it said of it."""
    environment = os.environ | {"RAY_TMPDIR": str(base), "PYTHONPATH": str(ROOT), "HOME": str(base)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)
    command = [sys.executable, "-c", start + then]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.kill()


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder with a short name, as sockets need it, in which every user may write, as in /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(300)
def test_it_listens_on_loopback_with_a_token_no_other_user_enters_its_folders_and_nothing_is_left(base: Path) -> None:
    """Nor is there a token in the home of its user for every user of the machine to read, as Ray would write it."""
    with running(base, LISTENS + "sys.stdin.read()\n") as (process, told):
        found = json.loads(process.stdout.readline())
        assert {"gcs_server", "raylet"} <= {name for name, _ in found["ports"]}
        assert [name for name, loopback in found["ports"] if not loopback] == []
        assert found["mode"] == "token"
        assert found["answers"] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]
        assert not found["dashboard"]
        (folder,) = base.glob(PREFIX + "*")
        assert Path(told["logs"]).is_relative_to(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "ray/session_latest/sockets/raylet").is_socket()
        if os.getuid() == 0:
            intruder = subprocess.run([sys.executable, "-c", INTRUDE, str(folder)], capture_output=True, text=True)
            assert intruder.stdout == "[]\n", intruder.stdout + intruder.stderr
        process.stdin.close()
        assert process.wait(240) == 0, process.stderr.read()
    assert list(base.iterdir()) == []


# A process of Ray's that is killed, without Ray: what ends a command, and what that says.
KILLED = """
import logging, subprocess, sys, time
from types import SimpleNamespace as Fake
from pipeline.graph.local_ray import start_local_ray
logging.basicConfig(format="%(message)s")
child = subprocess.Popen(["sleep", "600"])
node = Fake(all_processes={sys.argv[1]: [Fake(process=child)]})
private = Fake(worker=Fake(_global_node=node))
start_local_ray(Fake(init=lambda **_: None, is_initialized=lambda: True, shutdown=lambda: None, _private=private))
child.kill()
time.sleep(600)
"""


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_of_ray_that_ends_ends_the_command_with_one_line(base: Path, name: str) -> None:
    environment = os.environ | {"RAY_TMPDIR": str(base), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, name], env=environment, capture_output=True, text=True)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert f"({name}) was killed by SIGKILL" in line
    assert "run the same command again" in line
    (left,) = base.glob(PREFIX + "*")
    assert f"{left}/ray/session_latest/logs" in line


@pytest.mark.slow  # without Ray: the test above
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "waits"), [("gcs_server", "time.sleep(600)"), ("raylet", "ray.get(ray.remote(f).remote())")]
)
def test_a_process_of_ray_that_is_killed_ends_the_command(base: Path, name: str, waits: str) -> None:
    then = f"import logging; logging.basicConfig(format='%(message)s')\nf = lambda: time.sleep(600)\n{waits}\n"
    with running(base, then) as (process, told):
        (pid,) = told["processes"][name]
        os.kill(pid, signal.SIGKILL)
        assert process.wait(240) == 1
        (line,) = process.stderr.read().splitlines()
        said = process.stdout.read()
    # On a busy machine Ray may have told of its raylet first, and of nothing else.
    assert said == "" or (name == "raylet" and said.lstrip("\n").startswith("\x1b[33m(raylet)"))
    assert f"({name}) was killed by SIGKILL" in line
    logs = next(base.glob(PREFIX + "*")) / "ray/session_latest/logs"
    assert (logs / "raylet.err").exists()
    PrivateFolder(str(base))  # of the next process: what the other one has left goes
    assert not logs.exists()


HEAD = """
import logging, os, sys
from ray.cluster_utils import Cluster
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings

logging.basicConfig(format="%(message)s")
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
)
os.environ["RAY_ADDRESS"] = cluster.address
start_ray(RaySettings())
cluster.head_node.kill_gcs_server()
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_whose_head_is_killed_is_told_in_one_line(base: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", HEAD], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True, **pipes
    ) as process:
        line = next(line for line in process.stderr if line.startswith("the head of the Ray cluster at "))
        process.communicate()
    assert "does not answer (" in line
    assert "run the same command again" in line


def test_only_what_a_process_has_left_is_removed(base: Path) -> None:
    """Neither what a process holds that is at work, nor what another user has made under such a name."""
    at_work, foreign = PrivateFolder(str(base)), base / f"{PREFIX}foreign"
    left = base / f"{PREFIX}left"
    for folder in (left, foreign):
        (folder / "ray").mkdir(parents=True)
    link = base / f"{PREFIX}link"
    link.symlink_to(base)
    if os.getuid() == 0:
        os.chown(foreign, NOBODY, NOBODY)
    made = PrivateFolder(str(base))
    kept = {at_work.path, made.path, link} | ({foreign} if os.getuid() == 0 else set())
    assert set(base.iterdir()) == kept


def test_a_ray_that_does_not_come_up_is_started_again_and_then_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a machine that is so busy that its raylet does not answer within Ray's half minute."""
    calls: list[str] = []

    def init(**_: object) -> None:
        calls.append("init")
        raise Exception("The current node timed out during startup. This could happen because\nsome of the processes")

    monkeypatch.setenv("RAY_TMPDIR", str(base))
    with pytest.raises(UserError) as refused:
        start_local_ray(SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown")))
    assert calls == ["init", "shutdown", "init"]
    assert "Ray did not start (The current node timed out during startup); trying once more" in caplog.text
    said = str(refused.value)
    assert "\n" not in said
    assert said.startswith("Ray did not start (The current node timed out during startup), ")
    assert "run the same command again" in said
    assert str(local_ray._folders[str(base)].logs) in said


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"nothing \(RAY_TMPDIR, else TMPDIR\): No such file or directory; "):
        start_local_ray(None)
