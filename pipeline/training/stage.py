"""The training stages. Light: what trains is imported when a stage runs."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, Stage
from pipeline.training.recipes import TrainingRecipe


def stage(
    name: str,
    recipe: TrainingRecipe,
    inputs: tuple[str, ...],
    run: Callable[[Context], Artifact] | None = None,
    pinned: bool = False,
) -> Stage:
    """Returns the stage of a graph that trains by ``recipe``; ``run`` is ``train`` by default."""
    checked = None if recipe.pretrained else check_first
    return Stage(name, recipe.version, recipe, inputs, run or train, kind="training", pinned=pinned, check=checked)


def check_first(ctx: Context) -> None:
    """Raises UserError for settings and inputs with which the training would fail."""
    from pipeline.training.checks import check
    from pipeline.training.task import task_of

    check(ctx, task_of(ctx))


def run_clip(ctx: Context) -> Artifact:
    """Trains a CLIP, or takes the one that the recipe names."""
    if not ctx.recipe.pretrained:
        return train(ctx)
    from pipeline.training.attempts import take_clip

    return take_clip(ctx)


def train(ctx: Context) -> Artifact:
    """Trains until the recipe's stop; see pipeline.training.attempts."""
    from pipeline.training.attempts import train_and_show

    return train_and_show(ctx)
