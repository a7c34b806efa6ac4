"""Checks, before anything is written, that Ray can do what a run asks of it, and that a CLIP that it names exists."""

from __future__ import annotations

import os
from collections.abc import Collection

from pipeline.config import Config, named_weights
from pipeline.doctor.clip_weights import find_weights
from pipeline.doctor.nodes import ask_nodes, judge, versions
from pipeline.errors import UserError
from pipeline.graph.ray import check_room, start_ray, uses_ray
from pipeline.graph.resources import Settings
from pipeline.store import Store

NAMED = 3  # nodes with the same fault


def check_ready(config: Config, store: Store, stages: Collection[str]) -> None:
    """Raises UserError where a run could not do some of these stages.

    A CLIP that they load may be nowhere, Ray may have no room for their workers, and nodes of a cluster may differ from
    this process or not see the store. Starts or joins Ray if one of the stages has workers there.
    """
    for setting, weights in named_weights(config, stages):
        find_weights(setting, weights)
    for stage in config.stages:
        if stage.ready and stage.name in stages:
            stage.ready(stage.bound(config))
    wanted = on_ray(config, stages)
    if not wanted:
        return
    ray = start_ray(config.run.ray)
    check_room(ray, wanted, config.run.ray)
    if os.environ.get("RAY_ADDRESS"):
        problems: dict[str, list[str]] = {}
        for found in judge(ask_nodes(ray, store), versions(), store):
            if found.level == "problem":
                problems.setdefault(found.advice, []).append(found.text)
        if problems:
            raise UserError("; ".join(f"{_listed(texts)}; {advice}" for advice, texts in problems.items()))


def _listed(texts: list[str]) -> str:
    """Returns the first texts only: a cluster may have a thousand nodes."""
    more = len(texts) - NAMED
    return ", ".join(texts[:NAMED]) + (f", and {more} more of that kind" if more > 0 else "")


def on_ray(config: Config, stages: Collection[str]) -> dict[str, Settings]:
    """Returns the settings of those stages that work on Ray, by stage."""
    # A list is read before anything is planned.
    asked = [stage for stage in config.stages if stage.settings and stage.name in stages and stage.kind != "source"]
    found = [stage.bound(config) for stage in asked]
    at_work = [stage for stage in found if not getattr(stage.recipe, "pretrained", False)]  # which is not trained
    return {stage.name: stage.settings for stage in at_work if uses_ray(stage.settings, config.run.ray)}
