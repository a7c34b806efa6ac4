"""Every metric ranks real above trained above early above shuffled, on made-up rows that get worse in that order.

Figures of whole sets, such as CMMD, do not look at captions, so that no shuffle can change them: they rank the first
three, and a set of noise below these, and the test shows that they are blind to the fourth.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate import metrics, quality
from pipeline.evaluate.memorisation import share_nearer
from pipeline.evaluate.metrics import derangement
from pipeline.evaluate.quality import covered
from pipeline.evaluate.retrieval import ranks, told_apart
from pipeline.evaluate.statistics import cmmd, frechet_distance
from pipeline.evaluate.upsamplers import Upsampled, consistency_figure, likeness_figures, ssim
from tests.pipeline.evaluate.test_figures import rows

N, D = 160, 24
LEVELS = ("real", "trained", "early", "shuffled")
OTHER = derangement(range(N))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


SCALES = 1 / torch.arange(1, D + 1)  # few directions matter, as in embeddings of images
TEXT = unit(normal(N, D, seed=0) * SCALES)
IMAGE = unit(TEXT.roll(1, 1) + 0.1 * normal(N, D, seed=1) * SCALES)
MEAN = unit(torch.tensor([1.0, *[0.3] * (D - 1)]))


def learnt(share: float, noise: float, seed: int) -> Tensor:
    """What a model draws that knows so much of each image, and else draws the same for all."""
    return unit(share * IMAGE + (1 - share) * MEAN + noise * normal(N, D, seed=seed))


SEEN = {"real": IMAGE, "trained": learnt(0.6, 0.1, 3), "early": learnt(0.4, 0.15, 4)}
SEEN["shuffled"] = SEEN["trained"][OTHER]
CAPTIONS = TEXT.roll(1, 1)  # as a CLIP would embed them
OWN = torch.arange(N)

OF_ROWS: dict[str, Callable[[Tensor], Tensor]] = {  # higher is better
    "cosine": lambda x: metrics.cosine(x, IMAGE),
    "rank": lambda x: -ranks(x, IMAGE, OWN),
    "recall at 1": lambda x: (ranks(x, IMAGE, OWN) <= 1).double(),
    "recall at 10": lambda x: (ranks(x, IMAGE, OWN) <= 10).double(),
    "CLIP score": lambda x: quality.clip_score(x, CAPTIONS),
    "R-precision": lambda x: told_apart(x, CAPTIONS, OWN).double(),
    "R-precision of a row's own captions": lambda x: told_apart(x, CAPTIONS.expand(N, N, D), OWN).double(),
}
OF_SETS: dict[str, Callable[[Tensor], float]] = {
    "MMD": lambda x: -metrics.u_statistic(metrics.mmd_terms(x, IMAGE, metrics.median_distance(IMAGE)), OWN)[0],
    "CMMD": lambda x: -cmmd(x, IMAGE),
    "Fréchet distance": lambda x: -frechet_distance(x, IMAGE),
    "precision": lambda x: float(covered(x, IMAGE).double().mean()),
    "recall": lambda x: float(covered(IMAGE, x).double().mean()),
}


@pytest.mark.parametrize("metric", OF_ROWS)
def test_metrics_of_rows_rank_all_four(metric: str) -> None:
    measured = [float(OF_ROWS[metric](SEEN[level]).mean()) for level in LEVELS]
    assert all(upper > lower for upper, lower in pairwise(measured)), measured


@pytest.mark.parametrize("metric", OF_SETS)
def test_metrics_of_sets_rank_three_above_noise_and_are_blind_to_captions(metric: str) -> None:
    levels = [SEEN[level] for level in LEVELS[:3]] + [unit(normal(N, D, seed=5) - 10 * MEAN)]
    measured = [OF_SETS[metric](x) for x in levels]
    assert all(upper > lower for upper, lower in pairwise(measured)), measured
    if metric != "MMD":  # which leaves out the pair of a row with itself, and so changes a little
        assert OF_SETS[metric](SEEN["shuffled"]) == pytest.approx(measured[1], abs=1e-9)


def images() -> dict[str, Upsampled]:
    """Upsampled images by level: real ones are the original itself but for a little noise."""
    original = F.interpolate(normal(6, 3, 8, 8, seed=6) / 2, 32, mode="bicubic").clamp(-1, 1)
    original = (original + 0.1 * normal(6, 3, 32, 32, seed=7)).clamp(-1, 1)
    clean = F.interpolate(original, 8, mode="bicubic", antialias=True)
    made = {}
    for level, noise in (("real", 0.01), ("trained", 0.1), ("early", 0.3)):
        samples = original + noise * normal(4, 6, 3, 32, 32, seed=8)
        made[level] = Upsampled(original, clean, clean, F.interpolate(clean, 32, mode="bicubic"), samples.clamp(-1, 1))
    made["shuffled"] = made["trained"]._replace(samples=made["trained"].samples.roll(1, 1))
    return made


def test_metrics_of_upsamplers_rank_all_four() -> None:
    measured: dict[str, list[float]] = {}
    for level in LEVELS:
        made = images()[level]
        for figure in (*likeness_figures("u", made, rows(6), 0), consistency_figure("u", made, rows(6), 0)):
            assert figure.value is not None
            measured.setdefault(figure.name, []).append(figure.value)
    assert set(measured) == {"psnr_of_mean", "psnr_of_one", "ssim_of_mean", "ssim_of_one", "consistency"}
    for name, values in measured.items():
        assert all(upper > lower for upper, lower in pairwise(values)), (name, values)
    assert float(ssim(images()["real"].original, images()["real"].original).min()) == pytest.approx(1)


def test_the_share_of_nearer_images_ranks_copies_above_likenesses_above_new_ones() -> None:
    training, real = unit(normal(300, D, seed=9)), unit(normal(N, D, seed=10))

    def distance(x: Tensor) -> Tensor:
        return 1 - (x @ training.T).max(1).values

    made = [unit((1 - k) * training[:N] + k * normal(N, D, seed=11) / 4) for k in (0.0, 0.5, 0.75, 1.0)]
    shares = [share_nearer(distance(x), distance(real), OWN, 0)[0] for x in made]
    assert shares[0] == 1
    assert all(upper >= lower for upper, lower in pairwise(shares)), shares
    assert shares[-1] == pytest.approx(0.5, abs=0.1)
