"""A configuration, its store, graph and plan: where every command begins."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from pipeline.build import build
from pipeline.config import (
    RUN_FILE,
    Config,
    load_config,
    make_config,
    read_values,
    resolved_values,
    sections,
    whole_values,
)
from pipeline.data.source.journal import ListJournal, read_journal
from pipeline.data.source.passes import ListWorkers
from pipeline.data.source.stage import Scan, scan
from pipeline.errors import UserError, did_you_mean
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.plan import Verdict, plan
from pipeline.graph.runs import last_run
from pipeline.graph.stages import Graph, Stage, ordered, standing_for
from pipeline.progress import say_once
from pipeline.store import Store, open_store
from pipeline.store.records import digest
from pipeline.training.trackers import find_tracker

RUNS = "runs"  # folder beside RUN_FILE: the configuration of each run that differs, by its digest
SETTINGS = ("run.", "release.")  # prefixes of values that change nothing that is made


@dataclass(frozen=True)
class Project:
    """A project before anything has run. ``journal`` is the one with which the list was read."""

    config: Config
    store: Store
    graph: Graph
    scan: Scan
    journal: ListJournal

    @property
    def report(self) -> Path:
        """Returns the file of the report."""
        return Path(self.config.run.output) / "report.html"

    @property
    def rows(self) -> int:
        """Returns how many rows of the list name an image and a caption."""
        return self.scan.rows

    @property
    def held_out(self) -> float:
        """Returns the share of the rows that an evaluation may look at."""
        return max(self.scan.held_out.values(), default=0) / max(1, self.rows)

    def warnings(self, stages: Collection[str]) -> Iterator[str]:
        """Yields what will be missed of the list by some of these stages, before anything has learned from it.

        A store that knows of no run comes first, where the output folder does.
        """
        ran = Path(self.config.run.output) / RUN_FILE
        if ran.is_file() and not last_run(self.store, self.config.project):
            yield (
                f"{ran} is of a run, and the store {self.store.url} knows of none: all is made again; if the store was "
                "moved, name its place with store=FOLDER"
            )
        for stage in self.graph.values():
            if stage.warn and stage.name in stages:
                yield from stage.warn(stage, self.scan)

    def check_trackers(self) -> None:
        """Raises UserError for a tracker that cannot be imported, before anything is trained."""
        for name in self.config.run.trackers:
            find_tracker(name)

    def plan(self, supposed: Mapping[str, str | None] = MappingProxyType({})) -> list[Verdict]:
        """Returns the verdict on every stage, with the pins of the store or with ``supposed`` pins by lineage."""
        previous = last_run(self.store, self.config.project)
        return plan(self.graph, self.scan.keys, self.config.project, self.store, previous, supposed)

    def made(self, *stages: str) -> dict[str, Artifact]:
        """Returns the artefacts of these stages, or of those that stand for them, as planned.

        Raises UserError if one does not exist.
        """
        keys = {verdict.stage: verdict.key for verdict in self.plan()}
        makers = {stage: standing_for(self.graph, stage) for stage in stages}
        found = {stage: load_artifact(self.store, maker, keys[maker]) for stage, maker in makers.items()}
        if missing := [stage for stage, artifact in found.items() if artifact is None]:
            raise UserError(
                f"{self.config.project}: not made for the current list and recipes: {', '.join(missing)}; make them "
                f"with unclip run --until {missing[-1]}"
            )
        return {stage: artifact for stage, artifact in found.items() if artifact is not None}

    def finished(self, verdicts: Sequence[Verdict] | None = None) -> dict[str, Artifact]:
        """Returns the artefacts of all stages that are made, as planned; it plans if it is given no plan."""
        plan = self.plan() if verdicts is None else verdicts
        found = {verdict.stage: load_artifact(self.store, verdict.stage, verdict.key) for verdict in plan}
        return {stage: artifact for stage, artifact in found.items() if artifact is not None}

    def wanted(self, only: str | None, until: str | None) -> set[str]:
        """Returns the stages that ``--only`` or ``--until`` ask for. Raises UserError for an unknown one."""
        for name in (only, until):
            if name is not None and name not in self.graph:
                raise UserError(f"unknown stage {name}{did_you_mean(name, self.graph)}")
        if only is None and until is None:
            return set(self.graph)
        wanted = {only or until}
        for stage in reversed(list(ordered(self.graph))):
            if stage.name in wanted:
                wanted |= set(stage.inputs)
        return {str(name) for name in wanted}


def remember_config(config: Config) -> None:
    """Writes the resolved configuration into its output folder: ``load_as_run`` reads it, and it can be run itself.

    Raises UserError for a place where no folder can be made, such as /proc.
    """
    text = yaml.safe_dump(whole_values(config), sort_keys=False, allow_unicode=True)
    for file in (Path(config.run.output) / RUN_FILE, _run_file(config)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# The configuration of a run, resolved\n{text}", encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"run.output: {file.parent} cannot be made; name a folder of a disk") from None


def _run_file(config: Config) -> Path:
    return Path(config.run.output) / RUNS / f"{digest(resolved_values(config))[:12]}.yaml"


def load_as_run(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns a configuration with the list and the recipes of its last run, which may have had other overrides.

    So what follows a run speaks of that run, whatever its command line was and whatever was edited since. Where it was
    run as it stands, before the first run, and where ``overrides`` name a recipe, it is as ``load_config`` returns it.
    Raises UserError.
    """
    config = load_config(source, overrides)
    ran, differs = _as_run(config, overrides)
    file = Path(ran.run.output) / RUN_FILE
    if differs and _run_file(config).is_file():
        say_once(f"{source} as it stands; its last run differed in {differs}: name {file} in its place for that one")
        return config
    if differs:
        say_once(f"{source} as it was last run, by {file}; it differs in {differs}: override them with KEY=VALUE")
    return ran


def last_run_differs(config: Config, overrides: Sequence[str]) -> str:
    """Returns in which values the last run of a configuration differed from it, where ``load_as_run`` would say so."""
    with suppress(UserError):  # nothing depends on that file here
        return "" if _run_file(config).is_file() else _as_run(config, overrides)[1]
    return ""


def _as_run(config: Config, overrides: Sequence[str]) -> tuple[Config, str]:
    file = Path(config.run.output) / RUN_FILE
    if any(not word.startswith(SETTINGS) for word in overrides) or not file.is_file():
        return config, ""
    recipes = sections(config.stages)
    try:  # without recipes of stages that are not known here
        ran = make_config(
            {n: v for n, v in read_values(file).items() if n in ("project", "store", *recipes)}, config.stages
        )
    except UserError as e:  # somebody edited it, or an older version of this software wrote it
        raise UserError(f"{file}, which the last run wrote, cannot be used: {e}; delete it, or run again") from None
    if (ran.project, open_store(ran.store).url) != (config.project, open_store(config.store).url):
        return config, ""
    named = make_config(resolved_values(config), config.stages)  # its local paths are absolute, as in the file
    values = [(name, flatten(getattr(ran, name)), flatten(getattr(named, name))) for name in recipes]
    differs = [f"{recipe}.{name}" for recipe, then, now in values for name in then if now.get(name) != then[name]]
    many = f" and {len(differs) - 1} more" if len(differs) > 1 else ""
    said = f"{differs[0]}{many}" if differs else ""
    return replace(config, **{name: getattr(ran, name) for name in recipes}), said


def open_as_run(source: str | Path, overrides: Sequence[str] = ()) -> Project:
    """Returns the project of ``load_as_run``, its list read. Raises UserError."""
    config = load_as_run(source, overrides)
    return project_of(config, open_store(config.store))


def open_project(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), more: Iterable[Stage] = ()
) -> Project:
    """Loads a configuration, from a file or from its values, and reads its list as ``project_of``. Raises UserError."""
    config = load_config(source, overrides, more)
    return project_of(config, open_store(config.store))


def project_of(config: Config, store: Store) -> Project:
    """Returns the project of a configuration, its list read, and stored where passes read it. Raises UserError."""
    journal = read_journal(store, config.project)
    workers = ListWorkers(config.run.source, config.run.ray)
    found = scan(config.source, store, False, journal, config.project, workers)
    return Project(config, store, build(config), found, journal)
