"""Names told apart where style and background cannot help: exact chance, whitened coordinates, rows to draw."""

import math
from itertools import permutations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.source.emoji.listing import BACKGROUNDS, STYLES
from pipeline.evaluate import priors
from pipeline.evaluate.captions import EMOJI, Phrases
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.names import apart_figures, found_first, named_figures, told_within
from pipeline.evaluate.quality import Eye
from pipeline.evaluate.rows import HeldOut, TrainingRows
from pipeline.evaluate.whitening import SHARE, fit_whitening
from tests.pipeline.evaluate.test_figures import by_name, held_out

FRAMES = [
    (style, f"on a {name} background") for style in STYLES.values() for name in ("pale pink", "pale blue", "pale green")
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def caption(frame: tuple[str, str], name: str) -> str:
    return f"{frame[0]} {name} {frame[1]}"


def captions(n: int, first: int = 0) -> list[str]:
    """Captions of the frames in turn, each with a name of its own."""
    return [caption(FRAMES[i % len(FRAMES)], f"a thing of kind {first + i}") for i in range(n)]


# --- the statistic ----------------------------------------------------------------------------------------------------


def test_chance_is_that_of_all_permutations() -> None:
    groups = ["a", "b", "a", None, "b", "a", "a", "b", "alone"]
    scores = normal(9, 9)
    scores[0, 2] = scores[0, 5]  # a tie
    found = told_within(scores, groups)
    inside = [[0, 2, 5, 6], [1, 4, 7]]
    assert found.groups == 2

    def share(i: int, j: int, group: list[int]) -> float:
        """How many of the group score below row j by row i."""
        others = [float(scores[i, k]) for k in group if k != j]
        mine = float(scores[i, j])
        return sum(1.0 if other < mine else 0.5 if other == mine else 0.0 for other in others) / len(others)

    own = [share(i, i, group) for group in inside for i in group]
    assert found.share.tolist() == pytest.approx(own)
    means = [
        sum(share(i, p, g) for g, ps in zip(inside, assigned, strict=True) for i, p in zip(g, ps, strict=True)) / 7
        for assigned in product(*(permutations(group) for group in inside))
    ]
    mean = sum(means) / len(means)
    assert mean == pytest.approx(0.5)
    assert found.error == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in means) / len(means)))


def test_who_knows_nothing_is_right_as_often_as_chance() -> None:
    """Targets that attract all queries, and queries that like all targets, make no false certainty."""
    groups = [i % 4 for i in range(40)]
    hubs, easy = 3 * normal(1, 40, seed=1), 3 * normal(40, 1, seed=2)
    z = []
    for seed in range(400):
        found = told_within(normal(40, 40, seed=seed) + hubs + easy, groups)
        z.append((float(found.share.mean()) - 0.5) / found.error)
    assert torch.tensor(z).mean().abs() < 0.15
    assert 0.9 < torch.tensor(z).std() < 1.1
    assert sum(abs(value) > 3 for value in z) <= 4
    constant = told_within(hubs.expand(40, 40), groups)
    assert (float(constant.share.mean()), constant.error) == (pytest.approx(0.5), pytest.approx(0, abs=1e-12))


def measured(rows: HeldOut, scores: Tensor, claim: bool = True) -> list[Figure]:
    return apart_figures("g", "ar_prior", "names", "told apart", scores, EMOJI, rows, claim)


def test_a_model_of_palettes_fails_and_one_of_names_holds() -> None:
    rows = held_out(captions(48))
    frame = F.one_hot(torch.arange(48) % len(FRAMES)).float()
    palette = frame @ frame.T + 0.1 * normal(48, 48)
    [blind] = measured(rows, palette)
    [knows] = measured(rows, palette + 0.2 * torch.eye(48))
    assert (blind.holds, knows.holds) == (False, True)
    assert (blind.rows, knows.baseline, knows.claim) == (48, 0.5, "above")
    assert knows.values is not None
    assert sum(knows.values) / 48 == pytest.approx(knows.value, abs=1e-5)
    [plain] = measured(rows, palette + 0.2 * torch.eye(48), claim=False)
    assert (plain.holds, plain.values, plain.value) == (None, None, knows.value)


def test_of_too_few_rows_it_says_why() -> None:
    frames = [(STYLES["twemoji"], f"on a {name} background") for name in BACKGROUNDS if name != "white"]
    frames += [(STYLES["openmoji"], end) for _, end in frames]
    pairs = [caption(frame, name) for frame in frames for name in ("a cat", "a dog")]
    [few] = measured(held_out(pairs[:6]), torch.eye(6))
    assert (few.holds, few.note) == (None, "6 test rows of equal style and background, and it takes 8; add pairs")
    # Of k pairs the error is 0.5 / sqrt(k): nine that are all right are three errors above chance, and not more.
    [nine] = measured(held_out(pairs[:18]), torch.eye(18))
    assert nine.holds is None
    assert nine.note == "18 test rows in 9 styles and backgrounds are too few: chance gives 0.5 ± 0.50; add pairs"
    [ten] = measured(held_out(pairs[:20]), torch.eye(20))
    assert (ten.holds, ten.error) == (True, pytest.approx(0.5 / math.sqrt(10)))
    assert measured(held_out(pairs[:18]), torch.eye(18), claim=False) == []
    tones = held_out([one.replace("a cat", "a man with dark skin tone") for one in pairs[:20]])
    [variants] = measured(tones, torch.eye(20))
    assert variants.note == "0 test rows of equal style and background, and it takes 8; add pairs"


def test_the_right_real_image_is_among_the_first_ten() -> None:
    rows = held_out(captions(5))
    real = F.normalize(normal(40, 8), dim=1)
    drawn = F.normalize(real[:5] + 0.5 * normal(5, 8, seed=1), dim=1)
    order = (drawn @ real.T).argsort(1, descending=True)
    expected = [i in order[i, :10].tolist() for i in range(5)]
    [figure] = found_first(drawn, real, rows, "ar_prior", "CLIP", 0)
    assert figure.value == pytest.approx(sum(expected) / 5)
    assert sum(expected) > 0
    assert figure.name == "clip_found_test"
    assert (figure.baseline, figure.holds, figure.values) == (0.25, None, None)
    assert "among the first 10 of 40 test rows, by CLIP" in figure.says
    assert found_first(drawn, real[:10], rows, "ar_prior", "CLIP", 0) == []


def test_training_rows_are_no_claim_and_plain_captions_have_no_names() -> None:
    class Reader(Eye):
        def read(self, captions: Any) -> Tensor:
            return F.normalize(normal(len(captions), 8), dim=1)

    eye = Reader("judge", None)  # type: ignore[arg-type]
    rows, real = held_out(captions(24)), F.normalize(normal(30, 8, seed=1), dim=1)
    drawn = {"ar_prior": eye.read(rows.captions)}
    found = named_figures(eye, drawn, real, rows, EMOJI, 0, claim=True)
    assert [(f.name, f.holds) for f in found] == [("judge_names", True), ("judge_found_test", None)]
    found = named_figures(eye, drawn, real, rows, EMOJI, 0, claim=False)
    assert [(f.name, f.holds) for f in found] == [("judge_names_test", None), ("judge_found_test", None)]
    found = named_figures(eye, drawn, real, rows, Phrases(), 0, claim=True)
    assert [f.name for f in found] == ["judge_found_test"]


# --- which rows -------------------------------------------------------------------------------------------------------


def test_rows_are_drawn_that_differ_in_the_name_alone() -> None:
    twe, pale = STYLES["twemoji"], "on a pale pink background"
    listed = [
        f"{twe} a cat",
        f"{twe} a lonely dog {pale}",
        "a photo of a cat",
        f"{twe} a man with dark skin tone",
        f"{twe} a dog",
        f"{twe} a cat",
        f"{STYLES['openmoji']} a fox",
        f"{twe} a fox",
        f"{twe} a hen {pale}",
        f"{twe} a cow",
    ]
    assert EMOJI.in_frames(listed, 20) == [0, 1, 4, 7, 8, 9]
    assert EMOJI.in_frames(listed, 3) == [0, 4, 7]
    assert EMOJI.in_frames(listed, 4) == [
        0,
        4,
        7,
        9,
    ]  # two would come together before the last, and there is place for one
    for count in (2, 3, 5):
        chosen = EMOJI.in_frames(listed, count)
        assert EMOJI.in_frames([*listed, *captions(30)], count) == chosen  # an append changes nothing
    assert Phrases().in_frames(["a cat", "", "a dog", "a cat", "a hen"], 3) == [0, 2, 4]
    assert Phrases(variants=("dog",)).in_frames(["a cat", "a dog", "a hen"], 3) == [0, 2]


# --- whitened coordinates ---------------------------------------------------------------------------------------------

D = 24
PALETTES = 4 * normal(len(FRAMES), D, seed=11)  # most of the variance
NAMES = torch.linspace(1, 0.2, D)  # what things differ in


def world(n: int, seed: int) -> tuple[list[str], Tensor, Tensor]:
    """Captions, and embeddings of images and texts that know palette and name; texts lie elsewhere, and are noisy."""
    said = captions(n, 1000 * seed)
    palette, name = PALETTES[torch.arange(n) % len(FRAMES)], NAMES * normal(n, D, seed=seed)
    image = F.normalize(palette + name + 0.1 * normal(n, D, seed=seed + 1), dim=1)
    text = F.normalize(0.5 * palette + name + 1.2 * NAMES * normal(n, D, seed=seed + 2) + 2, dim=1)
    return said, image, text


def training() -> TrainingRows:
    said, image, text = world(1200, 20)
    return TrainingRows([], said, [None] * len(said), image, text)


def test_whitened_training_images_have_unit_covariance_about_their_palettes() -> None:
    known = training()
    fitted = fit_whitening(known, EMOJI)
    white = fitted.image(known.image_embedding, known.captions)
    n, k = white.shape
    assert 2 < k < D
    left = known.image_embedding.double().clone()
    for frame in range(len(FRAMES)):
        of_frame = torch.arange(n) % len(FRAMES) == frame
        assert white[of_frame].mean(0).abs().max() < 1e-9
        left[of_frame] -= left[of_frame].mean(0)
    assert torch.allclose(white.T @ white / (n - len(FRAMES)), torch.eye(k, dtype=torch.float64), atol=1e-8)
    spectrum = torch.linalg.svdvals(left).square()
    kept = float(spectrum[:k].sum() / spectrum.sum())
    assert kept >= SHARE > float(spectrum[: k - 1].sum() / spectrum.sum())
    text = fitted.text(known.text_embedding, known.captions)
    assert text.mean(0).abs().max() < 1e-9  # no gap between texts and images


def test_rare_styles_and_plain_captions_have_the_mean_of_all() -> None:
    known = training()
    for phrases, said in ((EMOJI, "a photo of a cat"), (Phrases(), known.captions[0])):
        fitted = fit_whitening(known, phrases)
        mean = known.image_embedding.double().mean(0, keepdim=True)
        assert fitted.image(mean, [said]).abs().max() < 1e-9
    assert len(fitted.images) == 1


def lines(samples: Tensor) -> dict[str, bool | None]:
    said, image, text = world(120, 30)
    rows = held_out(said, image_embedding=image, text_embedding=text)
    found = by_name(priors.sample_figures("prior", samples, rows, fit_whitening(training(), EMOJI), seed=0))
    assert found["cosine_of_mean_whitened"].values is None
    return {name: figure.holds for name, figure in found.items() if figure.holds is not None}


OLD, NEW = ["cosine_of_mean", "variance_ratio", "mmd"], ["cosine_of_mean_whitened", "own_image"]


def test_a_prior_of_palettes_passes_the_old_claims_and_fails_the_new_ones() -> None:
    """It draws images of the right style and background, as they are, and knows no name."""
    said, image, _ = world(1200, 20)
    place = torch.tensor([[6 * ((37 * i + 11 * k) % 200) + i % 6 for i in range(120)] for k in range(16)])
    assert said[int(place[3, 7])].endswith(FRAMES[7 % 6][1])
    holds = lines(image[place])
    assert {name: holds[name] for name in OLD} == dict.fromkeys(OLD, True)
    assert {name: holds[name] for name in NEW} == dict.fromkeys(NEW, False)


def test_a_prior_of_one_image_a_palette_has_no_spread_either() -> None:
    constant = F.normalize(PALETTES, dim=1)[torch.arange(120) % 6].expand(16, 120, D)
    holds = lines(constant + 1e-4 * normal(16, 120, D))
    assert holds["cosine_of_mean"]
    assert not any(holds[name] for name in [*NEW, "variance_ratio_whitened"])


def test_a_prior_that_knows_names_holds_all_of_them() -> None:
    known = PALETTES[torch.arange(120) % 6] + NAMES * normal(120, D, seed=30)  # the same names, other noise
    holds = lines(F.normalize(known + 0.1 * normal(16, 120, D, seed=9), dim=-1))
    assert set(holds) == {*OLD, *NEW, "variance_ratio_whitened", "mmd_whitened"}
    assert all(holds.values()), holds
