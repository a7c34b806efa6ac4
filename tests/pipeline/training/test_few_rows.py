"""A training whose list holds out hardly a row says so, and shows no figure that such rows would give."""

from pathlib import Path

from pipeline.graph.artifacts import Artifact
from pipeline.held_out import FEWEST
from pipeline.report.inputs import ReportInput
from pipeline.report.training import training_section
from pipeline.training import stage
from pipeline.training.recipes import ClipRecipe, DecoderRecipe
from tests.pipeline.training.conftest import World, make_world
from tests.pipeline.training.trainings import CLIP_MODEL, DECODER, lines

WHY = f"1 validation pair, and a figure needs {FEWEST}; set source.validation to 0.2 or add pairs"


def trained_clip(world: World) -> Artifact:
    recipe = ClipRecipe(samples=16, batch=8, lanes=4, model=CLIP_MODEL)
    return stage.train(world.context("clip", recipe, inputs=("pairs", "captions", "filter")))


def test_clip_has_no_validation_figures_of_one_row(tmp_path: Path) -> None:
    """The contrastive loss of one row is 0 and its recall is 1, whatever the model."""
    world = make_world(tmp_path, (9,))
    made = trained_clip(world)
    assert [line["validation_rows"] for line in lines(world, made) if "validation_rows" in line] == [1, 1]
    assert not {name for line in lines(world, made) for name in line} & {"validation_loss", "validation_recall_at_1"}
    assert not [name for name in made.metrics if name in ("validation_loss", "validation_recall_at_1")]
    page = training_section(ReportInput(world.store, {}), [made])
    assert "validation from" not in page
    assert f"No validation is shown: {WHY}." in page


def test_the_decoder_of_one_row_still_draws_it(tmp_path: Path) -> None:
    world = make_world(tmp_path, (9,))
    recipe = DecoderRecipe(samples=16, batch=8, lanes=4, precision="fp32", model=DECODER)
    made = stage.train(world.context("decoder", recipe))
    assert "preview.png" in made.blobs
    assert "validation_loss" not in made.metrics
    assert f"No validation is shown: {WHY}." in training_section(ReportInput(world.store, {}), [made])


def test_as_many_rows_as_a_figure_needs_give_one(tmp_path: Path) -> None:
    made = trained_clip(make_world(tmp_path, (14,) * 4))
    assert made.metrics["validation_rows"] == FEWEST
    assert "validation_loss" in made.metrics
