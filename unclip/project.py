"""A project: a configuration, its artefacts, and its runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.artifact import Artifact
from jobs.bundles import Bundle
from jobs.plan import RunPlan, plan_run
from jobs.project import Project as Opened
from jobs.project import last_run_differs, open_project
from jobs.run import RunResult, Tell, run
from pipeline.config import resolved_values
from pipeline.data.curation.reading import PairReader
from pipeline.data.curation.stage import READS
from pipeline.graph.stages import Stage
from unclip.pairs import Pairs

if TYPE_CHECKING:
    from unclip.model import Model


def open(
    source: str | Path | Mapping[str, Any], *overrides: str, stages: Iterable[Stage] = (), **values: Any
) -> Project:
    """Opens a configuration and reads its list, without running anything.

    Args:
        source: A YAML file, or its values as a mapping.
        overrides: Values in place of the file's, such as "decoder.samples=100000".
        stages: Further stages besides those of the pipeline and of installed packages; see docs/extend.md.
        values: Overrides by name, such as ``preset="nano"`` or ``decoder={"samples": 100_000}``.

    Raises:
        UserError: For a mistake in the configuration, a list that cannot be read, and a store that cannot be reached.

    Warns if the last run had other values: its results then do not belong to this project.

    Examples:
        >>> project = unclip.open("configs/nano.yaml", "decoder.seed=1")
    """
    overrides = (*overrides, *(f"{name}={json.dumps(value, default=str)}" for name, value in values.items()))
    opened = open_project(source, overrides, stages)
    if differs := last_run_differs(opened.config, overrides):
        warnings.warn(
            f"{opened.config.project}: its last run differed in {differs}, so its results are not found here; open it "
            "with the same overrides",
            stacklevel=2,
        )
    return Project(opened)


class Project:
    """Plans, runs, and returns results. Methods raise UserError, whose text says what to do."""

    def __init__(self, opened: Opened):
        self._opened = opened

    @property
    def name(self) -> str:
        """Returns the name in its configuration."""
        return self._opened.config.project

    @property
    def stages(self) -> list[str]:
        """Returns the names of its stages, in order."""
        return list(self._opened.graph)

    @property
    def config(self) -> dict[str, Any]:
        """Returns its list, store and recipes as plain values, with presets, ``scale`` and overrides resolved.

        ``unclip.open`` takes them again.
        """
        return resolved_values(self._opened.config)

    @property
    def report(self) -> Path:
        """Returns the file of the report, which every run writes."""
        return self._opened.report

    def plan(self, until: str | None = None, only: str | None = None) -> RunPlan:
        """Returns the stages that a run would make, why, and their estimates; see ``run`` for the arguments.

        Examples:
            >>> stale = project.plan(until="curation").stale
        """
        return plan_run(self._opened, only, until)

    def run(
        self, until: str | None = None, only: str | None = None, yes: bool = False, tell: Tell = lambda _: None
    ) -> RunResult:
        """Makes stale stages, as ``unclip run`` does, and resumes when called again. Prints only progress, on stderr.

        Args:
            until: Last stage to make, with all its inputs; by default everything.
            only: Single stage to make; its inputs must exist.
            yes: True to continue above ``run.budget_hours``, and without a GPU.
            tell: Function that is called with the plan, and then with each finished stage; ``print`` prints them as
                ``unclip run`` does.

        Examples:
            >>> result = project.run(until="curation", tell=lambda done: None)
        """
        return run(self._opened, only, until, yes, tell=tell)

    def artifact(self, stage: str) -> Artifact:
        """Returns a stage's artefact for the current list and configuration.

        Examples:
            >>> embeddings = project.artifact("embeddings")
        """
        self._opened.wanted(stage, None)
        return Artifact(self._opened.store, self._opened.made(stage)[stage])

    def pairs(
        self,
        split: Literal["train", "validation", "test"] | None = None,
        curated: bool = True,
        embeddings: bool = False,
    ) -> Pairs:
        """Returns the pairs as a sequence, which also converts to a webdataset or a Ray Dataset.

        Args:
            split: "train", "validation" or "test"; by default all.
            curated: Rows that curation rejected are left out; False does not need curation.
            embeddings: CLIP's embeddings are included.

        Examples:
            >>> pairs = project.pairs("train", embeddings=True)
            >>> first = pairs[0].caption
        """
        stages = [*(name for name in READS if embeddings or name != "embeddings"), *["curation"] * curated]
        reader = PairReader(self._opened.store, self._opened.made(*stages), split)
        return Pairs(reader, self._opened.config.run.ray)

    def model(self, device: str = "auto") -> Model:
        """Opens the trained models to draw with; see ``unclip.load``.

        Examples:
            >>> model = unclip.open("configs/nano.yaml").model(device="cpu")
        """
        from unclip.model import load_bundle

        made = self.artifact("bundle").record
        return load_bundle(Bundle(self.report.parent, made.key, made.blobs, self._opened.store), device)

    def __repr__(self) -> str:
        states = [verdict.state for verdict in self._opened.plan()]
        made = len(states) - states.count("stale")
        return f"unclip.Project {self.name}: {made} of {len(states)} stages made, store {self._opened.store.url}"
