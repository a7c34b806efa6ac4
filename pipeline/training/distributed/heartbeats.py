"""Finds out which workers of a training stand still, and which one the others wait for. Imports neither Ray nor torch.

Each worker's ``Pulse`` notes how far it is. A thread of it tells ``Heartbeats``, which lives in a process of its own
beside the driver, so that one worker's hang, or its machine's, hides nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

STILL_S = 120.0  # without progress of any worker, or ten times as long as the slowest part of a step, if that is more
SLACK = 10
BEAT_S = 5.0  # between two beats of a worker
SILENT_S = 30.0  # after which a worker's process does not answer any more
WINDOW_STEPS, WINDOW_S = 20, 30.0  # of which means are told: timed steps, and as long as that takes at least
SLOW = 0.2  # share of each step for which the others wait, from which a worker is called slow
BETWEEN, DONE = "between steps", "done"
# What a worker does after a part of a step that it has timed.
NEXT = {
    "start": "waiting for its batch",
    "wait": "in its forward pass",
    "forward": "in its backward pass",
    "backward": "in its optimiser",
    "optimiser": "in its average",
    "ema": "at the end of a step",
}


class Beat(NamedTuple):
    """Holds what a worker tells of itself.

    Attributes:
        size: Number of workers.
        node: Ray's id of its machine.
        host: Address of its machine.
        doing: Part of a step that it is in.
        marks: Parts of steps that it has ended. All workers end the same ones.
        steps: Steps that it has ended.
        idle_s: Seconds since the last mark.
        longest_s: Seconds of the slowest part of a step so far, without the first step.
        own_s: Seconds of a step, on average, that it takes before it waits for others; None before enough are timed.
        step_s: Seconds of a whole step, on average.
    """

    size: int
    node: str
    host: str
    doing: str
    marks: int
    steps: int
    idle_s: float
    longest_s: float
    own_s: float | None = None
    step_s: float = 0.0


class Pulse:
    """Notes how far the thread that trains has come.

    Args:
        alone: Parts of a step in which a worker waits for no other.
    """

    def __init__(self, alone: tuple[str, ...] = ("wait", "forward")):
        self.alone = alone
        self.doing, self.marks, self.steps, self.at, self.longest_s = BETWEEN, 0, 0, time.monotonic(), 0.0
        self._sums: dict[str, float] = {}
        self._timed, self._since = 0, self.at
        self._means: tuple[float | None, float] = (None, 0.0)

    def mark(self, part: str) -> None:
        """Notes that a part of a step has ended, or with BETWEEN or DONE that the steps have."""
        now = time.monotonic()
        if self.steps and self.doing != BETWEEN:
            self.longest_s = max(self.longest_s, now - self.at)
        self.doing, self.at, self.marks = NEXT.get(part, part), now, self.marks + 1
        self.steps += part == "ema"

    def add(self, part: str, seconds: float) -> None:
        """Adds what a part of a step took that was timed."""
        self._sums[part] = self._sums.get(part, 0.0) + seconds
        if part != "ema":
            return
        self._timed += 1
        if self._timed >= WINDOW_STEPS and self.at - self._since >= WINDOW_S:
            own = sum(self._sums.get(name, 0.0) for name in self.alone)
            self._means = (own / self._timed, sum(self._sums.values()) / self._timed)
            self._sums, self._timed, self._since = {}, 0, self.at

    def beat(self, size: int, node: str, host: str) -> Beat:
        """Returns what is told of this worker now."""
        idle = time.monotonic() - self.at
        return Beat(size, node, host, self.doing, self.marks, self.steps, idle, self.longest_s, *self._means)


class Hung(NamedTuple):
    """Says that a training stands still: why, and at which machines, by Ray's id, if it is not all of them."""

    why: str
    hosts: Mapping[str, str]


class Slow(NamedTuple):
    """Says which worker the others wait for, and for which share of each step."""

    rank: int
    host: str
    share: float


class Heartbeats:
    """Holds the latest beat of each worker, and judges them together."""

    def __init__(self, still_s: float = STILL_S):
        self.still_s = still_s
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._hung: Hung | None = None

    def beat(self, rank: int, beat: Beat) -> str:
        """Takes a beat; returns why the worker has to end, "" where it goes on."""
        now = time.monotonic()
        self._beats[rank] = (beat, now)
        self._hung = self._hung or hung(self._latest(), self.still_s, now)
        return self._hung.why if self._hung else ""

    def hung(self) -> Hung | None:
        """Returns what the training was ended for."""
        return self._hung

    def slow(self) -> Slow | None:
        """Returns the worker that all others wait for, if there is one."""
        return slow({rank: beat for rank, (beat, _) in self._latest().items()})

    def host(self, rank: int) -> dict[str, str]:
        """Returns the machine of a worker by Ray's id; {} where it never told, or all workers are there."""
        if rank not in self._beats or len({beat.node for beat, _ in self._beats.values()}) == 1:
            return {}
        beat, _ = self._beats[rank]
        return {beat.node: beat.host}

    def _latest(self) -> dict[int, tuple[Beat, float]]:
        """Returns the beats of the latest group of workers; {} until all of them have told something."""
        size = max(self._beats.values(), key=lambda beat: beat[1])[0].size if self._beats else 0
        found = {rank: beat for rank, beat in self._beats.items() if rank < size and beat[0].size == size}
        return found if len(found) == size else {}


def hung(beats: Mapping[int, tuple[Beat, float]], still_s: float, now: float) -> Hung | None:
    """Returns why workers are to be ended, by their beats and when these came; None where they go on.

    The first step, in which layers are compiled, may take as long as the process group waits, and so may what rank 0
    does between steps.
    """
    awake = {rank: beat for rank, (beat, came) in beats.items() if now - came < SILENT_S}
    if not awake or any(beat.doing in (BETWEEN, DONE) or not beat.steps for beat in awake.values()):
        return None
    latest = [beat for beat, _ in beats.values()]
    if any(beat.doing == DONE for beat in latest):
        return None
    idle = min(beat.idle_s + now - beats[rank][1] for rank, beat in awake.items())
    if idle < max(still_s, SLACK * max(beat.longest_s for beat in latest)):
        return None
    behind = sorted(beats.keys() - awake.keys())
    if not behind:
        least = min(beat.marks for beat in latest)
        behind = [rank for rank, (beat, _) in beats.items() if beat.marks == least]
    named = [beats[rank][0] for rank in behind]
    what = f"no progress for {idle:.0f} s after {max(beat.steps for beat in latest):,} steps"
    if len(behind) == len(beats) > 1:
        return Hung(f"{what}: all workers are {named[0].doing}, as when a network or a GPU hangs", {})
    first, beat = behind[0], named[0]
    how = "does not answer" if first not in awake else f"stands {beat.doing}"
    more = f", and {len(behind) - 1} more" if len(behind) > 1 else ""
    hosts = {beat.node: beat.host for beat in named}
    others = {beat.node for rank, (beat, _) in beats.items() if rank not in behind}
    return Hung(f"{what}: worker {first} on {beat.host} {how}{more}", hosts if others - hosts.keys() else {})


def slow(beats: Mapping[int, Beat]) -> Slow | None:
    """Returns the worker that takes longest before it waits for others, if that costs these enough of each step."""
    told = {rank: beat.own_s for rank, beat in beats.items() if beat.own_s is not None}
    if len(told) < max(2, len(beats)):
        return None
    rank = max(told, key=lambda rank: told[rank])
    share = (told[rank] - statistics.median(own for other, own in told.items() if other != rank)) / beats[rank].step_s
    return Slow(rank, beats[rank].host, share) if share > SLOW else None
