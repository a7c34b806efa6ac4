"""SSIM, retrieval, precision and recall, captions and memorisation, against plain loops and known cases."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from models.clip import Clip
from pipeline.data.source.emoji import listing as emoji
from pipeline.errors import UserError
from pipeline.evaluate import memorisation, metrics, quality
from pipeline.evaluate.captions import EMOJI, Phrases
from pipeline.evaluate.metrics import derangement
from pipeline.evaluate.quality import Choice, Eye, choices, covered, load_judge, right
from pipeline.evaluate.retrieval import median_interval, prior_figures, ranks, told_apart, weighted_median
from pipeline.evaluate.rows import HeldOut, TrainingRows
from pipeline.evaluate.upsamplers import ssim

BACKS = ["", *(f" on a {name} background" for name in emoji.BACKGROUNDS if name != "white")]
STYLES = EMOJI.styles


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held_out(captions: list[str], **batch: Tensor) -> HeldOut:
    keys = [str(i) for i in range(len(captions))]
    return HeldOut("test", keys, keys, captions, [None] * len(captions), batch, derangement(captions))


# --- SSIM -------------------------------------------------------------------------------------------------------------


def test_ssim_is_the_formula_with_scipys_filter() -> None:
    x = (normal(2, 3, 24, 30, seed=1) / 3).clamp(-1, 1)
    y = (x + 0.2 * normal(2, 3, 24, 30, seed=2)).clamp(-1, 1)

    def blurred(z: np.ndarray) -> np.ndarray:
        return gaussian_filter(z, sigma=1.5, truncate=3.5)[5:-5, 5:-5]  # 11 px, and only within the image

    expected = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        channels = []
        for p, q in zip(a, b, strict=True):
            mp, mq = blurred(p), blurred(q)
            vp, vq, c = blurred(p * p) - mp**2, blurred(q * q) - mq**2, blurred(p * q) - mp * mq
            c1, c2 = 0.02**2, 0.06**2
            channels.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        expected.append(np.mean(channels))
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(x, y).tolist() == pytest.approx(ssim(y, x).tolist())
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    assert ssim(x, x.flip(3)).max() < 0.1  # other noise of the same kind
    with pytest.raises(ValueError, match=r"\(10, 30\) px is smaller than SSIM's window of 11 px"):
        ssim(x[:, :, :10], y[:, :, :10])


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_ranks_count_what_is_nearer_and_share_ties() -> None:
    queries, gallery, own = normal(5, 8, seed=1), normal(12, 8, seed=2), torch.tensor([3, 0, 11, 5, 5])
    cosine = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    expected = [1 + sum(bool(s > row[j]) for s in row) for row, j in zip(cosine, own.tolist(), strict=True)]
    assert ranks(queries, gallery, own).tolist() == expected
    assert ranks(gallery[:4] * 3, gallery, torch.arange(4)).tolist() == [1, 1, 1, 1]
    equal = gallery[:1].expand(9, 8)
    assert ranks(queries, equal, own % 9).tolist() == [5] * 5  # a constant knows nothing: the middle


def test_weighted_medians_are_medians_of_the_rows_repeated() -> None:
    x = normal(9, seed=3)
    weights = torch.tensor([[1] * 9, [0, 3, 0, 2, 0, 0, 1, 1, 2], [9, *[0] * 8]]).double()
    expected = [float(x.repeat_interleave(w.long()).median()) for w in weights]
    assert weighted_median(x, weights).tolist() == expected
    low, high = median_interval(x + 5, x, torch.arange(len(x)), seed=0)
    assert low < 5 < high or low == high == 5


def test_r_precision_among_the_next_captions() -> None:
    texts, own = normal(7, 6, seed=4), torch.tensor([6, 2, 0])
    images = texts[own] + 0.6 * normal(3, 6, seed=5)
    cosine = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    for among in (2, 4, 7, 100):
        expected = []
        for row, j in zip(cosine, own.tolist(), strict=True):
            others = [(j + k) % 7 for k in range(1, min(among, 7))]
            expected.append(all(row[j] > row[k] for k in others))
        assert told_apart(images, texts, own, among).tolist() == expected
        repeated = texts.expand(3, -1, -1)  # captions of each row's own
        assert told_apart(images, repeated, own, among).tolist() == expected
    assert told_apart(torch.ones(3, 6), texts[:1].expand(7, 6), own).tolist() == [False] * 3  # a tie is a miss


def test_the_baselines_of_a_prior_are_what_they_say() -> None:
    n = 40
    text = F.normalize(normal(n, 16, seed=1), dim=1)
    image = F.normalize(text.roll(1, 1) + 0.05 * normal(n, 16, seed=2), dim=1)
    rows = held_out([f"caption {i}" for i in range(n)], image_embedding=image, text_embedding=text)
    training = TrainingRows(
        [], [], [], image_embedding=image.flip(0), text_embedding=text.flip(0)
    )  # here the same captions
    samples = F.normalize(image + 0.1 * normal(4, n, 16, seed=3), dim=-1)
    gallery = torch.cat([image, F.normalize(normal(30, 16, seed=4), dim=1)])
    found = {f.name: f for f in prior_figures("prior", samples, rows, gallery, training, 0)}
    assert {f.holds for f in found.values()} == {None}
    assert found["recall_1_of_mean_nearest"].baseline == 1.0  # the very image
    assert found["cosine_of_mean_nearest"].baseline == pytest.approx(1)
    assert found["frechet_nearest"].baseline == pytest.approx(0, abs=1e-9)
    assert found["recall_1_of_mean_text"].value == 1.0
    assert found["rank_of_mean_text"].value == 1.0
    for name in ("text", "shuffled"):
        baseline = found[f"rank_of_mean_{name}"].baseline
        assert baseline is not None
        assert baseline > 10  # of 70: little better than chance


# --- precision and recall ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 1024])
def test_coverage_is_the_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BLOCK", block)
    points, of = normal(15, 3, seed=6), normal(12, 3, seed=7)

    def distance(a: Tensor, b: Tensor) -> float:
        return math.dist(a.tolist(), b.tolist())

    reach = [sorted(distance(x, y) for j, y in enumerate(of) if j != i)[2] for i, x in enumerate(of)]
    expected = [any(distance(p, x) <= r for x, r in zip(of, reach, strict=True)) for p in points]
    assert covered(points, of).tolist() == expected
    assert 0 < sum(expected) < 15
    assert covered(of[:2], of[:2]).tolist() == [True, True]  # fewer than four rows
    with pytest.raises(ValueError, match="1 rows have no neighbours"):
        covered(points, of[:1])


def test_a_model_of_one_image_is_precise_and_recalls_nothing() -> None:
    real = normal(50, 4, seed=8)
    constant = real[:1] + 1e-3 * normal(50, 4, seed=9)
    assert covered(constant, real).double().mean() > 0.9
    assert covered(real, constant).double().mean() < 0.1


# --- captions of the emoji images -----------------------------------------------------------------------------------


def test_a_caption_has_its_parts_and_is_put_together_again() -> None:
    for caption in (f"{style} a red heart{back}" for style in STYLES for back in BACKS):
        found = EMOJI.parts(caption)
        assert found is not None, caption
        assert found.name == "a red heart"
        assert found.called("a red heart") == caption
        assert Phrases().parts(caption) is None
    assert EMOJI.parts("a photo of a cat") is None
    assert EMOJI.parts("an openmoji drawing of on a pale green background") is None
    assert all(EMOJI.parts(row.captions[0]) for row in emoji.emoji_rows("full"))


class Words:
    """A CLIP that reads a bag of words."""

    mean = torch.zeros(1)

    def tokenize(self, captions: list[str]) -> Tensor:
        bags = torch.zeros(len(captions), 64)
        for bag, caption in zip(bags, captions, strict=True):
            for word in caption.split():
                bag[sum(map(ord, word)) % 64] += 1
        return bags

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens, dim=1)


def test_style_and_background_alone_flatter_whole_captions_only() -> None:
    names = ["a cat", "a dog face", "an apple", "a red heart", "a rocket", "the moon"]
    captions = [f"{STYLES[i % 2]} {names[i % 6]}{BACKS[i]}" for i in range(8)]
    words: Any = Words()
    eye = Eye("CLIP", words)
    found = {c.name: c for c in choices(eye, captions, ["an openmoji drawing of a hat", "something else"], EMOJI)}
    assert list(found) == ["r_precision", "name_alone", "within_style"]
    assert found["r_precision"].says == "R-precision among 10 captions"
    assert found["within_style"].says.startswith("R-precision among 7 names")
    empty = [caption.replace(names[i % 6], "").replace("  ", " ") for i, caption in enumerate(captions)]
    knows_all, knows_style = eye.read(captions), eye.read(empty)
    name_only = eye.read([names[i % 6] for i in range(8)])
    share = {
        (kind, name): float(right(choice, seen)[0].double().mean())
        for name, choice in found.items()
        for kind, seen in (("all", knows_all), ("style", knows_style), ("name", name_only))
    }
    assert share["all", "r_precision"] == share["all", "within_style"] == share["name", "name_alone"] == 1
    assert share["style", "r_precision"] > 3 * share["style", "name_alone"]
    assert share["style", "within_style"] < 0.5 < share["name", "within_style"]
    assert right(found["within_style"], knows_all[:3])[0].tolist() == [True] * 3  # fewer images than captions


def test_other_captions_have_no_style_and_one_caption_no_choice() -> None:
    words: Any = Words()
    eye = Eye("CLIP", words)
    assert [c.name for c in choices(eye, ["a cat", "a dog"], [], EMOJI)] == ["r_precision"]
    assert choices(eye, ["a cat", "a cat"], [], EMOJI) == []
    named = [f"{STYLES[0]} a cat", f"{STYLES[0]} a dog"]
    assert [c.name for c in choices(eye, named, [], Phrases())] == ["r_precision"]  # somebody's own captions
    many = choices(eye, ["a cat"], [f"number {i}" for i in range(300)], EMOJI)[0]
    assert len(many.texts) == 100
    assert isinstance(many, Choice)


def test_the_judge_is_a_clip_in_a_folder_or_a_mistake(tmp_path: Any) -> None:
    from models.prior_configs import ClipConfig

    Clip.build(ClipConfig(embed_dim=8, image_size=32, layers=(1,), width=32, patch=16, text_width=16, text_layers=1,
                          text_heads=1), 3).save(tmp_path / "judge")  # fmt: skip
    device = torch.device("cpu")
    loaded = load_judge(f"local-dir:{tmp_path}/judge", device)
    assert loaded is not None
    assert loaded.embed_dim == 8
    assert load_judge(None, device) is None
    with pytest.raises(UserError, match=r"evaluation\.judge: .*nowhere has no open_clip_config\.json"):
        load_judge("local-dir:nowhere", device)
    with pytest.raises(UserError, match=r"evaluation\.judge: open_clip has no model 'None'"):
        load_judge("open_clip:None:such", device)


# --- memorisation -----------------------------------------------------------------------------------------------------


def test_copies_lie_nearer_to_training_than_held_out_images_do() -> None:
    training, real, fresh = (F.normalize(normal(n, 12, seed=n), dim=1) for n in (300, 60, 61))
    fresh = fresh[:60]
    copied = F.normalize(training[:60] + 0.05 * normal(60, 12, seed=1), dim=1)
    rows = held_out([f"caption {i}" for i in range(60)])
    drawn = {"made": fresh, "copied": copied}
    found = {(f.model, f.name): f for f in memorisation.memorisation_figures(drawn, real, training, rows, 0)}
    assert {f.holds for f in found.values()} == {None}
    assert found["copied", "share_nearer"].value == pytest.approx(1, abs=0.01)
    assert found["copied", "nearest_training"].interval[1] < 0  # type: ignore[index]
    made = found["made", "share_nearer"]
    assert made.interval is not None
    assert made.interval[0] < 0 < made.interval[1]


def test_the_nearest_and_the_closest() -> None:
    training = torch.eye(4)
    images = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 2], [0, 3, 0.1, 0], [0, 0, 5, 0]])
    found = memorisation.nearest(images, training)
    assert found.place[1:].tolist() == [3, 1, 2]
    assert found.distance.tolist() == pytest.approx([1 - math.sqrt(0.5), 0, 1 - 3 / math.hypot(3, 0.1), 0], abs=1e-9)
    assert memorisation.closest(found.distance, 3) == [1, 3, 2]
    assert memorisation.closest(found.distance, 9) == [1, 3, 2, 0]


@pytest.mark.parametrize("block", [2, 1024])
def test_the_share_nearer_counts_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorisation, "BLOCK", block)
    drawn, real = torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.2, 0.4, 0.5])
    expected = sum(0.5 if a == b else float(a < b) for a in drawn for b in real) / 9
    share, interval = memorisation.share_nearer(drawn, real, torch.arange(3), 0)
    assert share == pytest.approx(expected)
    assert interval.low <= share <= interval.high
    weights = metrics.resample(torch.arange(3), 0)
    below = (drawn[:, None] < real).double() + (drawn[:, None] == real).double() / 2
    assert interval == pytest.approx(metrics.percentiles(((weights @ below) * weights).sum(1) / 9))


def test_the_clip_score_has_torchmetrics_scale() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    y = torch.tensor([[1.0, 0], [1, 1], [1, 0]])
    assert quality.clip_score(x, y).tolist() == pytest.approx([100, 100 * math.sqrt(0.5), 0])
