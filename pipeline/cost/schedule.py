"""Says how long stages take together, of which trainings run side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.cost.estimate import Cost, PlanInput, training_team
from pipeline.graph.resources import WorkerGroup
from pipeline.graph.stages import seconds_to_end


def elapsed(costs: Mapping[str, Cost], ask: PlanInput) -> float:
    """Returns the seconds until all these stages are made, in the order of pipeline.graph.execute.

    Trainings whose inputs are there run side by side where there is room, those with the longest way to the end first;
    of all other stages one runs at a time, and nothing begins beside it.
    """
    teams = {stage: training_team(stage, ask) for stage in costs}
    left = seconds_to_end(ask.graph, {stage: cost.seconds for stage, cost in costs.items()})
    todo = sorted((stage for stage in ask.graph if stage in costs), key=lambda stage: -left[stage])
    now, made, running = 0.0, set[str](), dict[str, float]()
    while todo or running:
        ready = [stage for stage in todo if costs.keys() & set(ask.graph[stage].inputs) <= made]
        alone = [stage for stage in ready if not teams[stage]]
        if all(teams[stage] for stage in running):
            for stage in alone[:1] or ready:
                beside = [team for name in (*running, stage) if (team := teams[name])]
                if alone or not running or _room(beside, ask):
                    todo.remove(stage)
                    running[stage] = now + costs[stage].seconds
        ended = min(running, key=running.__getitem__)
        now = running.pop(ended)
        made.add(ended)
    return now


def _room(teams: Sequence[WorkerGroup], ask: PlanInput) -> bool:
    """Returns whether trainings have room at once."""
    cpus, gpus = (sum(getattr(team.worker, what) * team.count for team in teams) for what in ("cpus", "gpus"))
    there = replace(ask.machine, gpus=ask.fleet.count, grows=False) if ask.fleet else ask.machine
    return there.grows or (cpus <= there.cpus and gpus <= there.gpus)
