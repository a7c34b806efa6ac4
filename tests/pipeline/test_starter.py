"""Texts, captions and shares of a first configuration."""

import random

import pytest
import yaml

from pipeline.data.pairs.preview import ListPreview
from pipeline.starter import CAPTION_BYTES, SHARE, _captions, _scalar, shortest_share


@pytest.mark.parametrize(
    "text",
    [*("plain", "true", "1e3", "- a", "a: b", "a #b", "ends:", "'", '"', "{a"), *("@x", "*a", "", "é 🐈", "a\nb")],
)
def test_any_text_comes_back_from_yaml(text: str) -> None:
    for document in (f"- {_scalar(text)}", f"- {_scalar(text)} # remark", f"- {_scalar(text)}\n- b"):
        assert yaml.safe_load(document)[0] == text
    assert yaml.safe_load(f"a: {_scalar(text)} # remark") == {"a": text}


def test_captions_are_short_enough_for_clip() -> None:
    long = "word " * 100
    assert _captions(ListPreview(2, False, (long, "short"), ())) == ["short"]
    (cut,) = _captions(ListPreview(1, False, (long,), ()))
    assert cut == "word " * 14 + "word"
    (cut,) = _captions(ListPreview(1, False, ("猫" * 100,), ()))
    assert cut == "猫" * (CAPTION_BYTES // 3)


@pytest.mark.parametrize("seed", range(20))
def test_a_share_is_the_shortest_that_fits(seed: int) -> None:
    chance = random.Random(seed)
    places = sorted(chance.choice([chance.random(), 0.5]) for _ in range(chance.randrange(1, 60)))
    wanted = chance.randrange(len(places) + 1)
    share = shortest_share(places, wanted, len(places))
    assert sum(place < share for place in places) >= wanted
    assert share == SHARE or sum(place < round(share - 0.01, 2) for place in places) < wanted


def test_a_share_has_as_many_digits_as_it_takes() -> None:
    assert shortest_share([0.1234, 0.1238, 0.5], 1, 1) == 0.1235
    assert shortest_share([0.3] * 9, 1, 5) == SHARE  # a group is held out whole or not at all
