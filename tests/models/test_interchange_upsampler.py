"""The upsampler against diffusers' own classes, through folders that each side wrote."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UnCLIPScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from models.diffusion.samplers import ancestral
from models.diffusion.schedules import make_schedule, strided_grid
from models.image_configs import UpsamplerConfig
from models.interchange import export_upsampler, import_upsampler
from models.random_streams import RandomStreams
from models.upsampler import Upsampler, upsampler_denoise
from tests.models import karlo
from tests.models.karlo import UPSAMPLER as CONFIG
from tests.models.karlo import assert_same, lively, precise
from tests.models.small_models import normal

NAMES = ("super_res_first", "super_res_last")


@pytest.fixture(scope="module")
def theirs() -> dict[str, UNet2DModel]:
    """Karlo's two networks, small."""
    return {name: lively(karlo.upsampler(16, 2, (32, 64), 0.1), seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def folder(theirs: dict[str, UNet2DModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("karlo")
    for name, network in theirs.items():
        network.save_pretrained(folder / name)
    UnCLIPScheduler(variance_type="fixed_small_log").save_pretrained(folder / "super_res_scheduler")
    return folder


def low(width: int = 6) -> Tensor:
    """Small images, dim enough to stay within [-1, 1] when enlarged: we clamp there, UnCLIPPipeline does not."""
    return 0.5 * normal(3, 3, 4, width, seed=3).tanh()


def enlarged(width: int = 6) -> Tensor:
    return F.interpolate(low(width), size=[16, 4 * width], mode="bicubic", align_corners=False, antialias=True)


def test_karlos_two_networks_open_here_as_one_upsampler(folder: Path, theirs: dict[str, UNet2DModel]) -> None:
    upsampler = import_upsampler(folder)
    assert upsampler.config == CONFIG
    x, t = normal(3, 3, 16, 24), torch.tensor([0, 421, 999])
    with torch.no_grad():
        both = torch.cat([x, enlarged()], dim=1)
        first, last = (theirs[name](both, t).sample for name in NAMES)
        expected = torch.cat([last[:1], first[1:]])
        assert expected.abs().mean() > 0.1
        torch.testing.assert_close(upsampler(x, t, low()), expected, atol=1e-4, rtol=0)


def test_sampling_ends_with_karlos_second_network(folder: Path, theirs: dict[str, UNet2DModel]) -> None:
    """Karlo's loop with UnCLIPScheduler; both sides get the same noise."""
    scheduler = precise(UnCLIPScheduler.from_pretrained(folder / "super_res_scheduler"))
    scheduler.set_timesteps(4)
    x, noises = normal(3, 3, 16, 16), torch.Generator().manual_seed(4)
    for i, t in enumerate(scheduler.timesteps):
        name, following = (NAMES[0], scheduler.timesteps[i + 1]) if i < 3 else (NAMES[1], None)
        with torch.no_grad():
            output = theirs[name](torch.cat([x, enlarged(4)], dim=1), t).sample
        x = scheduler.step(output, t, x, prev_timestep=following, generator=noises).prev_sample

    noises = torch.Generator().manual_seed(4)
    rng = RandomStreams([(0, 3)])
    rng.normal = lambda purpose, *shape: torch.randn(3, *shape, generator=noises)
    denoise = upsampler_denoise(import_upsampler(folder), low(4))
    ours = ancestral(denoise, normal(3, 3, 16, 16), strided_grid(1000, 4), make_schedule("cosine", 1000), rng, "small")
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)


def test_theirs_to_ours_to_theirs_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    export_upsampler(import_upsampler(folder), tmp_path)
    for name in NAMES:
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert_same(load_file(folder / file), load_file(tmp_path / file))


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_shift": True, "last_unet": False},  # the paper's
        {"corruption": "bsr", "schedule": "linear", "prediction": "v", "multipliers": (1, 1, 3), "depth": 1},
        {"scale_shift": True, "last_unet": False, "patch": 2, "low_size": 8, "image_size": 32, "crop": 0.5},
        {"patch": 2, "low_size": 8, "image_size": 32, "crop": 0.5, "pixel_channels": 5},
    ],
)
def test_ours_opens_in_diffusers_and_comes_back_to_the_bit(changes: dict, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    upsampler = lively(Upsampler(config))
    export_upsampler(upsampler, tmp_path)
    x, t = normal(3, 3, 16, 24), torch.tensor([0, 421, 999])
    with torch.no_grad():
        seen = torch.cat([x, enlarged()], dim=1)
        patches = F.pixel_unshuffle(seen, config.patch)
        first, last = (UNet2DModel.from_pretrained(tmp_path / name).eval()(patches, t).sample for name in NAMES)
        theirs = F.pixel_shuffle(torch.cat([last[:1], first[1:]]), config.patch)
        if upsampler.pixels is not None:
            theirs = upsampler.pixels(theirs, seen, upsampler.unet.timestep(t))
        torch.testing.assert_close(theirs, upsampler(x, t, low()), atol=1e-4, rtol=0)
    kind = DDPMScheduler if config.schedule == "linear" else UnCLIPScheduler
    kind.from_pretrained(tmp_path / "super_res_scheduler")
    back = import_upsampler(tmp_path)
    assert back.config == config
    assert_same(upsampler.state_dict(), back.state_dict())


def test_one_network_alone_is_an_upsampler_too(folder: Path, tmp_path: Path) -> None:
    for name in ("super_res_first", "super_res_scheduler"):
        shutil.copytree(folder / name, tmp_path / name)
    assert import_upsampler(tmp_path).config == dataclasses.replace(CONFIG, last_unet=False)


def test_an_upsampler_that_adds_to_the_small_image_is_refused(tmp_path: Path) -> None:
    config = UpsamplerConfig(channels=32, depth=1, multipliers=(1, 2), prediction="x0")
    with pytest.raises(ValueError, match="prediction is 'x0', which adds to the enlarged small image"):
        export_upsampler(Upsampler(config), tmp_path)
    assert not list(tmp_path.iterdir())
