import subprocess
import sys

import pytest

from models.image_configs import DecoderConfig, UpsamplerConfig

UPSAMPLER_1024 = {
    "low_size": 256,
    "image_size": 1024,
    "channels": 192,
    "depth": 2,
    "multipliers": (1, 1, 2, 2, 4, 4),
    "dropout": 0.0,
    "corruption": "bsr",
    "schedule": "linear",
}


def test_configurations_are_read_without_torch() -> None:
    code = "import sys, models.image_configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_crops_are_a_quarter_of_the_side() -> None:
    assert UpsamplerConfig().crop_size == 64
    large = UpsamplerConfig(**UPSAMPLER_1024)
    assert (large.crop_size, large.scale) == (256, 4)


def test_patches_shrink_the_feature_maps() -> None:
    assert DecoderConfig().feature_sides() == (64, 32, 16, 8)
    assert DecoderConfig(patch=2, multipliers=(1, 2, 3), attention_resolutions=(8,)).feature_sides() == (32, 16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 60}, "60 px is not a multiple of 8"),
        ({"image_size": 64, "patch": 16}, "64 px is not a multiple of 128"),
        ({"channels": 33}, "channels is 33: use an even number"),
        ({"depth": 0}, "depth is 0"),
        ({"multipliers": ()}, "multipliers is"),
        ({"multipliers": (1, 0)}, "multipliers is"),
        ({"patch": 0}, "patch is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"head_channels": 96}, "head_channels is 96: use a divisor of the 1024 channels at 32 px"),
        ({"attention_resolutions": (32, 12)}, r"use one or more of \(64, 32, 16, 8\)"),
        ({"attention_resolutions": ()}, "attention_resolutions is"),
        ({"attention_resolutions": (64,), "channels": 24, "head_channels": 24, "multipliers": (1, 2)}, None),
        ({"text_context": 1}, "text_context is 1"),
        ({"text_width": 100}, "text_width 100 is not a multiple of text_heads 32"),
        ({"vocabulary": 1}, "vocabulary is 1"),
        ({"clip_tokens": 0}, "clip_tokens is 0"),
        ({"drop_image": -0.1}, "drop_image is -0.1"),
        ({"drop_text": 1.5}, "drop_text is 1.5"),
        ({"null_image": "ones"}, "null_image is 'ones': use 'zero' or 'learned'"),
        ({"schedule": "quadratic"}, "schedule is 'quadratic': use 'cosine' or 'linear'"),
        ({"steps": 1}, "steps is 1"),
        ({"prediction": "score"}, "prediction is 'score': use 'eps', 'v' or 'x0'"),
        ({"max_snr": 0.0}, "max_snr is 0.0: use a positive number, or null"),
    ],
)
def test_decoder_mistakes_are_named(change: dict, message: str | None) -> None:
    if message is None:
        DecoderConfig(**change)
    else:
        with pytest.raises(ValueError, match=message) as caught:
            DecoderConfig(**change)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 250}, "image_size 250 is not a multiple of low_size 64"),
        ({"low_size": 0}, "image_size 256 is not a multiple of low_size 0"),
        ({"low_size": 256}, "image_size 256 is not a multiple of low_size 256"),
        ({"corruption": "noise"}, "corruption is 'noise'"),
        ({"corruption": "bsr", "low_size": 128}, "corruption 'bsr' shrinks by 4, not 2"),
        ({"low_size": 128}, None),
        ({"crop": 0.0}, "crop is 0.0"),
        ({"crop": 0.3}, "crop 0.3 of 256 px is not a multiple of 4 px"),
        ({"crop": 0.25, "patch": 16}, "64 px is not a multiple of 128"),
        ({"crop": 1.0}, None),
        ({"schedule": "quadratic"}, "schedule is 'quadratic'"),
        ({"prediction": "score"}, "prediction is 'score'"),
        ({"max_snr": float("inf")}, "max_snr is inf"),
    ],
)
def test_upsampler_mistakes_are_named(change: dict, message: str | None) -> None:
    if message is None:
        UpsamplerConfig(**change)
    else:
        with pytest.raises(ValueError, match=message) as caught:
            UpsamplerConfig(**change)
        assert "\n" not in str(caught.value)
