"""Writing tensors."""

from pathlib import Path

import pytest
import torch

from models.tensors import save_tensors


def test_what_the_system_says_is_said_as_of_any_other_file(tmp_path: Path) -> None:
    """The command line tells of a full disk in a line, and knows it by this error."""
    with pytest.raises(FileNotFoundError) as told:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "nowhere/model.safetensors")
    assert told.value.filename == str(tmp_path / "nowhere/model.safetensors")


def test_whoever_may_read_files_here_may_read_tensors(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    save_tensors({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == plain.stat().st_mode
