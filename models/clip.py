"""CLIP as all other parts use it: views and captions in, unit-norm fp32 embeddings out.

The networks are open_clip's, trained here from a ClipConfig or loaded from anywhere open_clip can. Captions become 77
tokens of CLIP's own BPE for every model; a CLIP with a shorter context cuts them itself, and one with another
tokenizer, such as SigLIP, makes tokens of its own for its text tower alone. Pixels are normalised as each CLIP was
trained. Its way of resizing does not matter: on a square view, squashing and cropping are the same.

A CLIP is numbers: no folder, and no tokenizer of the hub, brings code that is run here.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Self

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call

from models.clip_weights import ClipWeights
from models.folder import read_config
from models.prior_configs import ClipConfig
from models.tensors import save_tensors, shapes_only
from models.tokens import CONTEXT, VOCABULARY, cut_tokens, shortened, tokenize

MOST_SIDE, MOST_CONTEXT = 2048, 4096  # pixels and tokens, whose squares take memory beside the weights
SHORTER = (16, 32)  # tokens that most captions fit into
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TOKENIZER_FILES = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json")
"""Where transformers looks for code and for the names of further files."""
UNUSABLE = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, SafetensorError)
"""What open_clip and torch raise for configurations and weights that are odd, or do not fit."""
NEEDS_TRANSFORMERS = "has its own tokenizer: pip install 'sentencepiece>=0.2,<1' 'transformers>=5,<6' on every node"
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}
"""What a folder may say of its tokenizer: open_clip passes all else on to transformers, code included."""


class Clip(nn.Module):
    """A CLIP with its own normalisation of pixels. ``model_config`` is open_clip's, for saving.

    ``own_tokenizer``: of a text tower that does not read CLIP's own BPE, else None.
    """

    model: open_clip.CLIP
    mean: Tensor
    std: Tensor

    def __init__(self, model: open_clip.CLIP, model_config: dict, own_tokenizer: HFTokenizer | None = None):
        super().__init__()
        self.model = model
        self.model_config = model_config
        self.own_tokenizer = own_tokenizer
        mean, std = model.visual.image_mean, model.visual.image_std
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def build(cls, config: ClipConfig, seed: int) -> Self:
        """Returns a new CLIP whose random weights depend on ``config`` and ``seed`` alone."""
        model_config = config.model_config()
        # open_clip draws from the global generator, whose state must be the caller's again afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = open_clip.CLIP(**deepcopy(model_config))
            model.token_embedding.weight.data = _first_token_vectors(model.token_embedding)
        open_clip.set_model_preprocess_cfg(
            model, {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        )
        return cls(model, model_config)

    @classmethod
    def named(cls, name: str) -> Self:
        """Loads the CLIP that "open_clip:NAME:TAG" or "local-dir:FOLDER" names.

        Raises what ``pretrained`` and ``from_folder`` raise.
        """
        weights = ClipWeights.parse(name)
        return cls.from_folder(weights.folder) if weights.folder else cls.pretrained(weights.network, weights.tag)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Loads open_clip's local-dir layout: open_clip_config.json and open_clip_model.safetensors.

        A CLIP with a tokenizer of its own has that tokenizer's files there too. Raises FileNotFoundError when one of
        the two files is missing, ValueError when a file is damaged, names code or files elsewhere, or when the text
        tower or its tokenizer cannot be used.
        """
        model_config = config_in(folder)
        try:
            _check_sizes(Path(folder))
            model = open_clip.create_model(f"local-dir:{folder}")
        except UNUSABLE as error:
            raise _unusable(folder, error) from error
        return cls(model, model_config, _own_tokenizer(f"local-dir:{folder}", model_config)).eval()

    @classmethod
    def pretrained(cls, name: str, tag: str) -> Self:
        """Loads open_clip's model ``name`` with weights ``tag``, a tag that open_clip knows or a file.

        Takes the activation function that the tag was trained with. Raises ValueError on an unknown name or tag, on a
        download that fails, and when the text tower or its tokenizer cannot be used.
        """
        model_config = config_named(name)
        quick_gelu = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False)
        if quick_gelu:
            model_config["quick_gelu"] = True
        try:
            model = open_clip.create_model(name, tag, force_quick_gelu=quick_gelu)
        except Exception as error:  # a file that holds other weights, a pickle or anything else fails in many ways
            known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            said = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"CLIP {name} with weights {tag!r} could not be loaded ({said}): tags of {name} are {known}; without "
                "a network name a folder in open_clip's local-dir layout"
            ) from error
        return cls(model, model_config, _own_tokenizer(name, model_config)).eval()

    def save(self, folder: str | Path) -> None:
        """Writes open_clip's local-dir layout into ``folder``, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        preprocess = {"mean": self.model.visual.image_mean, "std": self.model.visual.image_std}
        document = {"model_cfg": self.model_config, "preprocess_cfg": preprocess}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
        save_tensors({k: v.contiguous() for k, v in self.model.state_dict().items()}, Path(folder) / WEIGHTS_FILE)
        if self.own_tokenizer is not None:
            self.own_tokenizer.save_pretrained(folder)

    def silence_unread_tokens(self) -> None:
        """Sets vectors of tokens to zero that training has left as ``build`` draws them.

        No caption had these tokens, and a random vector would change what a prompt means that has one.
        """
        # Weight decay leaves embeddings alone, so a vector that no caption used still equals its start exactly.
        embedding = self.model.token_embedding
        first = _first_token_vectors(embedding).to(embedding.weight)
        embedding.weight.data[(embedding.weight == first).all(1)] = 0

    @property
    def embed_dim(self) -> int:
        """Returns the dimension of the embeddings."""
        return self.model_config["embed_dim"]

    @property
    def image_size(self) -> int:
        """Returns the side of the images that ``encode_image`` takes, in pixels."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def context_length(self) -> int:
        """Returns the number of tokens that the text tower reads."""
        return self.model_config["text_cfg"].get("context_length", CONTEXT)

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns unit-norm embeddings, fp32 [b, d], of views uint8 [b, 3, image_size, image_size].

        Raises ValueError on another type or size.
        """
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            raise ValueError(f"CLIP takes uint8 views {expected}, got {images.dtype} {tuple(images.shape[1:])}")
        return self.encode_pixels(images / 255)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Returns unit-norm embeddings, fp32 [b, d], of images in [0, 1], [b, 3, image_size, image_size]."""
        # Channels last: on a CPU a small ResNet's convolutions and norms take a third less time.
        pixels = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Turns captions to what ``encode_text`` takes: BPE tokens int64 [b, 77], or its own [b, context_length].

        Longer captions are cut.
        """
        return _tokenize(self.own_tokenizer, captions)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Numbers of tokens, rising, to which captions that end within them may be cut for ``encode_text``.

        The last is its full length. In a causal tower a caption's end does not see what comes after it.
        """
        full, model = self.context_length, self.model
        causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"
        shorter = [n for n in SHORTER if n < full] if causal and self.own_tokenizer is None else []
        return (*shorter, full)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns unit-norm embeddings, fp32 [b, d], of this CLIP's tokens, cut as ``text_lengths`` allows."""
        if tokens.shape[1] in self.text_lengths[:-1]:
            return F.normalize(self._encode_shorter(tokens).float(), dim=-1)
        cut = cut_tokens(tokens, self.context_length) if self.own_tokenizer is None else tokens
        return F.normalize(self.model.encode_text(cut).float(), dim=-1)

    def _encode_shorter(self, tokens: Tensor) -> Tensor:
        """Runs open_clip's text tower with as many positions as there are tokens."""
        # open_clip adds all of its positions and its whole mask, so both are replaced for this call.
        length, model = tokens.shape[1], self.model
        cut = {
            "tower.positional_embedding": model.positional_embedding[:length],
            "tower.attn_mask": model.attn_mask[:length, :length],
        }
        return functional_call(_TextTower(model), cut, (tokens,))


class _TextTower(nn.Module):
    """An open_clip CLIP whose call is that of its text tower."""

    def __init__(self, tower: open_clip.CLIP):
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tower.encode_text(tokens)


def tokenizer_in(folder: str | Path) -> Callable[[Sequence[str]], Tensor]:
    """Returns ``Clip.tokenize`` of the CLIP in a folder, where the weights need not be.

    Raises ValueError as ``Clip.from_folder`` does.
    """
    return partial(_tokenize, _own_tokenizer(f"local-dir:{folder}", config_in(folder, [CONFIG_FILE])))


def _tokenize(own: HFTokenizer | None, captions: Sequence[str]) -> Tensor:
    return tokenize(captions) if own is None else own(shortened(captions))


def config_of(name: str) -> dict:
    """Returns open_clip's configuration of the CLIP that ``Clip.named`` would load. Raises as that does."""
    weights = ClipWeights.parse(name)
    return config_in(weights.folder) if weights.folder else config_named(weights.network)


def config_in(folder: str | Path, files: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE)) -> dict:
    """Returns open_clip's configuration of the CLIP in a folder with these ``files``, before anything of it is built.

    Raises as ``Clip.from_folder`` does.
    """
    for name in files:
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: name a CLIP folder in open_clip's local-dir layout")
    try:
        model_config = read_config(Path(folder) / CONFIG_FILE)["model_cfg"]
        _check_towers(str(folder), model_config)
    except (KeyError, TypeError, AttributeError) as error:
        raise _unusable(folder, error) from error
    _check_tokenizer_files(Path(folder))
    if model_config["text_cfg"].get("hf_tokenizer_name"):
        _check_links(Path(folder))
    return model_config


def config_named(name: str) -> dict:
    """Returns open_clip's configuration of its model ``name``. Raises ValueError as ``Clip.pretrained`` does."""
    # open_clip would take "hf-hub:..." and "local-dir:..." too, with whatever configuration is there.
    if name not in open_clip.list_models():
        close = get_close_matches(name, open_clip.list_models(), n=1)
        advice = f"did you mean {close[0]}?" if close else "choose one of open_clip.list_models()"
        raise ValueError(f"open_clip has no model {name!r}: {advice}")
    model_config = open_clip.get_model_config(name)
    _check_towers(name, model_config)
    return model_config


def _unusable(folder: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{folder} holds no CLIP that open_clip can load ({error!r}): fetch it again")


def _check_towers(name: str, model_config: dict) -> None:
    """Raises ValueError for towers that a folder cannot hold, and for other BPE tokens than CLIP's own.

    A tower of Hugging Face's or of timm's hub is built from what that hub says, which no folder has, and a tokenizer
    with other options than ``TOKENIZER_OPTIONS`` may run code of its folder. Raises KeyError, TypeError or
    AttributeError where this is not a configuration.
    """
    text, image = model_config["text_cfg"], model_config["vision_cfg"]
    options = text.get("tokenizer_kwargs", {}).keys() - TOKENIZER_OPTIONS
    if options:
        raise ValueError(
            f"{name}: tokenizer_kwargs names {', '.join(sorted(options))}, which could load code: only "
            f"{', '.join(sorted(TOKENIZER_OPTIONS))} are taken; choose another CLIP"
        )
    if "hf_model_name" in text:
        raise ValueError(f"{name}: its text tower {text['hf_model_name']} needs the hub: choose another CLIP")
    if ":" in (image.get("timm_model_name") or "") or image.get("timm_model_pretrained"):
        raise ValueError(
            f"{name}: its image tower {image['timm_model_name']} needs the hub to be built: choose another CLIP"
        )
    side, context = image.get("image_size", 0), text.get("context_length", CONTEXT)
    if max(side if isinstance(side, list) else [side]) > MOST_SIDE or context > MOST_CONTEXT:
        raise ValueError(f"{name} reads images over {MOST_SIDE} px or over {MOST_CONTEXT} tokens: choose another CLIP")
    if text.get("hf_tokenizer_name"):
        return
    odd = "tokenizer_kwargs" in text or text.get("vocab_size", VOCABULARY) != VOCABULARY
    if odd or text.get("context_length", CONTEXT) > CONTEXT:
        raise ValueError(
            f"{name} names no tokenizer and does not read CLIP's own BPE tokens, at most {CONTEXT}: choose another CLIP"
        )


def _check_sizes(folder: Path) -> None:
    """Raises ValueError for a folder whose configuration describes a larger CLIP than its weights are."""

    def wanted(record: logging.LogRecord) -> bool:
        return "weights" not in str(record.msg)  # open_clip warns on the root logger that there are none

    logging.getLogger().addFilter(wanted)
    try:
        with shapes_only(folder / WEIGHTS_FILE):
            open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False, device="meta")
    finally:
        logging.getLogger().removeFilter(wanted)


def _check_links(folder: Path) -> None:
    """Raises ValueError for a link out of a folder: transformers would open it, and the tokenizer be saved with it.

    The cache of Hugging Face's hub has folders of links to its blobs.
    """
    inside = os.path.realpath(folder)
    known = (inside, os.path.realpath(Path(inside).parent.parent / "blobs"))
    for path in folder.rglob("*"):
        if path.is_symlink() and path.name not in (CONFIG_FILE, WEIGHTS_FILE):
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in known):
                raise ValueError(f"{path} is a link that leads out of the folder: copy the folder with cp -rL first")


def _check_tokenizer_files(folder: Path) -> None:
    """Raises ValueError where a folder's tokenizer names code, or files elsewhere: transformers would open them."""
    for path in (folder / name for name in TOKENIZER_FILES if (folder / name).is_file()):
        found: list[tuple[str, object]] = [("", read_config(path))]
        for field, value in found:
            if isinstance(value, dict):
                found += value.items()
            elif isinstance(value, list):
                found += [(field, one) for one in value]
            elif value and _names_a_file(field, value):
                raise ValueError(f"{path} names a file of this machine ({field}), which is never opened: remove it")


def _names_a_file(field: str, value: object) -> bool:
    """Returns whether a field of a tokenizer is for a path, or its value is the path of something that is there."""
    if field in ("special_tokens_map_file", "local_files_only"):
        return False  # nobody opens the map, often left over from a saved tokenizer; the other is true or false
    return "_file" in field or (isinstance(value, str) and os.path.lexists(value) and not os.path.isdir(value))


def _own_tokenizer(name: str, model_config: dict) -> HFTokenizer | None:
    """Returns the tokenizer that a model, or "local-dir:FOLDER", has instead of CLIP's own BPE. Raises ValueError."""
    if not model_config["text_cfg"].get("hf_tokenizer_name"):
        return None
    try:
        # By default transformers asks at the terminal whether to run the code that a tokenizer of the hub brings.
        own = open_clip.get_tokenizer(name, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(f"{name} {NEEDS_TRANSFORMERS}") from error
    except Exception as error:  # files that hold anything else fail in many ways
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: its tokenizer cannot be loaded ({said}): fetch it again") from error
    # Where a tokenizer's vocabulary is not found, transformers makes one of a few special tokens.
    known, expected = len(own.tokenizer), model_config["text_cfg"].get("vocab_size", VOCABULARY)
    if 2 * known < expected:
        raise ValueError(
            f"{name}: its tokenizer knows {known:,} tokens, and its text tower {expected:,}: its vocabulary, such as "
            "tokenizer.json, is missing; fetch it again"
        )
    return own


def _first_token_vectors(embedding: nn.Embedding) -> Tensor:
    """Returns the token vectors before training, the same for every seed; their scale is open_clip's."""
    return 0.02 * torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(0))
