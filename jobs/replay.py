"""``unclip run CONFIG --replay STAGE``: says what went wrong in a step that was not finite."""

from __future__ import annotations

from jobs.project import Project
from pipeline.errors import UserError
from pipeline.graph.execute import make_context

PARAMETERS = 10  # named, at most


def replay(project: Project, stage: str) -> int:
    """Repeats the step and prints where it fails. Returns 0 if it fails again, 1 if not. Raises UserError."""
    project.wanted(stage, None)
    node = project.graph[stage]
    if node.kind != "training":
        raise UserError(f"--replay {stage}: only a training has steps")
    key = next(verdict.key for verdict in project.plan() if verdict.stage == stage)
    ctx = make_context(node, key, project.made(*node.inputs), project.store, project.config)
    from pipeline.training.replay import replay as replay_step

    found = replay_step(ctx)
    if found is None:
        raise UserError(f"--replay {stage}: with this list and recipe no step of it has failed")
    print(f"{stage}: the step after sample {found.samples:,}")
    if not found.repeated:
        print("everything is finite here: on another device, or with other numbers of workers, rounding differs")
        return 1
    for row, loss in found.rows:
        print(f"  row {row}: loss {loss}")
    if found.module:
        print(f"  the first output that is not finite comes from {found.module}")
    for name in found.parameters[:PARAMETERS]:
        print(f"  the gradient of {name} is not finite")
    if len(found.parameters) > PARAMETERS:
        print(f"  and of {len(found.parameters) - PARAMETERS:,} more parameters")
    return 0
