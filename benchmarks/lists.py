"""Measures what a list of many files takes: a row, the process that opens it, and opening it again.

Parquet files of URLs and captions as LAION has them; one row in twenty names the image of an earlier one. The whole
list as one task of this process, and in the passes that workers share: both must cut the same shards. Then on two
workers of Ray, for the memory of the driver. On S3 (SeaweedFS on this machine) a list of many small files: to open it
again, and with a file more. Then the record of a list of 650 million rows. Each case is a process of its own; a row's
time is that of a core, so that other work on the machine hardly counts. Linux only.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.timing import begin, finish, parser
from pipeline.data.source import passes
from pipeline.data.source.passes import ListWorkers
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.segments import Segment, SourceShard, segment_path
from pipeline.data.source.stage import scan
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import open_store
from pipeline.store.records import create_record, digest, read_record
from tests.seaweed import serving

AGAIN = 20  # one row of so many names the image of another
SHARD_ROWS = 10_000
ROWS, WORKERS = 650_000_000, 64  # of the list and of the cluster that are computed
CASES = {"once": 0, "passes": 0, "ray": 2, "open": 0, "record": 0}  # workers of Ray


def make_table(first: int, rows: int) -> pa.Table:
    """Returns rows [first, first + rows) of the list: URLs of some 60 characters, captions of ten words."""
    rng = np.random.default_rng(first)
    images = [i if i % AGAIN else int(rng.integers(0, i + 1)) for i in range(first, first + rows)]
    urls = [f"https://host{i * 7919 % 100_003}.example.org/images/{i:012d}.jpg" for i in images]
    captions = [" ".join(f"word{word}" for word in words) for words in rng.integers(0, 5000, (rows, 10))]
    return pa.table({"url": urls, "caption": captions})


def measure(case: str, path: str, store: str, task_bytes: int) -> dict[str, float | str]:
    """Returns the seconds of a case, by the clock and of a core, the peak memory of its process, and keys."""
    passes.TASK_BYTES = task_bytes
    workers = ListWorkers(ShardSettings(CASES[case]), RaySettings(cpus=CASES[case] or 2))
    if case == "ray":
        from pipeline.graph.ray import start_ray

        start_ray(workers.ray)
    began, before = time.monotonic(), os.times()
    if case == "record":
        where, shard = open_store(store), digest("shard")
        ends: dict[str, Any] = {
            "held_out": {"test": 199, "validation": 201},
            "captioned": 9990,
            "lengths": {"100": 9000, "200": 1000},
        }
        made = SourceShard(
            0, shard, shard, Ledger(SHARD_ROWS - 500, {"duplicate_url": 500}), **ends, refs=shard, captions=shard
        )
        segment = Segment(
            [SourceShard(**{**vars(made), "number": i}) for i in range(ROWS // SHARD_ROWS)], [shard] * 78, [78]
        )
        create_record(where, segment_path(shard), segment)
        began = time.monotonic()
        read_record(where, segment_path(shard), Segment)
        keys = ""
    else:
        keys = scan(
            SourceRecipe((path,), shard_rows=SHARD_ROWS), open_store(store), case != "open", workers=workers
        ).keys["source"]
    after = os.times()
    cores = sum(
        getattr(after, name) - getattr(before, name) for name in ("user", "system", "children_user", "children_system")
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.monotonic() - began, "core_seconds": cores, "peak_mb": peak, "keys": keys}


def child(case: str, path: object, store: object, task_bytes: int = 1 << 40) -> dict[str, Any]:
    """Returns what ``measure`` does in a process of its own, and prints it."""
    command = [sys.executable, "-m", "benchmarks.lists", "--case", case, str(path), str(store), str(task_bytes)]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(
        f"  {case:8} {said['seconds']:8.1f} s, {said['core_seconds']:8.1f} of a core, peak {said['peak_mb']:6.0f} MB",
        flush=True,
    )
    return said


def main() -> None:
    """Runs the benchmark."""
    if sys.argv[1:2] == ["--case"]:
        case, path, store, task_bytes = sys.argv[2:]
        print(json.dumps(measure(case, path, store, int(task_bytes))))
        return
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=4_000_000, help="rows of the list (4,000,000)")
    chosen = options.parse_args()
    begin(__doc__, chosen)
    rows, files, small = (20_000, 8, 20) if chosen.quick else (chosen.rows, 200, 10_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "lists")
        folder.mkdir()
        for number in range(files):
            pq.write_table(make_table(number * rows // files, rows // files), folder / f"{number:05d}.parquet")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"  {rows:,} rows in {files} Parquet files of {size / 2**20:,.0f} MiB")
        tasks = min(passes.TASK_BYTES, size // 4)
        once = child("once", folder, f"{name}/once")
        shared, on_ray = (child(case, folder, f"{name}/{case}", tasks) for case in ("passes", "ray"))
        assert once["keys"] == shared["keys"] == on_ray["keys"], "the passes cut other shards"
        record = child("record", folder, f"{name}/record")
        server_folder = Path(name, "s3")
        server_folder.mkdir()
        with serving(server_folder) as server:
            os.environ.update(server.environment)
            there, store, path = open_store(f"{server.url}/lists"), f"{server.url}/store", f"{server.url}/lists/"
            for number in range(small + 1):
                if number == small:
                    child("once", path, store)
                    again = child("open", path, store)
                data = pa.BufferOutputStream()
                pq.write_table(make_table(number * 100, 100), data)
                there.create(f"{number:06d}.parquet", data.getvalue().to_pybytes())
            appended = child("once", path, store)
    row = shared["core_seconds"] / rows
    # Two passes read a piece of each task for each range by two requests.
    requests = 4 * ceil(ROWS * size / rows / passes.TASK_BYTES) * ceil(ROWS / passes.RANGE_HASHES)
    finish(
        {
            "rows_per_core_second_in_one_task": rows / once["core_seconds"],
            "rows_per_core_second_in_passes": 1 / row,
            "driver_mb_in_one_task": once["peak_mb"],
            "driver_mb_on_ray": on_ray["peak_mb"],
            f"seconds_to_open_{small}_files": again["seconds"],
            "seconds_to_append_one": appended["seconds"],
            "650M_minutes_on_64_workers": ROWS * row / WORKERS / 60,
            "650M_requests": requests,
            "650M_record_mb": record["peak_mb"],
            "650M_record_seconds": record["seconds"],
        }
    )


if __name__ == "__main__":
    main()
