from collections.abc import Iterator
from functools import cache

import pytest

from pipeline.data.source.drawings.world import draw
from pipeline.evaluate import parts
from tests.pipeline.training.conftest import shared_world  # noqa: F401  # the same small world


@pytest.fixture(autouse=True, scope="session")
def drawn_once() -> Iterator[None]:
    """Tests look at the same drawings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "draw", cache(draw))
        yield
