import re
import subprocess
import sys
from typing import Any

import pytest

from models.image_configs import DecoderConfig, UpsamplerConfig


def test_configurations_are_read_without_torch() -> None:
    code = "import sys, models.image_configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BEYOND: list[tuple[type, str, Any]] = [
    *((DecoderConfig, name, 0) for name in ("depth", "patch", "clip_tokens")),
    *((DecoderConfig, name, 1) for name in ("text_context", "vocabulary", "steps")),
    *((DecoderConfig, "multipliers", value) for value in ((), (1, 0))), (DecoderConfig, "attention_resolutions", ()),
    (DecoderConfig, "dropout", 1.0), (DecoderConfig, "drop_image", -0.1), (DecoderConfig, "drop_text", 1.5),
    (UpsamplerConfig, "corruption", "noise"), (UpsamplerConfig, "crop", 0.0), (UpsamplerConfig, "prediction", "score"),
    (UpsamplerConfig, "schedule", "quadratic"), (UpsamplerConfig, "max_snr", float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *((kind, {name: value}, re.escape(f"{name} is {value!r}")) for kind, name, value in BEYOND),
        (DecoderConfig, {"image_size": 60}, "60 px is not a multiple of 8"),
        (DecoderConfig, {"image_size": 64, "patch": 16}, "64 px is not a multiple of 128"),
        (DecoderConfig, {"channels": 33}, "channels is 33: use an even number"),
        (DecoderConfig, {"head_channels": 96}, "head_channels is 96: use a divisor of the 1024 channels at 32 px"),
        (DecoderConfig, {"attention_resolutions": (32, 12)}, r"use one or more of \(64, 32, 16, 8\)"),
        (DecoderConfig, {"text_width": 100}, "text_width 100 is not a multiple of text_heads 32"),
        (DecoderConfig, {"null_image": "ones"}, "null_image is 'ones': use 'zero' or 'learned'"),
        (DecoderConfig, {"schedule": "quadratic"}, "schedule is 'quadratic': use 'cosine' or 'linear'"),
        (DecoderConfig, {"prediction": "score"}, "prediction is 'score': use 'eps', 'v' or 'x0'"),
        (DecoderConfig, {"max_snr": 0.0}, "max_snr is 0.0: use a positive number, or null"),
        (DecoderConfig, {"text_encoder": "t5"}, "text_encoder is 't5': use 'glide', 'clip' or 'frozen'"),
        (DecoderConfig, {"context_width": 24}, "context_width is 24: use 0, or a positive width with text_encoder"),
        (DecoderConfig, {"text_encoder": "clip", "context_width": -1}, "context_width is -1"),
        (DecoderConfig, {"whiten": True, "embedding_norm": 3.0}, "whiten and embedding_norm both scale embeddings"),
        (DecoderConfig, {"embedding_norm": -1.0}, "embedding_norm is -1.0: use 0 or more"),
        (DecoderConfig, {"layout_channels": -1}, "layout_channels is -1: use 0 or more"),
        (DecoderConfig, {"pixel_channels": -1}, "pixel_channels is -1: use 0 or more"),
        (UpsamplerConfig, {"image_size": 250}, "image_size 250 is not a multiple of low_size 64"),
        (UpsamplerConfig, {"low_size": 0}, "image_size 256 is not a multiple of low_size 0"),
        (UpsamplerConfig, {"low_size": 256}, "image_size 256 is not a multiple of low_size 256"),
        (UpsamplerConfig, {"corruption": "bsr", "low_size": 128}, "corruption 'bsr' shrinks by 4, not 2"),
        (UpsamplerConfig, {"crop": 0.3}, "crop 0.3 of 256 px is not a multiple of 4 px"),
        (UpsamplerConfig, {"crop": 0.25, "patch": 16}, "64 px is not a multiple of 128"),
    ],
)
def test_mistakes_are_named(kind: type, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        kind(**change)
    assert "\n" not in str(caught.value)


def test_what_is_near_a_mistake_is_taken() -> None:
    DecoderConfig(attention_resolutions=(64,), channels=24, head_channels=24, multipliers=(1, 2))
    UpsamplerConfig(low_size=128)
    UpsamplerConfig(crop=1.0)
