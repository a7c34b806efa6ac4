"""Models as folders of config.json and model.safetensors: no pickle is ever read, and no code is taken from one.

CLIP has open_clip's layout instead (models/clip.py).
"""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.ar_prior import ARPrior
from models.clip_prior import ClipPrior, ClipPriorConfig
from models.codec import Codec
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, DiffusionPriorConfig, TextTower
from models.tensors import save_tensors, shapes_only
from models.upsampler import Upsampler

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
"""Fields by which transformers and diffusers take Python code out of a folder or from the hub."""


class Kind(NamedTuple):
    """A class of models, its configuration, and the arguments besides it, which depend on CLIP and the codec."""

    model: type[nn.Module]
    config: type
    sizes: tuple[str, ...]


KINDS = {
    "ar_prior": Kind(ARPrior, ARPriorConfig, ("embed_dim", "codes", "text_tower")),
    "diffusion_prior": Kind(DiffusionPrior, DiffusionPriorConfig, ("embed_dim", "text_tower")),
    "clip_prior": Kind(ClipPrior, ClipPriorConfig, ("embed_dim",)),
    "decoder": Kind(Decoder, DecoderConfig, ("embed_dim", "text_tower")),
    "upsampler": Kind(Upsampler, UpsamplerConfig, ()),
}


def save_model(folder: str | Path, model: nn.Module, weights: dict[str, Tensor] | None = None) -> None:
    """Writes a prior, decoder or upsampler into ``folder``, with ``weights`` (an average, say) instead of its own."""
    kind = next(name for name, kind in KINDS.items() if type(model) is kind.model)
    sizes = sizes_as_json({name: getattr(model, name) for name in KINDS[kind].sizes})
    document = {"format": FORMAT, "kind": kind, "config": asdict(model.config), "sizes": sizes}  # type: ignore[call-overload]
    write(Path(folder), document, weights or model.state_dict())


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Any:
    """Reads a prior, decoder or upsampler that ``save_model`` wrote; in evaluation mode.

    Raises FileNotFoundError when a file is missing, and ValueError when the folder was written by a newer version or
    its weights do not fit its configuration.
    """
    document, weights = read(Path(folder), device)
    if str(document["kind"]) not in KINDS:
        raise ValueError(f"{folder} holds a {document['kind']}: expected one of {', '.join(KINDS)}")
    kind = KINDS[document["kind"]]
    try:
        unknown = document["config"].keys() - {field.name for field in fields(kind.config)}
        if unknown:
            raise ValueError(f"{folder}/{CONFIG_FILE} has unknown fields {sorted(unknown)}: update this software")
        config = kind.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in document["config"].items()})
        # Without weights first: a configuration from a stranger may describe a model that no memory holds.
        with shapes_only(Path(folder) / WEIGHTS_FILE):
            model = kind.model(config, **sizes_from_json(document["sizes"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/{CONFIG_FILE} is damaged ({error!r}): fetch or train it again") from error
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}/{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from error
    return model.eval()


def sizes_as_json(sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns a model's arguments besides its configuration, ready for JSON, without those that are None."""
    return {name: asdict(size) if is_dataclass(size) else size for name, size in sizes.items() if size is not None}  # type: ignore[arg-type]


def sizes_from_json(sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the inverse of ``sizes_as_json``. Raises TypeError for a text tower with unknown sizes."""
    return {name: TextTower(**size) if name == "text_tower" else size for name, size in sizes.items()}


def save_codec(folder: str | Path, codec: Codec) -> None:
    """Writes a codec into ``folder``."""
    write(Path(folder), {"format": FORMAT, "kind": "codec"}, codec.tensors())


def load_codec(folder: str | Path, device: torch.device | str = "cpu") -> Codec:
    """Reads a codec that ``save_codec`` wrote. Raises as ``load_model`` does."""
    document, tensors = read(Path(folder), device)
    if document["kind"] != "codec" or tensors.keys() != {field.name for field in fields(Codec)}:
        raise ValueError(f"{folder} holds no codec but a {document['kind']} of {sorted(tensors)}")
    return Codec(**tensors)


def write(folder: Path, document: dict, tensors: dict[str, Tensor]) -> None:
    """Writes both files of a model folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")


def read(folder: Path, device: torch.device | str) -> tuple[dict, dict[str, Tensor]]:
    """Reads both files of a model folder. Raises as ``load_model`` does."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: name a folder that a training wrote")
    document = read_config(folder / CONFIG_FILE)
    try:
        tensors = load_file(folder / WEIGHTS_FILE, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{folder} is damaged ({error}): fetch or train it again") from error
    if not {"format", "kind"} <= document.keys():
        raise ValueError(f"{folder}/{CONFIG_FILE} has neither format nor kind: name a folder that a training wrote")
    if type(document["format"]) is not int:
        raise ValueError(f"{folder}/{CONFIG_FILE} has format {document['format']!r}: fetch or train it again")
    if document["format"] > FORMAT:
        raise ValueError(f"{folder} has format {document['format']}, newer than {FORMAT}: update this software")
    # A bundle that was made small to travel has fp16 matrices; layers of two precisions would not multiply.
    return document, {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}


def read_config(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file that somebody else may have written.

    Raises FileNotFoundError when there is none, and ValueError when it is damaged or names code to be loaded, at any
    depth.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or make it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): fetch or make it again")
    found: list[Any] = [document]
    for value in found:
        if isinstance(value, dict):
            if named := [field for field in CODE if value.get(field)]:
                raise ValueError(f"{path} names code to be loaded ({named[0]}), which is never done: remove it")
            found += value.values()
        elif isinstance(value, list):
            found += value
    return document
