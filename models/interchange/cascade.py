"""A whole generator as a folder in diffusers' layout, such as Karlo's, and back.

An export has two additions to that layout. Models that no class of diffusers holds, CLIP and the sampling defaults lie
in ``ours``, and a second upsampler in a folder of its name. Code lies beside the weights: the class of a pipeline, and
a copy of ``models`` under another name. It is for diffusers; nothing here reads or runs it.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import models
from models.cascade import UnCLIP
from models.clip import Clip
from models.folder import load_codec, load_model, save_codec, save_model
from models.interchange.decoder import export_decoder, import_decoder
from models.interchange.files import OURS, write_json
from models.interchange.prior import export_prior, import_prior
from models.interchange.upsampler import export_upsampler, import_upsampler
from models.sampling_config import SAMPLING_FILE, UPSAMPLERS, SamplingConfig, read_sampling, write_sampling

KARLO_SAMPLING = SamplingConfig(
    candidates=1,
    prior_steps=25,
    prior_sampler="ddpm",
    prior_guidance=3.0,
    decoder_steps=50,
    decoder_guidance=7.0,
    upsampler_256_steps=7,
    size=256,
)
"""Karlo's own defaults: it draws one embedding a caption, and ends at 256 px, after six steps and one of a second
network that a model trained here does not have."""


class Converter(NamedTuple):
    """Converts a model that classes of diffusers may hold.

    Attributes:
        folder: Folder of the converted model in the export.
        tells: Subfolder that exists if the model was converted.
        write: Function that exports the model.
        read: Function that imports the model.
    """

    folder: str
    tells: str
    write: Callable[..., None]
    read: Callable[..., Any]


PARTS = {
    "diffusion_prior": Converter(".", "prior", export_prior, import_prior),
    "decoder": Converter(".", "decoder", export_decoder, import_decoder),
} | {
    # diffusers' layout has room for one upsampler; a second one gets a folder of its own.
    name: Converter("." if i == 0 else name, "super_res_first", export_upsampler, import_upsampler)
    for i, name in enumerate(UPSAMPLERS)
}
PIPELINE = Path(__file__).with_name("pipeline.py")
CODE = "unclip_models"


def export_unclip(unclip: UnCLIP, folder: str | Path) -> list[str]:
    """Writes all models, in the classes of diffusers where they fit, and the class of a pipeline that draws with them.

    Returns the models that are in classes of diffusers. Raises FileExistsError when the folder is not empty.
    """
    folder, native = Path(folder), []
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder for the export")
    for name in ("ar_prior", *PARTS):
        if (model := getattr(unclip, name)) is None:
            continue
        part = PARTS.get(name)
        # ValueError where diffusers has no class for it, before anything is written: then it goes to ours/.
        with suppress(ValueError):
            if part is not None:
                part.write(model, folder / part.folder)
                native.append(name)
                continue
        save_model(folder / OURS / name, model)
    unclip.clip.save(folder / OURS / "clip")
    if unclip.codec is not None:
        save_codec(folder / OURS / "codec", unclip.codec)
    write_sampling(folder / OURS, unclip.sampling)
    _write_code(folder)
    return native


def _write_code(folder: Path) -> None:
    """Writes model_index.json, and the code that it names, which needs no package of ours."""
    index = {"_class_name": [PIPELINE.stem, "UnCLIPRayPipeline"], "unclip": [PIPELINE.stem, "Generator"]}
    write_json(folder / "model_index.json", index)
    source = Path(models.__file__).parent
    for file in source.rglob("*.py"):
        copy = folder / "unclip" / CODE / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Under another name, so that the copy never meets an installed package called models.
        copy.write_text(re.sub(r"^(\s*(?:from|import)) models\b", rf"\1 {CODE}", file.read_text(), flags=re.MULTILINE))
    # diffusers looks for the pipeline's class in the folder, and for its part's class in the part's subfolder.
    for place in (folder, folder / "unclip"):
        shutil.copy(PIPELINE, place)


def import_unclip(folder: str | Path, clip: Clip | None = None, sampling: SamplingConfig | None = None) -> UnCLIP:
    """Reads a folder in diffusers' layout, an export without any loss, and joins its models to a CLIP.

    Args:
        folder: Folder of an export, or Karlo's.
        clip: CLIP that the models were trained with, by default the export's; all models come on its device. Karlo's
            folder has none with an image encoder: its CLIP is OpenAI's ViT-L/14.
        sampling: Sampling defaults of the generator; by default the export's, or Karlo's.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Something does not fit, or embeddings have another dimension than CLIP's.
    """
    folder = Path(folder)
    ours = folder / OURS
    if clip is None:
        if not (ours / "clip").is_dir():
            raise FileNotFoundError(f"{ours / 'clip'} is missing: pass the CLIP that the models were trained with")
        clip = Clip.from_folder(ours / "clip")
    device, found = clip.mean.device, {}
    for name, part in PARTS.items():
        if (folder / part.folder / part.tells).is_dir():
            found[name] = part.read(folder / part.folder)
    for name in ("ar_prior", *PARTS):
        if name not in found and (ours / name).is_dir():
            found[name] = load_model(ours / name)
    if "decoder" not in found:
        raise FileNotFoundError(f"{folder} has no decoder: name a folder in diffusers' layout")
    for name, part in PARTS.items():
        dim = getattr(found.get(name), "embed_dim", clip.embed_dim)
        if dim != clip.embed_dim:
            raise ValueError(
                f"{folder / part.tells} was trained on {dim}-dimensional embeddings, this CLIP makes "
                f"{clip.embed_dim}: pass the CLIP that it was trained with, which for Karlo is OpenAI's ViT-L/14"
            )
    if sampling is None:
        sampling = read_sampling(ours) if (ours / SAMPLING_FILE).is_file() else KARLO_SAMPLING
    codec = load_codec(ours / "codec", device) if (ours / "codec").is_dir() else None
    return UnCLIP(clip, codec=codec, sampling=sampling, **{name: model.to(device) for name, model in found.items()})
