"""Writing tensors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from models.tensors import DTYPES, save_tensors, tensors_file

NAMES, SHAPES = st.text(max_size=5).filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 3), max_size=3)


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


@given(forms=st.dictionaries(NAMES, st.tuples(st.sampled_from([*DTYPES]), SHAPES)), about=NAMES)
def test_buffers_are_the_file_that_safetensors_writes(
    forms: dict[str, tuple[torch.dtype, list[int]]], about: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 256, shape, generator=generator).to(dtype) for name, (dtype, shape) in forms.items()
    }
    assert b"".join(tensors_file(tensors, {"about": about})) == save(tensors, {"about": about})


def test_buffers_share_the_memory_of_tensors() -> None:
    tensor = torch.zeros(2)
    buffers = tensors_file({"a": tensor}, {})
    tensor += 1
    assert buffers[-1] == torch.ones(2).numpy().tobytes()
