"""The files of diffusers' layout: one folder for each part, of config.json and one safetensors file.

What the layout has no place for (our configuration, and tensors that no class of diffusers holds) lies beside them in
``ours/NAME``, a model folder of ours that lacks the tensors which the other folders hold.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.folder import FORMAT, read, read_config, sizes_as_json, sizes_from_json, write
from models.tensors import save_tensors, shapes_only

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
OURS = "ours"

Weights = dict[str, Tensor]
T = TypeVar("T", bound=nn.Module)


class NativePart(NamedTuple):
    """Holds the content of ``ours/NAME``: configuration, further arguments, tensors without a place in diffusers."""

    config: Any
    sizes: dict[str, Any]
    weights: Weights


def read_json(path: Path) -> dict:
    """Reads one JSON object.

    Raises FileNotFoundError without a file, ValueError when it is damaged or names code to be loaded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: name a folder in diffusers' layout")
    return read_config(path)


def read_weights(path: Path) -> Weights:
    """Returns all tensors of one safetensors file, fp32. Raises as ``read_json`` does; pickles are never read."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: with other weights there, load them with diffusers or transformers and save them "
            "with safe_serialization=True, unsharded"
        )
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or export it again") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes one JSON object; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def write_part(folder: Path, config: Mapping[str, Any], weights: Weights, file: str = WEIGHTS_FILE) -> None:
    """Writes one part's two files."""
    write_json(folder / CONFIG_FILE, config)
    # Slices share memory with what they are cut from, which safetensors refuses.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    save_tensors(copies, folder / file, metadata={"format": "pt"})


def write_ours(folder: Path, name: str, config: Any, sizes: dict[str, Any], weights: Weights) -> None:
    """Writes ``folder/ours/name``: the model's configuration, and ``weights`` that have no other place."""
    document = {
        "format": FORMAT,
        "kind": type(config).__name__,
        "config": asdict(config),
        "sizes": sizes_as_json(sizes),
    }
    write(folder / OURS / name, document, weights)


def read_ours(folder: Path, name: str, *kinds: type) -> NativePart | None:
    """Reads what ``write_ours`` wrote; None where it is missing, as in Karlo. Raises as ``load_model`` does."""
    if not (folder / OURS / name).is_dir():
        return None
    document, weights = read(folder / OURS / name, "cpu")
    path = folder / OURS / name
    values, sizes = derive(path, lambda: (dict(document["config"]), sizes_from_json(document["sizes"])))
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for kind in kinds:
        if kind.__name__ == document["kind"] and values.keys() <= {field.name for field in fields(kind)}:
            return NativePart(kind(**values), sizes, weights)
    raise ValueError(
        f"{folder / OURS / name} holds a {document['kind']} of {sorted(values)}, which is not known here: export it "
        "again, or update this software"
    )


def derive(path: Path, build: Callable[[], Any]) -> Any:
    """Returns the result of ``build``, which reads configurations in ``path``. Raises ValueError for its errors."""
    try:
        return build()
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} has no configuration that is known here: {error!r} is missing or odd") from error
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from error


def check_config(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], idle: set[str]) -> None:
    """Raises ValueError unless the configuration in ``path`` describes the network that ``expected`` describes.

    ``idle`` fields may hold anything.
    """
    # A field that ``found`` lacks is of a later version of diffusers, whose default is neutral. One that ``expected``
    # lacks is unknown here, and may only be null or false.
    idle = idle | {name for name in found if name.startswith("_") and name != "_class_name"}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in expected.items()}
    odd = [
        f"{name} is {value!r}, expected {plain.get(name)!r}"
        for name, value in found.items()
        if name not in idle and (value != plain[name] if name in plain else bool(value))
    ]
    if odd:
        raise ValueError(f"{path} does not fit: " + "; ".join(odd))


def load(build: Callable[[], T], weights: Weights, folder: Path) -> T:
    """Returns the model of ``build`` with its weights, all of them, in evaluation mode. Raises ValueError on a misfit.

    The configuration takes no more memory or time than ``weights``, which are measured first.
    """
    with shapes_only(folder, [tensor.numel() for tensor in weights.values()]):
        model = build()
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit their configuration: {error}") from error
    if missing or unexpected:
        raise ValueError(f"the weights in {folder} do not fit: {missing} are missing, {unexpected} are unknown")
    return model.eval()
