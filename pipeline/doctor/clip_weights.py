"""Where the weights of a CLIP that a configuration names come from: looked up before anything is fetched or made."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.clip_weights import ClipWeights
from pipeline.config import Config, named_weights
from pipeline.doctor.finding import Finding
from pipeline.errors import UserError, did_you_mean

ANSWER_S = 10.0  # for a server to say that it has a file


def check_clips(config: Config, stages: Collection[str]) -> Iterator[Finding]:
    """Yields where each CLIP is that these stages load, or that it is nowhere."""
    for setting, weights in named_weights(config, stages):
        try:
            yield Finding("ok", "clip", f"{setting} {weights}: {find_weights(setting, weights)}")
        except UserError as e:
            yield Finding("problem", "clip", str(e))


def find_weights(setting: str, weights: str) -> str:
    """Returns where the weights ``open_clip:NAME:TAG`` or ``local-dir:FOLDER`` are; loads and downloads nothing.

    Raises UserError that begins with ``setting`` for a name, a tag or a folder that does not exist or cannot be used,
    and for weights that are not in the cache while their server does not answer.
    """
    from models.clip import NEEDS_TRANSFORMERS, config_of  # loads torch

    named = ClipWeights.parse(weights)
    try:
        if config_of(weights)["text_cfg"].get("hf_tokenizer_name") and find_spec("transformers") is None:
            raise UserError(f"{setting}: {weights} {NEEDS_TRANSFORMERS}")
        return f"in the folder {named.folder}" if named.folder else _find_open_clip(setting, named.network, named.tag)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"{setting}: {e}") from e


def _find_open_clip(setting: str, name: str, tag: str) -> str:
    import open_clip

    source = open_clip.get_pretrained_cfg(name, tag)
    if not source:
        if Path(tag).is_file():
            return f"in the file {tag}"
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(f"{setting}: {name} has no weights {tag}, nor is there such a file{did_you_mean(tag, tags)}")
    return _find_on_hub(setting, source["hf_hub"])


def _find_on_hub(setting: str, place: str) -> str:
    """``place`` is REPOSITORY/FILE, or REPOSITORY/ for the file names that open_clip gives its own."""
    import huggingface_hub as hub
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, file = os.path.split(place)
    names = [str(Path(file).with_suffix(".safetensors")), file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    for name in names:
        if isinstance(cached := hub.try_to_load_from_cache(repository, name), str):
            return f"in the cache, {cached}"
    why: Any = ""
    for name in names:
        try:
            hub.get_hf_file_metadata(hub.hf_hub_url(repository, name), timeout=ANSWER_S)
            return f"to be downloaded from the hub, {repository}"
        except Exception as e:  # of whatever library the hub's client goes through
            why = e
    said = (str(why).splitlines() or [type(why).__name__])[0]
    raise UserError(
        f"{setting}: the weights are not in the cache, and {repository} on the Hugging Face hub cannot be reached "
        f"({said}); connect to the network for the first run, or copy a CLIP here and name local-dir:FOLDER"
    )
