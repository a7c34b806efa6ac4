"""Says what stages take of hundreds of millions of pairs, by arithmetic from what ``benchmarks.billion`` measured."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

from pipeline.data.curation.near_rows import GROUP_ROWS
from pipeline.data.embeddings.stage import TASK_BYTES
from pipeline.data.neighbours.work import MAX_CLUSTERS, PROBES, comparisons
from pipeline.data.pairs.stage import ROW_SECONDS
from pipeline.data.source.stage import SEGMENT_SHARDS

Constants = dict[str, dict[str, float]]
"""Measured values by part and size, such as "near 400000"."""

ROWS = (650_000_000, 5_000_000_000)  # of the lists that are simulated
SHARD_ROWS = 10_000
FETCHERS, WORKERS = 256, 64  # of the fetch, and of each other stage of rows
HEAD_BYTES, WORKER_BYTES = 16 << 30, 4 << 30  # run.kubernetes: of the head, and a core's share of a pod
MONTH_S = 30 * 86_400.0
WIDTH, SIDE = 768, 224  # of CLIP ViT-L/14


@dataclass(frozen=True)
class Simulation:
    """What stages take of a list of some size, by what was measured at sizes that this machine bears."""

    known: Constants

    def _of(self, part: str) -> list[tuple[int, dict[str, float]]]:
        """Returns the constants of a part by rising size."""
        found = {key.partition(" ")[2]: values for key, values in self.known.items() if key.partition(" ")[0] == part}
        if not found:
            raise SystemExit(f"nothing was measured of {part}: python -m benchmarks.billion --part {part}")
        return sorted((int(size), values) for size, values in found.items())

    def _last(self, part: str) -> dict[str, float]:
        """Returns the constants of a part at the largest size."""
        return self._of(part)[-1][1]

    def _slope(self, part: str, name: str) -> tuple[float, float]:
        """Returns what a constant is at size 0, and by how much it grows with the size."""
        (low, first), *_, (high, last) = self._of(part)
        slope = max(0.0, last[name] - first[name]) / (high - low)
        return max(0.0, first[name] - slope * low), slope

    def fetch_seconds(self, rows: float) -> float:
        """Returns the seconds of all fetchers: each as fast as the web lets it be, or as its core decodes."""
        web = self._last("web")
        return rows * max(web["kept"] / web["images_per_second"], ROW_SECONDS) / FETCHERS

    def near_seconds(self, rows: float) -> float:
        """Returns the seconds of all workers that look for near-duplicates."""
        wide = self._last("wide")
        pairs = wide["nanoseconds_a_pair"] * comparisons(rows)
        return rows * 1e-6 * (wide["microseconds_a_row"] + pairs / 1e3) / WORKERS

    def near_bytes(self, rows: float) -> float:
        """Returns the bytes that a worker holds of a group of clusters: twice, while its columns are joined."""
        groups = min(MAX_CLUSTERS, -(-rows // GROUP_ROWS))
        each = 8 + 1 + 1 + 2 * WIDTH + 4 + 4 * PROBES + 4  # a row's key, split, size, vector, home, probes, range
        return 2 * each * (1 + PROBES) * rows / groups

    def stream_seconds(self, rows: float) -> float:
        """Returns the seconds of Ray's driver for embeddings."""
        return rows / min(SHARD_ROWS, TASK_BYTES // (3 * SIDE**2)) * 1e-3 * self._last("driver")["milliseconds_a_part"]

    def shard_seconds(self, rows: float) -> float:
        """Returns the seconds of Ray's driver for the shards of a stage."""
        return rows / SHARD_ROWS * 1e-3 * self._last("driver")["milliseconds_a_shard"]

    def driver_bytes(self, rows: float) -> float:
        """Returns the bytes of the driver: of lists of shards, and of the tasks that find near-duplicates."""
        (held, shard), (_, row) = self._slope("records", "driver_bytes"), self._slope("passes", "driver_bytes")
        return held + rows * (shard / SHARD_ROWS + row)

    def start_seconds(self, rows: float) -> float:
        """Returns the seconds until a worker of a training knows its rows."""
        first, shard = self._slope("records", "start_seconds")
        return first + shard * rows / SHARD_ROWS

    def limits(self) -> dict[str, float]:
        """Returns the rows from which on a limit is passed, the first one first."""
        reached: dict[str, Callable[[float], float]] = {
            "near_duplicates_take_a_month": lambda rows: self.near_seconds(rows) / MONTH_S,
            "near_duplicates_fill_a_worker": lambda rows: self.near_bytes(rows) / WORKER_BYTES,
            "fetch_takes_a_month": lambda rows: self.fetch_seconds(rows) / MONTH_S,
            "embeddings_keep_the_driver_a_month": lambda rows: self.stream_seconds(rows) / MONTH_S,
            "tasks_fill_the_head": lambda rows: self.driver_bytes(rows) / HEAD_BYTES,
            "shards_of_one_list_are_used_up": lambda rows: rows / SEGMENT_SHARDS / SHARD_ROWS,
            "a_training_starts_for_ten_minutes": lambda rows: self.start_seconds(rows) / 600,
        }
        found = {name: _least(passed) for name, passed in reached.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def growth(self) -> dict[str, float]:
        """Returns how near-duplicates grow: the exponent of time, and requests and objects a row, last over first.

        Those of "passes" are of longer lists.
        """
        sizes, found = zip(*self._of("near"), strict=True)
        passes = [counted["requests_a_row"] for _, counted in self._of("passes")]
        slope = np.polyfit([log(rows) for rows in sizes], [log(one["seconds"]) for one in found], 1)[0]
        return {
            "near_exponent": float(slope),
            "near_requests_last_over_first": found[-1]["requests_a_row"] / found[0]["requests_a_row"],
            "near_objects_last_over_first": found[-1]["objects_a_row"] / found[0]["objects_a_row"],
            "passes_requests_last_over_first": passes[-1] / passes[0],
        }

    def figures(self) -> dict[str, float]:
        """Returns hours, requests and memory at each size, and where limits are passed."""
        found = self.growth()
        for rows, counted in self._of("passes"):
            for name in ("requests", "objects"):
                found[f"near_{name} {rows}"] = counted[f"{name}_a_row"] * rows
        for rows in ROWS:
            for name, value in {
                "fetch_hours": self.fetch_seconds(rows) / 3600,
                "near_hours": self.near_seconds(rows) / 3600,
                "near_worker_bytes": self.near_bytes(rows),
                "embeddings_driver_hours": self.stream_seconds(rows) / 3600,
                "shards_driver_hours": self.shard_seconds(rows) / 3600,
                "driver_bytes": self.driver_bytes(rows),
                "start_seconds": self.start_seconds(rows),
            }.items():
                found[f"{name} {rows}"] = value
        return found | {f"{name}_from": rows for name, rows in self.limits().items()}


def _least(passed: Callable[[float], float]) -> float:
    """Returns the least number of rows at which a rising function is 1 or more; 10^15 if it is none before."""
    low, high = 1.0, 1e15
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if passed(middle) >= 1 else (middle, high)
    return high
