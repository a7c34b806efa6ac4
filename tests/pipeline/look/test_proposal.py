"""What a run takes in places that people have, and what is not possible there."""

from pipeline.config import preset_config
from pipeline.graph.resources import Machine
from pipeline.look.proposal import GPUS, SMALL, estimates


def test_where_cores_are_as_quick_the_line_of_a_gpu_says_why() -> None:
    """Of few rows and small models, of which most is starting."""
    nano = preset_config("nano"), "preset nano"
    _, *cards, mac = estimates(nano, nano, 100, 0.2, Machine(2))
    assert all(mac.seconds < card.seconds and card.lacks == (SMALL,) for card in cards)


def test_what_cannot_be_is_one_line_with_what_can() -> None:
    """On two cores preset small would take years; a card of 12 GB has no room for karlo's diffusion prior."""
    small, karlo = ((preset_config(name), f"preset {name}") for name in ("small", "karlo"))
    here, *cards, mac = estimates(small, karlo, 20_000, 0.02, Machine(2))
    assert len(here.lacks) == 1
    assert " need a GPU: " in here.lacks[0]
    assert "or take preset=tiny" in here.lacks[0]
    assert [card.where for card in cards] == [*GPUS]
    by_place = {card.where: card.lacks for card in cards}
    assert any("diffusion_prior takes " in lack and "one RTX 3060 has 12 GB" in lack for lack in by_place["RTX 3060"])
    assert all("or a smaller preset" in lack for lacks in by_place.values() for lack in lacks)
    assert "\n" not in "".join(lack for each in (here, *cards, mac) for lack in each.lacks)
