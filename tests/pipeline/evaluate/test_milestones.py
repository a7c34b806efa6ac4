"""Two bundles of one training, an early milestone and its end: the later wins where it has learnt more, only there."""

from dataclasses import replace

import pytest

from models.prior_configs import DiffusionPriorConfig
from pipeline.evaluate.stage import run_evaluation
from pipeline.graph.artifacts import Artifact, load_artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.release.compare import EvaluatedBundle, changes, load_measured, obstacles
from pipeline.release.gates import failing
from pipeline.settings import ReleaseGates, TrainingSettings
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.results import at_stop
from pipeline.training.stage import train
from tests.pipeline.evaluate.made_up import RECIPE, Case, make_case

pytestmark = pytest.mark.slow  # tests/pipeline/release compares figures that are made up, and judges them by gates
EARLY = 64
PRIOR = DiffusionPriorRecipe(
    samples=1024, batch=16, lanes=8, window=5, learning_rate=1e-2, ema_half_life=64, warmup_steps=2,
    model=DiffusionPriorConfig(text_context=16, width=32, depth=1, heads=2, steps=50),
)  # fmt: skip


def evaluated(case: Case, prior: Artifact, name: str) -> EvaluatedBundle:
    """The case's bundle with this prior in it, evaluated."""
    others = {file: blob for file, blob in case.bundle.blobs.items() if not file.startswith("diffusion_prior/")}
    blobs = others | {f"diffusion_prior/{file}": blob for file, blob in prior.blobs.items()}
    bundle = publish_artifact(case.world.store, Artifact("bundle", name, {}, {}, Ledger(), blobs), 0.0)
    recipe = replace(RECIPE, rows=24, samples=4)
    evaluated = load_measured(case.world.store, run_evaluation(replace(case, bundle=bundle).context(recipe)))
    assert evaluated is not None
    return evaluated


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluatedBundle, EvaluatedBundle]:
    """The early and the late bundle."""
    case = make_case(tmp_path_factory.mktemp("milestones"), 3, 56, 72, ("diffusion",))
    settings = TrainingSettings(threads=1, device="cpu", milestones=(EARLY,))
    ctx = case.world.context("diffusion_prior", PRIOR, settings)
    late = train(ctx)
    early = load_artifact(case.world.store, "diffusion_prior", at_stop(ctx, EARLY).key)
    return evaluated(case, early, "early"), evaluated(case, late, "late")


def test_the_later_wins_where_it_should(both: tuple[EvaluatedBundle, EvaluatedBundle]) -> None:
    early, late = both
    assert obstacles(early, late) == []
    found = {(change.model, change.name): change for change in changes(early, late)}
    mean = found["diffusion_prior", "cosine_text"]
    assert mean.verdict == "better"
    assert 0 < mean.interval[0] < mean.difference < mean.interval[1]
    assert mean.rows == len(late.document["rows"]["priors"]["keys"]) > 20
    assert set(found) == {("diffusion_prior", "cosine_text"), ("diffusion_prior", "found_text")}


def test_the_gates_let_the_later_follow_the_earlier_and_not_the_other_way(
    both: tuple[EvaluatedBundle, EvaluatedBundle],
) -> None:
    early, late = both
    assert failing(ReleaseGates(), early.figures, late.figures, changes(early, late)) == []
    lines = failing(ReleaseGates(), late.figures, early.figures, changes(late, early))
    assert any(line.startswith("diffusion_prior.cosine_text is worse: ") for line in lines)
