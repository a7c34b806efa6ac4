"""Writing tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.folder import load_model, save_model
from models.tensors import save_half, save_tensors
from tests.models.small_models import make


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


def test_matrices_take_half_the_bytes_and_what_fp16_cannot_hold_stays(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.tensor([[1 / 3, -2.0]]),
        "vector": torch.tensor([1 / 3]),
        "large": torch.tensor([[1 / 3, 70_000.0]]),
        "whole": torch.tensor([[7]]),
    }
    save_tensors(tensors, tmp_path / "model.safetensors")
    save_half(tmp_path / "model.safetensors", tmp_path / "half.safetensors")
    found = load_file(tmp_path / "half.safetensors")
    assert found["matrix"].dtype == torch.float16
    assert torch.equal(found.pop("matrix"), tensors["matrix"].half())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


def test_a_model_in_half_precision_computes_in_fp32(tmp_path: Path) -> None:
    decoder = make().decoder
    save_model(tmp_path / "whole", decoder)
    save_model(tmp_path / "half", decoder)
    save_half(tmp_path / "whole/model.safetensors", tmp_path / "half/model.safetensors")
    weights = load_model(tmp_path / "half").state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {tensor.dtype for tensor in decoder.state_dict().values()}
    for name, tensor in decoder.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=2**-11, atol=2**-24)
