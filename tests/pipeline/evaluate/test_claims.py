"""Intervals, conditions, upsamplers and tables on made-up models, where the answer is known."""

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import Clip
from models.diffusion.schedules import make_schedule
from models.image_configs import UpsamplerConfig
from models.pixels import from_uint8, psnr, resize
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler
from pipeline.evaluate import figure, upsamplers
from pipeline.evaluate.condition import CONDITION, Losses, losses
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.images import JUDGED
from pipeline.evaluate.statistics import derangement, interval
from pipeline.evaluate.subject import ONE_GROUP
from pipeline.evaluate.upsamplers import PSNR
from tests.pipeline.evaluate.made_up import normal, rows, subject

ANY = subject(JUDGED, "decoder")
BELOW = subject(replace(JUDGED, better="below"), "decoder")

# --- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_agrees_with_normal_theory_and_repeats() -> None:
    x = normal(400, seed=1) * 3 + 5
    found, error = interval(x, range(400), 0), float(np.std(x.numpy(), ddof=1)) / 20
    assert found[:2] == pytest.approx((float(x.mean()) - 1.96 * error, float(x.mean()) + 1.96 * error), abs=0.3 * error)
    assert interval(x, range(400), 0) == found != interval(x, range(400), 1)
    assert interval(torch.full((9,), 2.0), range(9), 0) == pytest.approx((2.0, 2.0, False))
    assert all(map(math.isnan, interval(x[:1], [0], 0)[:2]))


def test_copies_of_rows_in_groups_add_no_certainty() -> None:
    x = normal(40, seed=1)
    once = interval(x, range(40), 0)
    assert interval(x.repeat(3), [*range(40)] * 3, 0) == pytest.approx(once)
    apart = interval(x.repeat(3), range(120), 0)
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / 3**0.5, rel=0.1)


def test_rows_of_one_group_are_drawn_one_by_one_and_it_is_said() -> None:
    """Drawn as a group they would leave an interval without width, which is on one side of 0 whatever was measured."""
    x = normal(30, seed=1)
    alone, together = interval(x, range(30), 0), interval(x, ["g"] * 30, 0)
    assert together == (alone.low, alone.high, True)
    found = ANY.compare(rows(30, groups=1), x, torch.zeros(30))
    assert (found.holds, found.note) == (False, ONE_GROUP)


def test_claims_hold_by_chance_one_time_in_forty_however_many_rows_a_group_has() -> None:
    """Values of rows without an effect, alike within groups of four: one by one they would hold 16 times in 100."""
    alike, held = rows(120, groups=30), 0
    for seed in range(300):
        values = normal(30, seed=seed).repeat_interleave(4) + 0.2 * normal(120, seed=1000 + seed)
        held += ANY.compare(alike, values, torch.zeros(120)).holds is True
    assert 0.005 < held / 300 < 0.06


def test_a_figure_holds_on_the_side_that_it_claims_and_above_the_least() -> None:
    x, zero, single = normal(50).abs(), torch.zeros(50), rows(50)
    above = ANY.compare(single, x, zero)
    assert above.holds
    assert above.values is not None
    assert sum(above.values) / 50 == pytest.approx(above.value, rel=1e-5)
    assert not BELOW.compare(single, x, zero).holds
    assert BELOW.compare(single, -x, zero).holds
    assert not ANY.compare(single, x, zero, at_least=float(x.mean()) + 0.01).holds
    assert not ANY.compare(single, x + 1, x + 1 - 1e-6).holds  # by rounding alone


def test_of_equal_derangements_the_nearest_to_half_is_taken() -> None:
    """As by counting all of them."""
    generator = random.Random(0)
    for n in range(2, 30):
        labels = [generator.randrange(4) for _ in range(n)]

        def shared(shift: int, labels: list[int] = labels) -> int:
            return sum(label == labels[(i + shift) % len(labels)] for i, label in enumerate(labels))

        best = min(range(1, n), key=lambda k: (shared(k), abs(k - n // 2)))
        assert derangement(labels).tolist() == [(i + best) % n for i in range(n)]
    with pytest.raises(ValueError, match="1 rows are too few"):
        derangement(["x"])


def of_losses(n: int, found: Losses) -> bool | None:
    """Returns whether the condition's claim holds by losses of n rows."""
    return subject(CONDITION, "decoder").compare(rows(n), found.other, found.own, keep=False).holds


# --- conditions -------------------------------------------------------------------------------------------------------


def test_a_model_that_ignores_its_condition_fails() -> None:
    x = normal(70, 3)

    def loss(batch: dict[str, Tensor], rng: Any) -> Tensor:
        return (batch["x"] + rng.normal("noise", 3)).square().sum(1)

    found = losses(loss, {"x": x, "c": x}, ("c",), derangement(range(70)), seed=0, draws=3)
    assert torch.equal(found.own, found.other)
    assert of_losses(70, found) is False


def test_a_model_that_uses_its_condition_loses_what_it_must_without() -> None:
    x, other = normal(70, 3), derangement(range(70))

    def loss(batch: dict[str, Tensor], rng: Any) -> Tensor:  # noise common to both sides falls out of the difference
        return (batch["x"] - batch["c"]).square().sum(1) + rng.normal("noise")

    found = losses(loss, {"x": x, "c": x}, ("c",), other, seed=0, draws=2)
    assert torch.allclose((found.other - found.own).float(), (x - x[other]).square().sum(1), atol=1e-4)
    assert of_losses(70, found)
    noisy = Losses(torch.zeros(4), torch.tensor([1.0, -3.0, 3.0, 2.0]))  # a positive mean alone is not enough
    assert of_losses(4, noisy) is False


def test_conditions_may_depend_on_the_draw() -> None:
    def prepare(batch: dict[str, Tensor], rng: Any) -> dict[str, Tensor]:
        return batch | {"c": batch["x"] + rng.normal("c")}

    x = torch.arange(40.0)
    found = losses(lambda b, _: b["c"] - b["x"], {"x": x}, ("c",), derangement(range(40)), seed=0, prepare=prepare)
    assert torch.allclose(found.other, found.own.roll(-20) + (x.roll(-20) - x), atol=1e-5)


# --- upsamplers -------------------------------------------------------------------------------------------------------

SMALL = UpsamplerConfig(
    low_size=16, image_size=64, channels=8, depth=1, multipliers=(1,), patch=4, prediction="v", steps=50, dropout=0.0
)
FIVE = SamplingConfig(upsampler_256_steps=5)


@dataclass
class Knows:
    """An upsampler that is sure of the clean image: ``answer``, or for None the enlarged small image."""

    answer: Tensor | None
    config: UpsamplerConfig = SMALL
    training: bool = False
    unet: Any = field(default_factory=lambda: type("UNet", (), {"multiple": 1}))

    def __call__(self, x_t: Tensor, t: Tensor, low: Tensor) -> Tensor:
        x0 = resize(low, (x_t.shape[2], x_t.shape[3])) if self.answer is None else self.answer
        level = make_schedule(self.config.schedule, self.config.steps).at(t).float().view(-1, 1, 1, 1)
        eps = (x_t - level.sqrt() * x0) / (1 - level).sqrt()
        return level.sqrt() * eps - (1 - level).sqrt() * x0


def test_images_are_upsampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, original = Upsampler(SMALL).eval(), normal(5, 3, SMALL.crop_size, SMALL.crop_size).clamp(-1, 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    whole: list[Any] = []
    parts: list[Any] = []
    for at_once, made in ((5, whole), (2, parts)):
        monkeypatch.setattr(upsamplers, "BATCH", at_once)
        with torch.no_grad():
            made += upsamplers.upsample("upsampler_256", model, original, FIVE, 3, 0, lambda _: None)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_an_upsampler_must_beat_bicubic_interpolation() -> None:
    image = (normal(4, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    original = from_uint8(upsamplers.busiest_crop(image, SMALL.crop_size))
    blurred = cast(Upsampler, Knows(None))
    for answer, holds in ((None, False), (original, True), (original.flip(0), False)):
        model = blurred if answer is None else cast(Upsampler, Knows(answer))
        by = subject(PSNR, "upsampler_256", 3, upsampler_256=model, sampling=FIVE)
        (found,) = PSNR.measure(by, rows(4, image=image))
        assert found.holds is holds


def test_an_upsampler_that_ignores_the_small_image_fails() -> None:
    image = (normal(6, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    for answer, holds in ((torch.zeros(1, 3, 16, 16), False), (None, True)):
        by = subject(CONDITION, "upsampler_256", upsampler_256=Knows(answer))
        (found,) = CONDITION.measure(by, rows(6, image=image))
        assert found.holds is holds
        assert found.values is None  # losses of two bundles may be of different things


def test_the_busiest_crop_has_the_detail() -> None:
    image = torch.zeros(2, 3, 40, 40)
    image[0, :, 16:32, 0:16] = normal(3, 16, 16)
    image[1, :, 0:16, 16:32] = normal(3, 16, 16, seed=1)
    crops = upsamplers.busiest_crop(image, 16)
    assert torch.equal(crops[0], image[0, :, 16:32, 0:16])
    assert torch.equal(crops[1], image[1, :, 0:16, 16:32])


def test_psnr_of_known_errors() -> None:
    reference = torch.zeros(3, 3, 4, 4)
    image = torch.stack([reference[0], reference[0] + 0.2, reference[0] + 2])
    assert psnr(image, reference).tolist() == pytest.approx([100.0, 20.0, 0.0], abs=1e-5)


# --- the judge --------------------------------------------------------------------------------------------------------


class Judge:
    """A CLIP whose embedding of an image is its colour, and of a caption the colour with its number."""

    image_size = 8
    mean = torch.zeros(1)

    def encode_image(self, views: Tensor) -> Tensor:
        return F.normalize(views.float().mean((2, 3)) - 128, dim=1)

    def tokenize(self, captions: list[str]) -> Tensor:
        return torch.tensor([int(caption.removeprefix("caption ")) for caption in captions])

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(COLOURS[tokens].float() - 128, dim=1)


COLOURS = (normal(30, 3, seed=4) * 60 + 128).clamp(0, 255).to(torch.uint8)


def test_a_judge_finds_captions_of_what_was_drawn_and_not_of_what_ignores_them() -> None:
    drawn = {"ar_prior": COLOURS, "diffusion_prior": COLOURS.roll(15, 0), "decoder": COLOURS[:1].expand(30, 3)}
    squares = {model: colours[:, None, None].expand(30, 8, 8, 3) for model, colours in drawn.items()}
    judge = cast(Clip, Judge())
    found = [
        figure
        for model, of_model in squares.items()
        for figure in JUDGED.measure(subject(JUDGED, model), judge, of_model, rows(30))
    ]
    assert len({figure.claim for figure in found}) == 1
    assert {figure.model: figure.holds for figure in found} == {
        "ar_prior": True, "diffusion_prior": False, "decoder": False,
    }  # fmt: skip
    assert found[0].value == 1.0
    assert found[0].baseline == pytest.approx(0.1)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_in_plain_text() -> None:
    known = {"rows": 9, "split": "test"}
    figures = [
        Figure("draws", "It draws.", "decoder", "top", "top", 0.82, 0.125, (0.5, 0.9), True, trained=0.9, **known),
        Figure("draws", "It draws.", "decoder", "pot", "pot", 0.4, 0.2, (0.1, 0.3), False, **known),
        Figure(
            "listens", "It listens.", "ar_prior", "x", "caption", 1.5, 1.25, (0.2, math.nan), True, note="n", **known
        ),
        Figure("listens", "It listens.", "decoder", "condition", "decoder", note="few rows"),
        Figure("enlarges", "It enlarges.", "upsampler_256", "psnr", "PSNR", note="2 rows"),
    ]
    found = [each.as_json() for each in figures]
    assert figure.as_text(found).splitlines() == [
        "Does it learn? 1 of 2 claims hold on held-out rows, 1 not measured",
        "  NO  It draws.: pot 0.4 (0.2)",
        "  yes It listens.",
        "  -   It enlarges.: 2 rows",
    ]
    assert found[2]["interval"] == [0.2, None]
    assert figure.difference(0.5, 0.4, (0.05, 0.2)) == "+0.1 (0.05 to 0.2)"


def test_a_table_of_nothing_is_one_line_with_each_reason_once() -> None:
    none = [
        replace(Figure("c", "l", "decoder", "x", "x"), note=why).as_json() for why in ("1 pair", "1 pair", "no image")
    ]
    assert figure.as_text(none) == "Does it learn? Nothing was measured: 1 pair; no image"
