"""A whole cascade leaves in diffusers' layout, is drawn with by diffusers alone, and comes back to the last bit."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel

from models.cascade import UnCLIP
from models.clip import Clip
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.interchange import export_unclip, import_unclip
from models.upsampler import Upsampler
from pipeline.config import preset_config
from pipeline.cost.flops import text_tower
from tests.models.karlo import assert_same
from tests.models.small_models import CAPTIONS, DECODER, DIM, UPSAMPLER_256, make

OPTIONS: Any = {"size": 64, "decoder_steps": 2, "prior_steps": 2}


def wide() -> UnCLIP:
    """As ``make``, with a decoder and upsamplers that classes of diffusers hold."""
    unclip, eps = make(), {"channels": 32, "prediction": "eps"}
    torch.manual_seed(1)
    upsampler = dataclasses.replace(UPSAMPLER_256, **eps)
    return dataclasses.replace(
        unclip,
        decoder=Decoder(dataclasses.replace(DECODER, channels=32), DIM).eval(),
        upsampler_256=Upsampler(upsampler).eval(),
        upsampler_1024=Upsampler(dataclasses.replace(unclip.upsampler_1024.config, **eps)).eval(),
    )


def assert_same_generator(found: UnCLIP, expected: UnCLIP) -> None:
    assert found.sampling == expected.sampling
    for field in dataclasses.fields(UnCLIP):
        before, after = getattr(expected, field.name), getattr(found, field.name)
        if isinstance(before, torch.nn.Module):
            assert getattr(after, "config", None) == getattr(before, "config", None)
            assert_same(before.state_dict(), after.state_dict())
    assert (found.codec is None) == (expected.codec is None)
    if expected.codec:
        assert_same(expected.codec.tensors(), found.codec.tensors())


def test_narrow_models_come_back_and_wide_ones_are_diffusers_own(tmp_path: Path) -> None:
    narrow, broad = make(), wide()
    assert export_unclip(narrow, tmp_path / "narrow") == ["diffusion_prior"]
    assert_same_generator(import_unclip(tmp_path / "narrow"), narrow)
    models = ["diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"]
    assert export_unclip(broad, tmp_path / "wide") == models
    assert_same_generator(import_unclip(tmp_path / "wide"), broad)
    for kind, part in (
        (PriorTransformer, "prior"),
        (UNet2DConditionModel, "decoder"),
        (UNet2DModel, "super_res_first"),
        (UNet2DModel, "upsampler_1024/super_res_first"),
    ):
        kind.from_pretrained(tmp_path / "wide" / part)
    with pytest.raises(FileExistsError, match="is not empty"):
        export_unclip(broad, tmp_path / "wide")


@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_small_presets_go_whole(preset: str, tmp_path: Path) -> None:
    config = preset_config(preset)
    clip = Clip.build(config.clip.model, seed=0)
    prior, decoder = config.diffusion_prior.model, config.decoder.model
    unclip = UnCLIP(
        clip,
        Decoder(decoder, clip.embed_dim, text_tower(decoder, config.clip)),
        DiffusionPrior(prior, clip.embed_dim, text_tower(prior, config.clip)),
        upsampler_256=Upsampler(config.upsampler_256.model),
        upsampler_1024=Upsampler(config.upsampler_1024.model),
        sampling=config.bundle.sampling,
    )
    export_unclip(unclip, tmp_path)
    assert_same_generator(import_unclip(tmp_path), unclip)


SCRIPT = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
folder, out, other = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to("cpu")
options = {"size": 64, "decoder_steps": 2, "prior_steps": 2}
np.save(out, pipe(["a red fox", "a blue house", ""], seeds=[3, 4, 5], output_type="np", **options).images)
draw = lambda: pipe("a red fox", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **options).images
first, second = draw(), draw()
assert len(first) == 2 and first[0].size == (64, 64) and first[0].tobytes() == second[0].tobytes()
assert first[0].tobytes() != first[1].tobytes()
assert pipe.to(torch.bfloat16) is pipe and draw()[0].tobytes() == first[0].tobytes()
try:
    pipe.save_pretrained("saved")
except ValueError as e:
    assert f"{folder} cannot be saved again: copy or upload the folder" in str(e)
else:
    raise AssertionError("saved")
pipe.set_progress_bar_config(disable=True)
assert draw()[0].tobytes() == first[0].tobytes()
assert "models" not in sys.modules and not hasattr(sys.modules["unclip_models"], "ANOTHER")
assert not torch.backends.cudnn.allow_tf32
DiffusionPipeline.from_pretrained(other, trust_remote_code=True)
assert sys.modules["unclip_models"].ANOTHER  # with its own code
assert draw()[0].tobytes() == first[0].tobytes()
"""


@pytest.mark.integration
def test_diffusers_draws_what_we_draw_without_a_package_of_ours(tmp_path: Path) -> None:
    unclip = wide()
    export_unclip(unclip, tmp_path / "exported")
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    shutil.copytree(tmp_path / "exported", tmp_path / "other")
    (code,) = (tmp_path / "other").rglob("unclip_models/__init__.py")
    code.write_text(f"{code.read_text()}\nANOTHER = True\n")
    words = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("exported", "images.npy", "other"))]
    ended = subprocess.run(
        words, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    expected = unclip.generate(CAPTIONS, [3, 4, 5], **OPTIONS).image.numpy()
    found = np.load(tmp_path / "images.npy")
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
