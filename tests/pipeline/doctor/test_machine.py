"""What doctor says of GPUs that torch cannot use."""

from pathlib import Path

import pytest
import torch

from pipeline.doctor import machine


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine in which torch sees no GPU, with device files and commands that lie in a folder."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "DEVICE_FILES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    return tmp_path


def test_a_machine_that_others_keep_busy_is_told(without_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (6.1, 0.0, 0.0))
    (said,) = warnings()
    assert "load of 6.1 on 2 cores" in said


def warnings() -> list[str]:
    return [str(finding) for finding in machine.check_machine() if finding.level != "ok"]


def nvidia_smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_a_machine_without_gpus_has_none(without_cuda: Path) -> None:
    assert warnings() == []


def test_a_driver_older_than_torch_is_told_with_the_gpus(without_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(without_cuda, 'for i in 1 2; do echo "NVIDIA H100 80GB HBM3, 535.104.05"; done')
    (said,) = warnings()
    assert "for CUDA 13.0 sees none of this machine's GPUs (2 NVIDIA H100 80GB HBM3, driver 535.104.05)" in said
    assert said.endswith("install a driver that has CUDA 13.0, as nvidia-smi shows it")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert warnings()[0].endswith("unset CUDA_VISIBLE_DEVICES")


def test_without_a_driver_that_answers_device_files_tell(without_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    nvidia_smi(without_cuda, "echo NVIDIA-SMI has failed; exit 9")
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (without_cuda / name).touch()
    (said,) = warnings()
    assert "for CPUs sees none of this machine's GPUs (nvidia0, nvidia1): everything runs on CPU cores" in said
    assert said.endswith("install torch for CUDA")


def test_gpus_that_torch_sees_are_no_warning(without_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (without_cuda / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    assert warnings() == []
