"""Trains one model for a fixed budget of processor seconds."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import process_time
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from benchmarks.recipes.figures import measure
from benchmarks.recipes.others import Cropped, Reworded
from benchmarks.timing import commit, cpu
from jobs.project import Project, open_project
from pipeline.errors import UserError
from pipeline.graph.execute import execute, make_context
from pipeline.graph.stages import Context, ordered
from pipeline.parse import parse
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.loop import NonFinite, fit
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState, begin
from pipeline.training.task import Task, task_of
from pipeline.training.timing import NOT_MEASURED
from pipeline.training.worker import Publisher, warm_start

ENDLESS = 10**9  # steps
IN_THIS_PROCESS = [f"run.{stage}.workers=0" for stage in ("pairs", "embeddings", "thresholds", "curation", "codec")]
PARTNERS = {"clip": (), "decoder": ("judge", "prior"), "ar_prior": ("judge", "decoder")}
PARTNERS["diffusion_prior"] = PARTNERS["ar_prior"]
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Trial:
    """Describes a trial, as its YAML file does.

    Attributes:
        name: Of the file.
        hypothesis: What it is expected to show, written before it runs.
        stage: The model that is trained.
        config: A configuration, as a path from the folder of the repository.
        seconds: Of one core that the training may take: two threads for ten minutes are 1,200.
        threads: To compute on.
        decay: The share of the budget over which the rate falls to zero.
        overrides: Values in place of the configuration's, written ``key.key=value``.
        crops: For CLIP: the least share of its area to which an image is cropped at random, sides of 3:4 to 4:3.
        captions: For CLIP: ``own``, or ``parts``, a random choice of style, name and background in random order.
    """

    name: str
    hypothesis: Annotated[str, Field(min_length=20)]
    stage: Literal["clip", "ar_prior", "diffusion_prior", "decoder"]
    config: str
    seconds: PositiveFloat
    threads: PositiveInt = 1
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    overrides: tuple[str, ...] = ()
    crops: Annotated[float, Field(gt=0, le=1)] = 1.0
    captions: Literal["own", "parts"] = "own"

    def __post_init__(self) -> None:
        for name in ("samples", "decay", "seed"):
            if any(override.startswith(f"{self.stage}.{name}=") for override in self.overrides):
                raise ValueError(f"overrides: {self.stage}.{name} follows from the budget, decay and --seed")
        if self.stage != "clip" and (self.crops, self.captions) != (1.0, "own"):
            raise ValueError("crops and captions are for CLIP: leave them out")


class Spent(Exception):
    """Says that a part of the budget is spent."""


def read_trial(path: str) -> Trial:
    """Reads a trial. Raises UserError with one line for any mistake."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"{path}: cannot be read ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping; docs/recipes.md has an example")
    return parse(Trial, {"name": Path(path).stem} | values)


def describe(trial: Trial, partners: Mapping[str, str]) -> dict[str, Any]:
    """Returns what all runs of a trial have in common, as plain values: its fields and the names of other models.

    Raises UserError for a model that measuring this one does not need.
    """
    if unused := [name for name in partners if name not in PARTNERS[trial.stage]]:
        raise UserError(f"--{unused[0]}: a trial of {trial.stage} does not need it; leave it out")
    named = {name: Path(folder).name for name, folder in partners.items()}
    return json.loads(json.dumps(dataclasses.asdict(trial) | {"partners": named}))


def run(
    trial: Trial, store: str, seed: int, partners: Mapping[str, str], save: str | None, held_out: bool
) -> dict[str, Any]:
    """Runs a trial.

    Args:
        trial: What is trained.
        store: The URL of the store.
        seed: Of the training.
        partners: Folders of other models, as "judge", "prior" and "decoder".
        save: A new folder for the trained model; None keeps none.
        held_out: Whether it is measured on test rows, too.

    Returns:
        The line of the record. A training that diverged has no figures.

    Raises:
        UserError: The trial does not fit its configuration.
    """
    torch.set_num_threads(trial.threads)
    changes = [*trial.overrides, f"{trial.stage}.seed={seed}", f"store={store}", *IN_THIS_PROCESS]
    project = open_project(trial.config, changes)
    ctx = context(project, trial.stage)
    if ctx.recipe.task == "clip" and ctx.recipe.pretrained:
        raise UserError(f"clip.weights is {ctx.recipe.weights}: a trial of CLIP trains it; leave clip.weights out")
    task = Cropped(ctx.recipe.model, trial.crops) if trial.crops < 1 else task_of(ctx)
    feed: Any = Feed(ctx.store, ctx.inputs, task, ctx.recipe)
    words = Reworded(feed, ctx) if trial.captions == "parts" else feed
    state = begin(task, ctx.recipe, ProcessGroup(), warm_start(ctx, task))
    began, diverged = process_time(), False
    try:
        train(trial, ctx.recipe, lambda recipe, between: _fit(ctx, words, recipe, state, between), state)
    except NonFinite as e:
        log.warning("%s", e)
        diverged = True
    took = process_time() - began
    line = describe(trial, partners) | {
        "seed": seed,
        "samples": state.samples,
        "took": round(took, 1),
        "weights": sum(p.numel() for p in state.model.parameters()),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "processor": cpu(),
        "torch": torch.__version__,
    }
    print(f"{trial.name}: {state.samples:,} samples in {took:.0f} processor seconds", flush=True)
    figures: dict[str, list[float]] = {}
    if not diverged:
        splits = ("validation", "test") if held_out else ("validation",)
        with tempfile.TemporaryDirectory() if save is None else nullcontext(save) as folder, torch.no_grad():
            saved(ctx, task, feed, state.ema, folder)
            found = measure(trial.stage, ctx, {**partners, trial.stage: folder}, splits)
        figures = {name: [float(f"{value:.5g}") for value in values] for name, values in found.items()}
    return line | {"figures": figures, "diverged": diverged}


def context(project: Project, stage: str) -> Context:
    """Returns what a training stage is given, with CLIP and codec; makes what the store lacks, in this process."""
    wanted = {stage, *({"clip", "codec"} if stage != "clip" else ())}
    for each in reversed(list(ordered(project.graph))):
        if each.name in wanted:
            wanted |= set(each.inputs)

    def said(name: str, *_: object) -> None:
        print(f"made {name}", flush=True)

    verdicts = project.plan()
    made = execute(project.graph, verdicts, wanted - {stage}, project.store, project.config, said, lambda *_: None)
    key = next(verdict.key for verdict in verdicts if verdict.stage == stage)
    ctx = make_context(project.graph[stage], key, made, project.store, project.config)
    return replace(ctx, inputs={**made, **ctx.inputs})


def train(
    trial: Trial,
    recipe: TrainingRecipe,
    go_on: Callable[[TrainingRecipe, Callable[[TrainState], None]], object],
    state: TrainState,
) -> None:
    """Trains until the budget is spent.

    Before the rate falls the clock decides; then the samples that the rest of the budget has room for, at the rate
    measured until then.

    Args:
        trial: Has the budget.
        recipe: Says how to train.
        go_on: Trains ``state`` by a recipe, and calls a function before every step.
        state: Trained in place.
    """
    began, steady = process_time(), (1 - trial.decay) * trial.seconds
    told, falling = 0, 0

    def watch(now: TrainState) -> None:
        nonlocal told
        spent = process_time() - began
        if spent * 10 >= told * trial.seconds:
            told += 1
            print(f"{trial.name}: {now.samples:,} samples, {spent:.0f} of {trial.seconds:.0f} s", flush=True)
        if spent >= steady and now.samples and not falling:
            raise Spent

    with suppress(Spent):
        go_on(replace(recipe, samples=ENDLESS * recipe.batch, decay=0), watch)
    if bool(state.failed):  # in one of the last steps, which nobody has checked
        raise NonFinite(f"{trial.stage}: the training diverged before sample {state.samples:,}", state.samples)
    if trial.decay:
        steps = state.samples / recipe.batch * trial.decay / (1 - trial.decay)
        falling = max(1, round(steps)) * recipe.batch
        go_on(replace(recipe, samples=state.samples + falling, decay=falling), watch)


def _fit(ctx: Context, feed: Any, recipe: TrainingRecipe, state: TrainState, between: Callable[..., None]) -> None:
    fit(ctx.stage, feed, recipe, ctx.settings, ProcessGroup(), state, between)


def saved(ctx: Context, task: Task, feed: Feed, model: nn.Module, folder: str) -> None:
    """Writes a model as its stage does, measured by its task if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Publisher(ctx, task, feed, ProcessGroup(), NOT_MEASURED).save(model, Path(folder))
