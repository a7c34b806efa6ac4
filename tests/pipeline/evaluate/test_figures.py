"""Each figure on made-up models, where the answer is known."""

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ar_prior import ARPrior
from models.clip import Clip
from models.codec_fit import fit_codec
from models.diffusion.schedules import make_schedule
from models.image_configs import UpsamplerConfig
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler
from pipeline.data.source.emoji.listing import BACKGROUNDS
from pipeline.evaluate import figure, images, priors, upsamplers
from pipeline.evaluate.captions import EMOJI, Phrases
from pipeline.evaluate.evaluation import absent
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.gap import Rise, gap_figure, rise
from pipeline.evaluate.metrics import bucket_counts, derangement
from pipeline.evaluate.paired import paired
from pipeline.evaluate.rows import HeldOut, TrainingRows
from pipeline.evaluate.whitening import Whitening, fit_whitening
from tests.models.mutations import fails_under


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def held_out(captions: list[str], **batch: Tensor) -> HeldOut:
    keys = [str(i) for i in range(len(captions))]
    return HeldOut("test", keys, keys, captions, [None] * len(captions), batch, derangement(captions))


def rows(n: int, **batch: Tensor) -> HeldOut:
    return held_out([f"caption {i}" for i in range(n)], **batch)


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {f.name: f for f in figures}


# --- (a) --------------------------------------------------------------------------------------------------------------


def test_a_model_that_ignores_its_condition_has_no_gap() -> None:
    x = normal(70, 3)

    def loss(batch: dict[str, Tensor], draw: Any) -> Tensor:
        return (batch["x"] + draw.normal("noise", 3)).square().sum(1)

    found = rise(loss, {"x": x, "c": x}, ("c",), derangement(range(70)), seed=0, draws=3)
    assert torch.equal(found.own, found.other)
    assert gap_figure("m", "c", rows(70), found).holds is False


def test_a_model_that_uses_its_condition_has_the_gap_that_it_must_have() -> None:
    x = normal(70, 3)
    other = derangement(range(70))

    def loss(batch: dict[str, Tensor], draw: Any) -> Tensor:  # noise common to both sides falls out of the difference
        return (batch["x"] - batch["c"]).square().sum(1) + draw.normal("noise")

    found = rise(loss, {"x": x, "c": x}, ("c",), other, seed=0, draws=2)
    expected = (x - x[other]).square().sum(1)
    assert torch.allclose((found.other - found.own).float(), expected, atol=1e-4)
    figure = gap_figure("m", "c", rows(70), found)
    assert figure.holds
    assert figure.difference == pytest.approx(float(expected.mean()), abs=1e-4)
    assert figure.error == pytest.approx(float(expected.std()) / math.sqrt(70), abs=1e-4)
    noisy = Rise(torch.zeros(4), torch.tensor([1.0, -1.0, 3.0, 2.0]))  # a positive mean alone is not enough
    assert gap_figure("m", "c", rows(4), noisy).holds is False


@fails_under((paired, "rows.groups[i]", "i"))
def test_claims_hold_by_chance_one_time_in_forty_however_many_rows_a_group_has() -> None:
    """Values of rows without an effect, alike within groups of four: one by one they would hold 16 times in 100."""
    names = [f"{i // 4}" for i in range(120)]
    many = replace(rows(120), groups=names)
    held = 0
    for seed in range(300):
        values = normal(30, seed=seed).repeat_interleave(4) + 0.2 * normal(120, seed=1000 + seed)
        held += paired("c", "m", "n", "says", values, torch.zeros(120), many, seed, "above").holds is True
    assert 0.005 < held / 300 < 0.06


def test_a_condition_gap_counts_groups() -> None:
    own = normal(30, seed=0).double()
    once = gap_figure("m", "c", rows(30), Rise(torch.zeros(30), own))
    many = replace(rows(120), groups=[f"{i % 30}" for i in range(120)])
    assert gap_figure("m", "c", many, Rise(torch.zeros(120), own.repeat(4))).error == pytest.approx(once.error)


def test_conditions_may_depend_on_the_draw() -> None:
    def prepare(batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        return batch | {"c": batch["x"] + draw.normal("c")}

    x = torch.arange(40.0)
    found = rise(lambda b, _: b["c"] - b["x"], {"x": x}, ("c",), derangement(range(40)), seed=0, prepare=prepare)
    noise = found.own
    assert torch.allclose(found.other, noise.roll(-20) + (x.roll(-20) - x), atol=1e-5)


# --- (b) --------------------------------------------------------------------------------------------------------------


@dataclass
class Frequencies:
    """An AR prior that knows the frequencies of codes and, by ``knows`` more, the code the caption stands for."""

    logits: Tensor
    knows: float
    config: Any = None

    def __call__(self, tokens: Tensor, text: Tensor, dot: Tensor, codes: Tensor, keep: Tensor) -> Tensor:
        return self.logits + self.knows * F.one_hot(tokens[:, : codes.shape[1]], self.logits.shape[1])


@pytest.mark.parametrize("knows", [0.0, 4.0])
def test_an_ar_prior_must_beat_the_frequencies_of_codes(knows: float) -> None:
    training, image = (F.normalize(normal(n, 8, seed=n), dim=1) for n in (300, 50))
    codec = fit_codec(training, training[:, 0], 5, 16).codec
    codes = codec.encode(image)
    model = Frequencies(bucket_counts(codec.encode(training), 16).log().float(), knows)
    chosen = rows(50, tokens=codes, image_embedding=image, text_embedding=image.flip(0))
    figures = priors.ar_prior_figures(cast(ARPrior, model), codec, chosen, training, seed=0)
    assert [f.line for f in figures] == ["a", "b", "b"]
    assert [f.holds for f in figures] == [knows > 0] * 3
    if knows == 0:
        assert figures[0].difference == 0
        assert figures[1].value == pytest.approx(figures[1].baseline, abs=1e-5)
    assert figures[1].baseline == pytest.approx(math.log(16), rel=0.02)  # quantile buckets are equally full


# --- (c) --------------------------------------------------------------------------------------------------------------


def world(n: int = 200) -> tuple[HeldOut, Tensor]:
    """Captions whose image embedding is another direction with noise: rows, and the mean that belongs to each."""
    text = F.normalize(normal(n, 16, seed=1), dim=1)
    mean = F.normalize(text.roll(1, 1) + 0.3, dim=1)
    image = F.normalize(mean + 0.1 * normal(n, 16, seed=2), dim=1)
    return rows(n, image_embedding=image, text_embedding=text), mean


def white(rows: HeldOut) -> Whitening:
    """Whitening by these very rows, whose captions have no parts."""
    image, text = rows.batch["image_embedding"], rows.batch["text_embedding"]
    return fit_whitening(TrainingRows([], rows.captions, [], image, text), Phrases())


def test_a_perfect_sampler_holds() -> None:
    chosen, mean = world()
    samples = F.normalize(mean + 0.1 * normal(16, 200, 16, seed=3), dim=-1)
    found = by_name(priors.sample_figures("prior", samples, chosen, white(chosen), seed=0))
    assert {name: f.holds for name, f in found.items()} == {
        "cosine_of_mean": True, "variance_ratio": True, "mmd": True, "cosine_of_one": None, "cosine_of_best": None,
        "cosine_of_mean_whitened": True, "variance_ratio_whitened": True, "mmd_whitened": True,
    }  # fmt: skip
    assert found["variance_ratio"].value == pytest.approx(1, abs=0.1)
    assert found["mmd"].value == pytest.approx(0, abs=0.01)
    one, mean_of_all = found["cosine_of_one"].value, found["cosine_of_mean"].value
    assert one is not None
    assert mean_of_all is not None
    assert one < mean_of_all  # why one sample proves nothing


def test_a_constant_sampler_and_one_that_copies_the_caption_fail() -> None:
    chosen, mean = world()
    constant = F.normalize(mean.mean(0), dim=0).expand(16, 200, 16)
    found = by_name(priors.sample_figures("prior", constant, chosen, white(chosen), seed=0))
    assert found["variance_ratio"].value == pytest.approx(0, abs=1e-6)
    assert found["variance_ratio"].holds is False
    copied = chosen.batch["text_embedding"].expand(16, -1, -1)
    found = by_name(priors.sample_figures("prior", copied, chosen, white(chosen), seed=0))
    assert found["cosine_of_mean"].holds is False
    assert found["mmd"].holds is False
    assert found["mmd"].difference == pytest.approx(0, abs=1e-9)


def test_two_rows_are_no_crash() -> None:
    chosen, mean = world(2)
    found = by_name(priors.sample_figures("prior", mean.expand(3, -1, -1), chosen, white(chosen), seed=0))
    assert found["mmd"].holds is False  # without an error nothing is proved
    assert json.loads(json.dumps(found["mmd"].as_json(), allow_nan=False))["error"] is None


# --- (d) --------------------------------------------------------------------------------------------------------------


def emoji(names: list[str]) -> Tensor:
    """Images uint8 [n, 64, 64, 3] on these backgrounds, with a black thing in the middle and a little noise."""
    pictures = torch.stack([torch.tensor(BACKGROUNDS[name]).expand(64, 64, 3) for name in names]).float()
    pictures[:, 8:56, 8:56] = 0
    return (pictures + 4 * normal(len(names), 64, 64, 3)).clamp(0, 255).to(torch.uint8)


def test_backgrounds_are_read_from_corners_and_captions() -> None:
    assert images.backgrounds(emoji(list(BACKGROUNDS)), EMOJI.backgrounds) == list(EMOJI.backgrounds)
    assert EMOJI.background("an openmoji drawing of a cat on a pale green background") == "on a pale green background"
    assert EMOJI.background("an openmoji drawing of a cat on a pale tartan background") == ""
    assert EMOJI.background("a pale green cat") == ""
    # A photo's caption may end so, and none of the claims of the emoji set is made of it.
    assert EMOJI.background("a mug on a pale green background") == ""
    assert Phrases().background("an openmoji drawing of a cat on a pale green background") == ""


def test_training_images_to_compare_with_name_backgrounds_as_often() -> None:
    named = "an openmoji drawing of a cat on a pale green background"
    others = ["a dog", named, "a hat", named, "a bee", "a cup", named, "a fox"]
    assert EMOJI.alike([named, named, "a cow"], others) == [1, 3, 0]
    assert EMOJI.alike(["a cow"] * 5, others) == [0, 2, 4, 5, 7]
    assert EMOJI.alike([named], ["a dog", "a hat"]) == [0]
    assert Phrases().alike([named, named, "a cow"], others) == [0, 2, 5]  # without phrases all are of one kind


def test_a_right_background_holds_and_a_constant_one_does_not() -> None:
    pale = [name for name in BACKGROUNDS if name != "white"] * 2
    cat = "an openmoji drawing of a cat"
    chosen = held_out([f"{cat} on a {name} background" for name in pale] + [cat] * 4)
    right = images.background_figure("decoder", "here", emoji([*pale, *["white"] * 4]), chosen, EMOJI, 0)
    assert (right.value, right.baseline, right.holds, right.rows) == (1.0, pytest.approx(1 / 15), True, 16)
    constant = images.background_figure("decoder", "here", emoji(["pale pink"] * 20), chosen, EMOJI, 0)
    assert constant.value == constant.baseline == pytest.approx(1 / 8)
    assert constant.holds is False
    few = images.background_figure("decoder", "here", emoji(["white"] * 20), chosen.first(7), EMOJI, 0)
    assert (few.holds, few.value, few.note) == (None, None, "7 captions of 7 test rows name a background; it takes 8")
    same = held_out([f"{cat} on a pale pink background"] * 8)
    one = images.background_figure("decoder", "here", emoji(["white"] * 8), same, EMOJI, 0)
    assert (one.holds, one.note) == (None, "all captions of test rows that name a background name the same one")


def test_a_configuration_may_say_what_captions_of_its_own_name() -> None:
    """Without styles every caption counts, and the longest ending is the one that it names."""
    phrases = Phrases(backgrounds={"on red": (255, 0, 0), "on dark red": (90, 0, 0), "": (0, 0, 255)})
    colours = {"a mug on red": (240, 9, 9), "a mug on dark red": (100, 5, 0), "a mug": (9, 0, 250)}
    captions = list(colours) * 4
    pictures = torch.stack([torch.tensor(colours[caption]).expand(64, 64, 3) for caption in captions]).to(torch.uint8)
    found = images.background_figure("decoder", "here", pictures, held_out(captions), phrases, 0)
    assert (found.value, found.holds, found.rows) == (1.0, True, 8)
    blue = images.backgrounds(pictures, phrases.backgrounds)
    assert blue == ["on red", "on dark red", ""] * 4


# --- (e) --------------------------------------------------------------------------------------------------------------

SMALL = UpsamplerConfig(
    low_size=16, image_size=64, channels=8, depth=1, multipliers=(1,), patch=4, prediction="v", steps=50, dropout=0.0
)


@dataclass
class Knows:
    """An upsampler that is sure of the clean image: ``answer``, or for None the enlarged small image."""

    answer: Tensor | None
    config: UpsamplerConfig = SMALL
    training: bool = False
    unet: Any = field(default_factory=lambda: type("UNet", (), {"multiple": 1}))

    def __call__(self, x_t: Tensor, t: Tensor, low: Tensor) -> Tensor:
        from models.pixels import resize

        x0 = resize(low, (x_t.shape[2], x_t.shape[3])) if self.answer is None else self.answer
        level = make_schedule(self.config.schedule, self.config.steps).at(t).float().view(-1, 1, 1, 1)
        eps = (x_t - level.sqrt() * x0) / (1 - level).sqrt()
        return level.sqrt() * eps - (1 - level).sqrt() * x0


FIVE = SamplingConfig(upsampler_256_steps=5)


def test_images_are_upsampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, original = Upsampler(SMALL).eval(), normal(5, 3, SMALL.crop_size, SMALL.crop_size).clamp(-1, 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    whole, parts = [], []
    for at_once, made in ((5, whole), (2, parts)):
        monkeypatch.setattr(upsamplers, "IMAGES", at_once)
        with torch.no_grad():
            made += upsamplers.upsample("upsampler_256", model, original, FIVE, 3, 0, lambda _: None, True)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_an_upsampler_must_beat_bicubic_interpolation() -> None:
    image = (normal(4, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    chosen = rows(4, image=image)
    original = upsamplers.from_uint8(upsamplers.busiest_crop(image, SMALL.crop_size))
    figures = {}
    for name, answer in (("bicubic", None), ("oracle", original)):
        model = cast(Upsampler, Knows(answer))
        figures[name] = upsamplers.upsampler_figures("upsampler_256", model, chosen, FIVE, 3, 0, lambda _: None)
    mean, _, ssim_of_mean, _, consistency, undamaged, against_bicubic = figures["bicubic"]
    assert mean.difference == pytest.approx(0, abs=1e-3)
    assert mean.holds is False or mean.difference > 0  # equal but for rounding
    assert {f.holds for f in figures["bicubic"][1:]} == {None}
    assert ssim_of_mean.difference == pytest.approx(0, abs=1e-4)
    assert consistency.difference == pytest.approx(0, abs=1e-3)
    assert undamaged.name == "undamaged_psnr"
    assert undamaged.difference is not None
    assert undamaged.difference > 0  # bicubic of what was not blurred is nearer
    assert against_bicubic.difference == pytest.approx(0, abs=1e-3)
    assert figures["oracle"][0].holds
    assert figures["oracle"][0].value is not None
    assert figures["oracle"][0].value > 60


def test_an_upsampler_that_ignores_the_small_image_has_no_gap() -> None:
    image = (normal(6, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    chosen = rows(6, image=image)
    deaf = upsamplers.upsampler_gap("u", cast(Upsampler, Knows(torch.zeros(1, 3, 16, 16))), chosen, 0)
    assert (deaf.difference, deaf.holds) == (0.0, False)
    hears = upsamplers.upsampler_gap("u", cast(Upsampler, Knows(None)), chosen, 0)
    assert hears.difference is not None
    assert hears.difference > 0.2


def test_the_busiest_crop_has_the_detail() -> None:
    image = torch.zeros(2, 3, 40, 40)
    image[0, :, 16:32, 0:16] = normal(3, 16, 16)
    image[1, :, 0:16, 16:32] = normal(3, 16, 16, seed=1)
    crops = upsamplers.busiest_crop(image, 16)
    assert torch.equal(crops[0], image[0, :, 16:32, 0:16])
    assert torch.equal(crops[1], image[1, :, 0:16, 16:32])


# --- (f) --------------------------------------------------------------------------------------------------------------


class Eye:
    """A CLIP whose image embedding is the image, made small."""

    image_size = 8
    mean = torch.zeros(1)

    def encode_image(self, views: Tensor) -> Tensor:
        return F.normalize(views.float().flatten(1) - 127, dim=1)


def test_clip_ranks_by_nearness() -> None:
    real = (normal(24, 3, 8, 8) * 40 + 128).clamp(0, 255)
    real = F.interpolate(real, 64).to(torch.uint8)
    noise = F.interpolate(normal(24, 3, 8, 8, seed=1) * 40, 64)
    drawn, early = ((real + k * noise).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1) for k in (0.3, 1.0))
    clip = cast(Clip, Eye())
    chosen = rows(24, image=real, text_embedding=images.embed(clip, real.permute(0, 2, 3, 1)))
    figures = images.ranking_figures(clip, chosen, drawn, early, 0)
    assert len(figures) == 6
    assert all(f.holds for f in figures)
    turned = images.ranking_figures(clip, chosen, early, drawn, 0)  # the early one is better
    assert {f.name for f in turned if not f.holds} == {"caption_trained_early", "image_trained_early"}
    lonely = images.ranking_figures(clip, chosen, drawn, "not there", 0)
    assert [f.holds for f in lonely] == [True, True, None] * 2
    assert {f.note for f in lonely} == {"", "not there"}


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_in_plain_text() -> None:
    figures = [
        Figure(
            "a", "decoder", "gap", "decoder: it listens", 1.25, 1.0, 0.25, error=0.01, holds=True, rows=9, split="test"
        ),
        Figure("b", "ar_prior", "nats", "ar_prior: nats", 5.0, 4.5, 0.5, interval=(0.4, math.nan), holds=False, rows=9),
        Figure("c", "prior", "plain", "for information", 0.5, 0.4, 0.1),
        Figure("d", "decoder", "background", "decoder: colours", note="no colours"),
    ]
    text = figure.as_text([f.as_json() for f in figures])
    lines = text.splitlines()
    assert lines[0] == "Does it learn? 1 of 2 hold, 1 not measured"
    assert "  yes decoder: it listens: 1.25 against 1, +0.25 ± 0.01, 9 test rows" in lines
    assert any(line.startswith("  NO  ar_prior: nats: 5 against 4.5, +0.5 (0.4 to ?)") for line in lines)
    assert "  -   decoder: colours: not measured: no colours" in lines
    assert "for information" not in text


def test_a_table_of_nothing_is_one_line_with_each_reason_once() -> None:
    figures = [f.as_json() for f in (*absent("ab", "ar_prior", "1 test pair"), *absent("f", "decoder", "1 test pair"))]
    assert figure.as_text(figures) == "Does it learn? Nothing was measured: 1 test pair"
    assert [f["line"] for f in figure.judged(figures)] == ["a", "b", "f"]
