"""Figures of validation, and previews."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.decoder import decoder_denoise
from models.diffusion.samplers import ddim
from models.diffusion.schedules import make_schedule, trailing_grid
from models.losses import Losses
from models.pixels import to_uint8
from models.prior_configs import DiffusionPriorConfig
from models.random_streams import RandomStreams
from pipeline.training.task import Batch
from pipeline.training.tasks import decoder
from pipeline.training.tasks.clip import ClipTask
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.tasks.figures import by_timestep, conditional_figures
from tests.pipeline.training.trainings import DECODER


def test_losses_are_told_apart_by_timestep() -> None:
    """Every row is in the quarter of its own timestep, and the quarters make up the whole."""
    streams = [RandomStreams([(1, 30)]), RandomStreams([(2, 10), (3, 5)])]
    t = torch.cat([rng.integers("t", 50) for rng in streams])
    figures = by_timestep(t.float(), streams, 50)
    for i, (low, high) in enumerate([(0, 13), (13, 25), (25, 38), (38, 50)]):
        inside = t[(t >= low) & (t < high)]
        assert figures[f"loss_quarter_{i + 1}"] == pytest.approx(float(inside.float().mean()))
    assert len(figures) == 4


def test_a_quarter_without_rows_has_no_figure() -> None:
    rng = RandomStreams([(1, 1)])
    (name,) = by_timestep(torch.ones(1), [rng], 8)
    assert name == f"loss_quarter_{int(rng.integers('t', 8)) // 2 + 1}"


def test_a_prior_that_repeats_the_caption_is_as_near_as_the_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prior makes of noise is compared with the image embedding, in the direction alone."""
    config = DiffusionPriorConfig(text_context=8, width=32, depth=1, heads=2, steps=50)
    task = DiffusionPriorTask(config, 16)
    model = task.model(0)
    image, text = F.normalize(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    batch = {"tokens": torch.zeros(6, 77, dtype=torch.int64), "image_embedding": image, "text_embedding": text}
    nearness = float((image * text).sum(-1).mean())
    for made, cosine in ((text, nearness), (3 * image, 1.0), (-image, -1.0)):
        monkeypatch.setattr(model, "predict", lambda x_t, t, *_, made=made: made * 7)
        figures = task.validate(model, [(batch, RandomStreams([(1, 6)]))])
        assert figures["cosine_of_mean"] == pytest.approx(cosine, abs=1e-5)
        assert figures["cosine_of_text"] == pytest.approx(nearness, abs=1e-5)


def test_every_row_gets_the_condition_of_another() -> None:
    """Also one that is alone in the last batch."""
    rows = torch.arange(5.0)
    examples = [
        ({"own": part, "condition": part}, RandomStreams([(i, len(part))])) for i, part in enumerate(rows.split(2))
    ]

    def loss(batch: Batch, rng: RandomStreams) -> Losses:
        return Losses((batch["condition"] - batch["own"]).abs(), {})

    figures = conditional_figures(loss, examples, ["condition"])
    assert figures["loss"] == 0
    assert figures["condition_gap"] == pytest.approx((4 + 1 * 4) / 5)


def test_clip_is_validated_in_fp32_under_autocast() -> None:
    """In bf16 captions that are nearly as good as the right one would be as good."""
    image = F.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    batch = {"image": image, "tokens": image + 0.3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1))}
    model = SimpleNamespace(
        encode_image=lambda x: x,
        encode_text=lambda x: F.normalize(x.float(), dim=1),
        model=SimpleNamespace(logit_scale=torch.tensor(4.6)),
    )
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(ClipTask.validate(ClipTask.__new__(ClipTask), model, [(batch, RandomStreams([(0, 64)]))]))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_previews_end_before_timestep_0() -> None:
    """There a decoder that predicts the image draws worse what is finished."""
    config = replace(DECODER, prediction="x0", steps=1000)
    task = DecoderTask(config, 16)
    model = task.model(0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    images = torch.randint(256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8, generator=generator)
    z = F.normalize(torch.randn(2, 16, generator=generator), dim=-1)
    batch = {"image": images, "image_embedding": z, "tokens": torch.zeros(2, 77, dtype=torch.int64)}
    with torch.no_grad():
        preview = task.preview(model, batch, RandomStreams([(1, 2)]))
        denoise = decoder_denoise(model, z, batch["tokens"], guidance=0.0)
        noise = RandomStreams([(1, 2)]).normal("preview", 3, config.image_size, config.image_size)
        drawn = to_uint8(
            ddim(denoise, noise, trailing_grid(1000, decoder._PREVIEW_STEPS), make_schedule(config.schedule, 1000))
        )
    assert torch.equal(preview, torch.cat([torch.cat(list(images), 2), torch.cat(list(drawn), 2)], 1))
