"""docs/nodes.md as it stands: three nodes on this machine, one of them killed, and one that comes later."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.local import MARK, end, free_ports
from tests.chain import ROOT

PAGE = (ROOT / "docs/nodes.md").read_text()
WAIT_S = 600.0


def blocks(title: str) -> list[str]:
    """The indented blocks below a heading that begins so, as a shell or YAML reads them."""
    (found,) = re.findall(rf"^##? {title}.*\n((?:(?!## ).*\n?)*)", PAGE, flags=re.MULTILINE)
    return [
        re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^    .*\n)+", found, re.MULTILINE)
    ]


def command(block: str) -> str:
    """The command of a block, without what the page says that it prints."""
    return block.splitlines()[0]


def _wait(what: str, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_decoder_survives_a_node_and_takes_in_another(tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    folder.mkdir()
    # Addresses, ports and folders that no other cluster of this machine has.
    net = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250 + 1}."
    ports = free_ports("gcs", "dashboard", "client")
    own = {
        "127.0.0.1:8265": f"127.0.0.1:{ports['dashboard']}",
        "--dashboard-port=8265": f"--dashboard-port={ports['dashboard']} --ray-client-server-port={ports['client']}",
        "6379": str(ports["gcs"]),
        **{f"127.0.0.{node}": f"{net}{node}" for node in range(2, 6)},
        "/tmp/ray-": f"/tmp/ray-{os.getpid()}-",
    }

    def ours(text: str) -> str:
        for theirs, mine in own.items():
            text = text.replace(theirs, mine)
        return text

    names = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = names | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": path, MARK: str(folder)}

    def shell(script: str) -> None:
        with open(tmp_path / "shell.log", "ab") as log:
            # From a file: a shell with the script in its arguments would be found by the page's pgrep.
            (tmp_path / "script").write_text(ours(script))
            words = ["bash", "-e", "script"]
            ended = subprocess.run(words, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        assert ended.returncode == 0, (tmp_path / "shell.log").read_text()[-3000:]

    configuration, start = blocks("Three nodes")[0], blocks("Start the nodes")[0]
    values = yaml.safe_load(configuration)
    # Shorter trainings than the page's; of the decoder it is what happens between its first step and its last.
    values |= {"clip": {"samples": 1280}, "diffusion_prior": {"samples": 640}, "evaluation": {"image_rows": 8}}
    values["decoder"] = {"samples": 4096, "decay": 1024}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(values))
    shell(f"python {ROOT}/examples/draw_faces.py faces 300")
    submitted = tmp_path / "submit.log"
    again = start.replace("ray get-auth-token --generate\n", "")
    setup = "".join(line for line in again.splitlines(True) if not line.startswith("ray start"))
    submitter = None
    try:
        shell(start)
        with open(submitted, "wb") as log:
            words = ["bash", "-ec", f"cd {tmp_path}\n{setup}exec {ours(command(blocks('Submit')[0]))}"]
            submitter = subprocess.Popen(words, env=environment, stdout=log, stderr=log)

        def said(words: str) -> bool:
            assert submitter.poll() in (None, 0), submitted.read_text()[-3000:]
            return words in submitted.read_text()

        _wait("a step of the decoder", lambda: said("  decoder: "))
        shell(command(blocks("Kill a node")[0]))
        _wait("a lost worker", lambda: said("; starting again"))
        shell(setup + command(blocks("Add a node")[0]))
        assert submitter.wait(WAIT_S) == 0, submitted.read_text()[-3000:]
        assert "decoder done: " in submitted.read_text()
        assert (tmp_path / "out/three/report.html").is_file()
    finally:
        if submitter:
            submitter.kill()
        end(folder)
        for left in Path("/tmp").glob(f"ray-{os.getpid()}-*"):
            shutil.rmtree(left)
