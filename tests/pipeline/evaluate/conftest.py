from collections.abc import Iterator
from functools import cache

import pytest
import torch

from pipeline.data.source.drawings.world import draw
from pipeline.evaluate import parts
from tests.pipeline.evaluate.made_up import Case, make_case
from tests.pipeline.training.conftest import shared_world  # noqa: F401  # the same small world


@pytest.fixture(autouse=True, scope="package")
def drawn_once() -> Iterator[None]:
    """Tests look at the same drawings, and run side by side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "draw", cache(draw))
        patch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)
        yield


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Images of other people, and a bundle without the AR prior."""
    return make_case(tmp_path_factory.mktemp("case"), 4, 20, 72, ("diffusion",))
