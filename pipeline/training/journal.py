"""The journal of a training: metrics of its steps and validation passes, and what is said of one that diverged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.records import SavedJournal


@dataclass
class MetricsJournal:
    """Holds a training's metrics as JSON lines, without times, so that equal trainings have equal journals.

    The next training line is the mean of ``sums`` over ``steps``. Sums stay on the device, so adding does not wait.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    steps: int = 0

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Adds one step's values, each fp64 []."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def flush(self, samples: int) -> None:
        """Adds a line with the mean since the last line."""
        self.lines.append({"samples": samples, **{name: float(s) / self.steps for name, s in self.sums.items()}})
        self.sums, self.steps = {}, 0

    def saved(self) -> SavedJournal:
        """Returns the fields as a checkpoint's record holds them."""
        return SavedJournal(self.lines, {name: float(s) for name, s in self.sums.items()}, self.steps)

    @staticmethod
    def of(saved: SavedJournal) -> MetricsJournal:
        """Returns the journal that a checkpoint's record holds."""
        return MetricsJournal(list(saved.lines), dict(saved.sums), saved.steps)

    def latest(self) -> dict[str, Any]:
        """Returns the latest value of every metric."""
        merged = {name: value for line in self.lines for name, value in line.items()}
        return {name: value for name, value in merged.items() if name not in ("samples", "preview")}

    def loss_note(self) -> str:
        """Returns what a progress line shows: the mean loss since the last line, or that of the line."""
        if self.steps:
            return f"loss {float(self.sums['loss']) / self.steps:.4g}"
        return next((f"loss {line['loss']:.4g}" for line in reversed(self.lines) if "loss" in line), "")

    def has_validation(self, samples: int) -> bool:
        """Returns whether a validation pass was made at these samples: a resumed training does not repeat it."""
        return any(line["samples"] == samples and "validation_rows" in line for line in self.lines)

    def previews(self) -> dict[str, str]:
        """Returns the blobs of previews by their names in an artefact; "preview.png" is the last."""
        found = {f"previews/{line['samples']:012d}.png": line["preview"] for line in self.lines if "preview" in line}
        return found | ({"preview.png": list(found.values())[-1]} if found else {})

    def text(self) -> bytes:
        """Returns the lines as the bytes of a file."""
        return "".join(json.dumps(line, sort_keys=True) + "\n" for line in self.lines).encode()


class Step(NamedTuple):
    """Holds what is known of a step until it is checked.

    Attributes:
        samples: Samples seen before it.
        keys: Keys of this worker's rows.
        losses: Losses of these rows, [rows].
        finite: Flag, [] of bool: the loss and the gradient of the global batch are finite.
    """

    samples: int
    keys: list[str]
    losses: Tensor
    finite: Tensor


def check_finite(stage: str, steps: Sequence[Step], group: ProcessGroup) -> None:
    """Raises UserError for the first of these steps that was not finite; all workers have to call it together."""
    finite = torch.stack([step.finite for step in steps]).tolist()
    if all(finite):
        return
    step = steps[finite.index(False)]
    of_rows = zip(step.keys, step.losses.isfinite().tolist(), strict=True)
    bad = group.collect([key for key, fine in of_rows if not fine])
    rows = f"the loss of rows {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}" if bad else "the gradient"
    remedy = "lower learning_rate, raise warmup_steps or set clip_norm"
    raise UserError(f"{stage}: {rows} is not finite after sample {step.samples:,}; {remedy}")
