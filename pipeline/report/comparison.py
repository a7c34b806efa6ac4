"""Compares a bundle with another one, by default with the release: samples in pairs, figures, recipes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipeline.evaluate.figure import difference, short
from pipeline.graph.artifacts import load_artifact, made_with
from pipeline.release import compare
from pipeline.release.diff import data_changes, recipes_changed, stages_behind
from pipeline.release.pointer import read_releases
from pipeline.report.evaluation import STATES
from pipeline.report.html import Section, attempt, note, template
from pipeline.report.inputs import ComparedBundle, ReportInput
from pipeline.report.samples import asked_for, sample_image, sample_names
from pipeline.store import Store

PAIRS_SHOWN = 6
LINES_SHOWN = 8
ORDER = ("worse", "better", "")  # of what is compared, by its verdict
KINDS = {"worse": False, "better": True}
COMPARISON = template("comparison.html")


def comparison_section(given: ReportInput, project: str) -> Markup:
    """Compares with ``given.other``, or else with the project's release; empty where there is nothing to compare."""
    other = find_other(given, project)
    if other is None:
        return Markup()
    parts = [
        attempt("The samples of both", _samples, given, other),
        attempt("The figures of both", _figures, given, other),
        attempt("What differs in data and recipes", _differences, given, other),
    ]
    keys = other.bundle.key[:12], given.artifacts["bundle"].key[:12]
    return Section.of(COMPARISON.comparison, "against", f"Against {other.name}", parts, other.name, *keys)


def find_other(given: ReportInput, project: str) -> ComparedBundle | None:
    """Returns the bundle to compare with; None without one, without an own bundle, or where both are the same."""
    other = given.other or (_release(given.store, project) if "evaluation" in given.artifacts else None)
    own = given.artifacts.get("bundle")
    return other if other and own and other.bundle.key != own.key else None


def _release(store: Store, project: str) -> ComparedBundle | None:
    current = read_releases(store, project).current
    bundle = load_artifact(store, "bundle", current.bundle) if current else None
    return None if bundle is None else ComparedBundle("the release", store, bundle)


def _samples(given: ReportInput, other: ComparedBundle) -> Markup:
    """Shows images of the same captions, the other bundle's to the left; equal seeds where both have them."""
    drawn = made_with(other.store, "samples", "bundle", other.bundle.key)
    if not drawn or "samples" not in given.artifacts:
        return Markup()
    theirs, ours = drawn[0], given.artifacts["samples"]
    left: dict[Any, list[str]] = defaultdict(list)
    for name in sample_names(theirs):
        left[asked_for(theirs, name)[0]].append(name)
    cells: list[tuple[str | None, list[Markup]]] = []
    for name in sample_names(ours):
        caption, seed = asked_for(ours, name)
        candidates = sorted(left[caption], key=lambda each: asked_for(theirs, each)[1] != seed) if caption else []
        if candidates and len(cells) < PAIRS_SHOWN:
            left[caption].remove(candidates[0])
            images = [
                attempt(f"{what} for: {caption}", sample_image, side, blob, 320, f"{what} for: {caption}")
                for what, side, blob in (
                    (other.name, given.of(other.store), theirs.blobs[candidates[0]]),
                    ("this bundle", given, ours.blobs[name]),
                )
            ]
            cells.append((caption, images))
    return COMPARISON.pairs(cells) if cells else note("No caption was drawn with both.")


def compared_figures(given: ReportInput, other: ComparedBundle) -> list[tuple[compare.Change, Mapping[str, Any]]] | str:
    """Returns the figures that both have on the same rows, what is worse first, each as measured now; or why none."""
    evaluation = given.artifacts.get("evaluation")
    new = compare.load_measured(given.store, evaluation) if evaluation else None
    found = compare.evaluations(other.store, other.bundle.key)
    if new is None or not found:
        return f"{other.name if new else 'this bundle'} has no evaluation here"
    old = compare.find_comparable(found, new)
    if old is None:
        return f"not measured as {other.name} was: {', '.join(compare.obstacles(found[0], new))}"
    changes = sorted(compare.changes(old, new), key=lambda change: ORDER.index(change.verdict))
    return [(change, new.figures[change.model, change.name]) for change in changes]


def _figures(given: ReportInput, other: ComparedBundle) -> Markup:
    found = compared_figures(given, other)
    if isinstance(found, str):
        return note(f"No figures are compared: {found}.")
    rows: dict[bool, list[tuple[Any, ...]]] = {True: [], False: []}
    for change, figure in found:
        state = (*STATES[KINDS.get(change.verdict)][:2], change.verdict or "no more than chance")
        numbers = short(change.now), short(change.then), difference(change.now, change.then, change.interval)
        rows[bool(change.verdict)].append((state, figure["text"], figure["says"], *numbers))
    return COMPARISON.figures(rows[True], rows[False])


def _differences(given: ReportInput, other: ComparedBundle) -> Markup:
    return COMPARISON.differences(*changes_behind(given, other), LINES_SHOWN)


def changes_behind(given: ReportInput, other: ComparedBundle) -> tuple[list[str], list[str]]:
    """Returns a line for each difference of the data behind both bundles, and of their recipes."""
    then, now = stages_behind(other.store, other.bundle), stages_behind(given.store, given.artifacts["bundle"])
    return data_changes(then, now), recipes_changed(then, now)
