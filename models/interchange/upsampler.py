"""An upsampler as diffusers' UNet2DModel: super_res_first for all steps but the last, super_res_last for that one."""

import math
from pathlib import Path
from typing import Any

from models.image_configs import UpsamplerConfig
from models.interchange.decoder import process_of, read_part
from models.interchange.files import (
    CONFIG_FILE,
    Weights,
    check_config,
    derive,
    load,
    read_json,
    read_ours,
    write_ours,
    write_part,
)
from models.interchange.names import put_under, to_theirs, under
from models.interchange.schedules import Process, check_process, read_scheduler, write_scheduler
from models.interchange.unet import Shape, attention_levels, idle_fields, multipliers_of, unet_config, unet_table
from models.upsampler import Upsampler

SCALE = 4


def shape_of(config: UpsamplerConfig) -> Shape:
    """Returns the U-Net of such an upsampler. Raises ValueError for one that predicts the image."""
    if config.prediction == "x0":
        raise ValueError(
            "prediction is 'x0', which adds to the enlarged small image: only 'eps' and 'v' go to diffusers"
        )
    return Shape(
        in_channels=6 * config.patch**2,
        out_channels=3 * config.patch**2,
        channels=config.channels,
        depth=config.depth,
        multipliers=config.multipliers,
        scale_shift=config.scale_shift,
    )


def export_upsampler(upsampler: Upsampler, folder: str | Path) -> None:
    """Writes super_res_first, super_res_last, super_res_scheduler and ours/upsampler.

    Without a second U-Net both hold the same one. Where the upsampler works on patches, they take and give
    ``pixel_unshuffle(x, patch)``, noise and condition one after the other. A correction of pixels comes after them and
    is in ours/. Raises ValueError, before anything is
    written, on an upsampler that diffusers' classes cannot hold.
    """
    folder, config = Path(folder), upsampler.config
    shape = shape_of(config)
    theirs = unet_config(shape, config.image_size // config.patch, config.dropout)
    weights = upsampler.state_dict()
    last = "last_unet." if config.last_unet else "unet."
    for name, prefix in (("super_res_first", "unet."), ("super_res_last", last)):
        write_part(folder / name, theirs, to_theirs(under(prefix, weights), unet_table(shape)))
    write_scheduler(folder / "super_res_scheduler", process_of(config), "fixed_small_log", clip=1.0)
    rest = {name: tensor for name, tensor in weights.items() if name.startswith("pixels.")}
    write_ours(folder, "upsampler", config, {}, rest)


def import_upsampler(folder: str | Path) -> Upsampler:
    """Reads an upsampler in diffusers' layout, Karlo's or an exported one; fp32, in evaluation mode.

    Karlo's files do not say that it enlarges 4 times, nor how it was trained: images to enlarge are not corrupted,
    and crops are whole images. Raises FileNotFoundError when a file is missing, and ValueError when something does
    not fit.
    """
    folder = Path(folder)
    found = read_json(folder / "super_res_first" / CONFIG_FILE)
    process = read_scheduler(folder / "super_res_scheduler")
    ours = read_ours(folder, "upsampler", UpsamplerConfig)
    last = (folder / "super_res_last").is_dir()
    config = derive(folder, lambda: config_of(found, process, last)) if ours is None else ours.config
    check_process(folder / "super_res_scheduler", process, process_of(config))
    shape = shape_of(config)
    expected = unet_config(shape, config.image_size // config.patch, config.dropout)
    weights: Weights = {} if ours is None else ours.weights
    for name, prefix in (("super_res_first", "unet."), ("super_res_last", "last_unet.")):
        if prefix == "unet." or config.last_unet:
            path = folder / name / CONFIG_FILE
            check_config(path, read_json(path), expected, idle_fields(shape))
            weights |= put_under(prefix, read_part(folder / name, unet_table(shape)))
    return load(lambda: Upsampler(config), weights, folder)


def config_of(unet: dict[str, Any], process: Process, last_unet: bool) -> UpsamplerConfig:
    """Returns our configuration of the upsampler that this config.json describes."""
    patch = math.isqrt(unet["in_channels"] // 6)
    widths = unet["block_out_channels"]
    attention_levels(unet)  # refuses blocks of other kinds
    return UpsamplerConfig(
        low_size=unet["sample_size"] * patch // SCALE,
        image_size=unet["sample_size"] * patch,
        channels=widths[0],
        depth=unet["layers_per_block"],
        multipliers=multipliers_of(widths),
        dropout=unet.get("dropout", 0.0),
        crop=1.0,
        schedule=process.schedule,
        steps=process.steps,
        prediction=process.prediction,
        patch=patch,
        corrupt_at_inference=False,
        scale_shift=unet.get("resnet_time_scale_shift", "default") == "scale_shift",
        last_unet=last_unet,
    )
