"""The current release beside this bundle: every figure of both on the same rows, and whether they differ."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.evaluate.figure import difference, short
from pipeline.graph.artifacts import Artifact
from pipeline.graph.pointer import read_releases
from pipeline.release.compare import Change, changes, evaluations, find_comparable, load_measured, obstacles
from pipeline.report.markup import note, number, section, table, text
from pipeline.store import Store

LOOK = (
    "Every row is its own control: the difference is the mean over the same rows of this bundle's value less the "
    "release's, with its 95% interval. What differs by more than chance says so."
)
HEAD = ("figure", "release", "this bundle", "difference", "rows", "")


def release_section(store: Store, project: str, artifacts: Mapping[str, Artifact]) -> str:
    """This bundle against the project's release; "" without an evaluation, or where there is no other release."""
    if "evaluation" not in artifacts:
        return ""
    current = read_releases(store, project).current
    if current is None or current.bundle == artifacts["evaluation"].inputs["bundle"]:
        return ""
    new = load_measured(store, artifacts["evaluation"])
    found = evaluations(store, current.bundle)
    if new is None or not found:
        return section("release", "Against the release", LOOK, note(f"{current.bundle[:12]} has no evaluation here."))
    old = find_comparable(found, new)
    if old is None:
        why = f"Not compared with {current.bundle[:12]}: {', '.join(obstacles(found[0], new))}."
        return section("release", "Against the release", LOOK, note(why))
    rows = [_row(change) for change in changes(old, new)]
    said = f"<p>The release is {text(current.bundle[:12])}, this bundle {text(new.bundle.key[:12])}.</p>\n"
    return section("release", "Against the release", LOOK, said, table(HEAD, rows, numeric=(1, 2, 4)))


def _row(change: Change) -> tuple[str, ...]:
    apart = difference({"difference": change.difference, "error": None, "interval": change.interval})
    values = text(short(change.then)), text(short(change.now)), text(apart), number(change.rows)
    return f"{text(change.model)}: {text(change.name)}", *values, change.verdict
