"""Priors that are none: each baseline, given as a prior, fails the claims, and what knows more holds them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.priors import COSINE, FOUND, baselines
from tests.pipeline.evaluate.made_up import normal, rows, subject

D, TRAINING, N = 16, 1500, 200
MAP, TURN, GAP = normal(D, D, seed=1) / 4, normal(D, D, seed=2) / 2, normal(D, seed=3)


def world(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Text and image embeddings with a gap, and what can be known of the images, of which a line knows a part."""
    text = normal(n, D, seed=seed)
    knowable = text @ MAP + 0.5 * (text @ TURN).abs() + 2 * GAP
    image = knowable + 0.2 * normal(n, D, seed=seed + 1)
    return F.normalize(text, dim=1), F.normalize(image, dim=1), F.normalize(knowable, dim=1)


KNOWN = dict(zip(("text_embedding", "image_embedding"), world(TRAINING, 10)[:2], strict=True))
TEXT, IMAGE, KNOWABLE = world(N, 20)


def measured(prior: Tensor, image: Tensor = IMAGE) -> dict[str, Figure]:
    given = prior.expand(3, -1, -1), rows(N, text_embedding=TEXT, image_embedding=image), baselines(TEXT, KNOWN)
    figures = (figure for metric in (FOUND, COSINE) for figure in metric.measure(subject(metric, "ar_prior"), *given))
    return {figure.name: figure for figure in figures}


def test_a_prior_that_knows_what_can_be_known_holds() -> None:
    figures = measured(KNOWABLE)
    assert all(figure.holds for figure in figures.values())
    assert [name for name, figure in figures.items() if figure.values] == ["found_text", "cosine_text"]
    assert {figure.claim for figure in figures.values()} == {"found.ar_prior", "cosine.ar_prior"}


@pytest.mark.parametrize(
    ("cheat", "fails"),
    [
        (lambda: TEXT, {"text", "shift", "ridge"}),
        (lambda: baselines(TEXT, KNOWN)["shift"][1], {"shift", "ridge"}),
        (lambda: baselines(TEXT, KNOWN)["ridge"][1], {"ridge"}),
        (lambda: KNOWABLE.roll(N // 2, 0), {"ridge"}),
        (lambda: IMAGE.mean(0).expand(N, D), {"ridge"}),
    ],
    ids=["the caption's embedding", "the gap", "a line", "another caption's", "the mean image"],
)
def test_a_prior_without_weights_fails_both_lines(cheat: Callable[[], Tensor], fails: set[str]) -> None:
    figures = measured(F.normalize(cheat(), dim=1).float())
    for line in ("found", "cosine"):
        failing = {
            name.removeprefix(f"{line}_") for name in figures if name.startswith(line) and not figures[name].holds
        }
        assert failing >= fails


def test_where_a_baseline_finds_all_but_a_few_nothing_is_claimed_of_finding() -> None:
    by_name = measured(TEXT, TEXT)
    assert by_name["found_text"].holds is None
    assert by_name["found_text"].note == "the caption embedding baseline misses 0 of 200, too few to improve on"
    assert by_name["cosine_text"].holds is False


def test_the_baselines_are_what_they_are_called() -> None:
    found = {name: query.numpy() for name, (_, query) in baselines(TEXT, KNOWN).items()}
    text, image = (x.double().numpy() for x in KNOWN.values())
    assert np.allclose(found["text"], TEXT)
    assert np.allclose(found["shift"], TEXT.numpy() + image.mean(0) - text.mean(0), atol=1e-6)
    least = np.linalg.lstsq(np.c_[text, np.ones(TRAINING)], image, rcond=None)[0]  # so many rows need little penalty
    assert np.allclose(found["ridge"], np.c_[TEXT.numpy(), np.ones(N)] @ least, atol=0.02)
    noise = {name: F.normalize(normal(40, D, seed=seed), dim=1) for seed, name in enumerate(KNOWN)}
    said = baselines(TEXT, noise)["ridge"][1]  # where nothing can be known, it says little
    assert float(said.var(0).mean()) < 0.1 * float(noise["image_embedding"].var(0).mean())
