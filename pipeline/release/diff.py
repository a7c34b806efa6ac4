"""Compares the lineages of two bundles: the rows of their data, and the recipes of all stages behind them."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ancestors, keys_of, load_artifact
from pipeline.graph.keys import recipe_changes
from pipeline.release.pointer import Releases
from pipeline.store import Store

Stages = dict[str, Artifact]


def find_bundle(store: Store, releases: Releases, name: str) -> Artifact:
    """Returns a bundle by its key, the beginning of its key, or "current" or "previous". Raises UserError."""
    if name in ("current", "previous"):
        move = releases.current if name == "current" else releases.previous
        if move is None:
            raise UserError(f"no {name} release exists yet; unclip release promote makes one")
        name = move.bundle
    # A key is hexadecimal; anything else would be a path.
    keys = keys_of(store, "bundle", name) if name.isalnum() else []
    if len(keys) > 1:
        raise UserError(f"{name}: {len(keys)} bundles in {store.url} have a key that begins with it; give more digits")
    found = load_artifact(store, "bundle", keys[0]) if keys else None
    if found is None:
        raise UserError(
            f"{name}: no bundle in {store.url} has a key that begins with it; name current, previous, own, or a key "
            "that unclip release list or unclip plan shows"
        )
    return found


def stages_behind(store: Store, bundle: Artifact) -> dict[str, Artifact]:
    """Returns the artefact of every stage behind a bundle, by name; of several of one stage the nearest."""
    found: dict[str, Artifact] = {}
    for artifact in ancestors(store, bundle):
        # The nearest first: a pinned model has older data behind it, one step further away than the current data.
        found.setdefault(artifact.stage, artifact)
    return found


def data_changes(then: Stages, now: Stages) -> list[str]:
    """Returns a line for each changed stage with rows: "pairs: kept 57 of 60 -> 75 of 80; http_4xx 3 -> 5"."""
    lines = []
    for name in reversed(now):  # from the source on
        if name in then and then[name].key != now[name].key and now[name].shard_table:
            before, after = then[name].ledger, now[name].ledger
            kept = f"kept {before.kept:,} of {before.rows:,} -> {after.kept:,} of {after.rows:,}"
            lost = recipe_changes(before.lost, after.lost)
            lines.append(f"{name}: {'; '.join([kept, *lost])}")
    return lines


def recipes_changed(then: Stages, now: Stages) -> list[str]:
    """Returns each recipe value that differs, as "decoder.samples 16 -> 32", and stages that only one of them has."""
    lines = []
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now:
            lines.append(f"{name} only in the {'second' if name in now else 'first'}")
        elif then[name].key != now[name].key:
            changed = recipe_changes(then[name].recipe, now[name].recipe)
            lines += [f"{name}.{change}" for change in changed]
            if not changed and then[name].inputs == now[name].inputs and then[name].inputs:
                lines.append(f"{name}: its code changed")
    return lines
