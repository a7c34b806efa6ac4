"""Images drawn by cheats: each claim about parts fails for a drawer that ignores one, and no other group's does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.data.source.drawings.world import PARTS, Drawing, draw, drawing_url
from pipeline.evaluate import parts
from pipeline.evaluate.figure import Figure, by_claim, holds
from pipeline.evaluate.parts import GROUPS, PARTS_DRAWN, read_parts, right, truths
from tests.pipeline.evaluate.made_up import normal, rows, subject

EACH = 10  # drawings of each style
NAMES = [(style, part) for style, known in PARTS.items() for part in known]


def value(style: str, part: str, number: int) -> str:
    known = list(PARTS[style][part])
    return known[number % len(known)]


TRUTHS = [
    Drawing(style, tuple(value(style, part, i * (place + 1) + i // 3) for place, part in enumerate(PARTS[style])))
    for i in range(EACH)
    for style in PARTS
]


def images(change: Callable[[int, Drawing], Drawing] = lambda _, drawing: drawing) -> Tensor:
    """Draws what a drawer makes of each truth, with noise as a network leaves it: uint8 [n, 64, 64, 3]."""
    clean = torch.stack([parts._drawn(change(i, drawing)) for i, drawing in enumerate(TRUTHS)])
    return (clean + 25 * normal(*clean.shape)).clamp(0, 255).to(torch.uint8)


def measured(drawn: Tensor, drawings: list[Drawing | None] | None = None) -> list[Figure]:
    return measured_all({"decoder": drawn}, drawings)["decoder"]


def measured_all(drawn: dict[str, Tensor], drawings: list[Drawing | None] | None = None) -> dict[str, list[Figure]]:
    """Returns the figures of each drawer."""
    found = read_parts(drawn, drawings or [*TRUTHS], lambda _: None)
    return {
        name: [
            f for metric in PARTS_DRAWN for f in metric.measure(subject(metric, name), (found, found), rows(len(all_)))
        ]
        for name, all_ in drawn.items()
    }


def failing(figures: list[Figure]) -> set[str]:
    """Returns the parts of the claims that do not hold."""
    found = by_claim([figure.as_json() for figure in figures])
    return {figure["name"] for of_claim in found if not holds(of_claim) for figure in of_claim}


def test_a_drawer_of_every_part_holds_and_is_right_everywhere() -> None:
    figures = {figure.name: figure for figure in measured(images())}
    assert sorted(part for group in GROUPS for part in group) == sorted({part for _, part in NAMES}) == sorted(figures)
    assert len(by_claim([figure.as_json() for figure in figures.values()])) == len(GROUPS)
    assert all(figure.holds for figure in figures.values())
    assert {figure.value for figure in figures.values()} == {figure.trained for figure in figures.values()} == {1.0}
    assert {name: figure.rows for name, figure in figures.items()} == {
        part: EACH * sum(part in known for known in PARTS.values()) for _, part in NAMES
    }
    assert figures["top"].baseline == pytest.approx(1 / 8, abs=0.1)


def test_a_drawer_that_ignores_a_part_fails_its_line_and_no_other() -> None:
    """It draws the values in their order, whatever the caption says."""

    def ignoring(part: str) -> Tensor:
        def change(i: int, drawing: Drawing) -> Drawing:
            if part not in drawing.parts or (part == "colour" and drawing.style == "planets"):
                return drawing  # a planet's surface is drawn in shades of its colour, and is not right in another
            return drawing.replaced(part, value(drawing.style, part, i // 3 + 1))

        return images(change)

    for part, figures in measured_all({part: ignoring(part) for _, part in NAMES}).items():
        assert {figure.name for figure in figures if not figure.holds} == {part}
        assert failing(figures) == {name for group in GROUPS if part in group for name in group}


def test_what_is_common_is_right_no_more_often_than_by_chance() -> None:
    """Seven of ten planets have no ring: to draw none ever is right in most images, and knows nothing."""
    known: list[Drawing | None] = [
        drawing.replaced("ring", "none" if i % 10 < 7 else "thin")
        for i, drawing in enumerate(truth for truth in TRUTHS if truth.style == "planets")
    ]
    bare = torch.stack([parts._drawn(drawing.replaced("ring", "none")) for drawing in known if drawing])
    (ring,) = (figure for figure in measured(bare.to(torch.uint8), known) if figure.name == "ring")
    assert ring.value == 0.7 > parts.MOST
    assert ring.baseline == pytest.approx(0.7)
    assert not ring.holds


def test_above_chance_is_not_enough() -> None:
    """A top that is right in four of ten images is far above one in eight, and nobody would call it drawn."""

    def sometimes(i: int, drawing: Drawing) -> Drawing:
        wrong = "top" in drawing.parts and i // 3 % 5 > 1
        return drawing.replaced("top", value("critters", "top", i // 3 + 1)) if wrong else drawing

    (top,) = (figure for figure in measured(images(sometimes)) if figure.name == "top")
    assert top.value == pytest.approx(0.4, abs=0.1)
    assert not top.holds


def test_values_that_look_the_same_share_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "draw", lambda drawing, side: draw(drawing.replaced("moon", "one"), side))
    planet = next(truth for truth in TRUTHS if truth.style == "planets")
    found = read_parts({"decoder": parts._drawn(planet)[None].to(torch.uint8)}, [planet], lambda _: None)
    hits, chance = right(found["decoder", "moon"])
    assert hits.tolist() == chance.tolist() == pytest.approx([1 / 3])


def test_images_of_other_people_have_no_truth() -> None:
    known = drawing_url(TRUTHS[0], 256)
    urls = ["http://example.test/a.png", known, "", known.replace(".png", "-more.png")]
    assert truths(urls) == [None, TRUTHS[0], None, None]
    half = [truth if truth.style == "planets" else None for truth in TRUTHS]
    figures = measured(images(), half)
    assert {figure.name for figure in figures} == set(PARTS["planets"])
    few = measured(images()[:9], [*half[:9]])
    assert {figure.holds for figure in few} == {None}
    assert {figure.note for figure in few} == {"3 test rows, and a figure needs 8; add pairs"}
