"""Real faults, slice after slice: ``make chaos N=50 SEED=1 OF=data``, or of trainings.

A slice strikes once, at a moment that its seed draws. Slices that are done are not done again: what they found is in
FOLDER/OF-seed-SEED/slices.jsonl, a line each. The last line that is printed is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos import data, training

KINDS: dict[str, Any] = {"data": data, "training": training}


def main() -> int:
    options = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--of", choices=KINDS, default="data", help="which stages (data)")
    options.add_argument("--slices", type=int, default=50, help="how many, from the first (50)")
    options.add_argument("--seed", type=int, default=1, help="what they draw from (1)")
    options.add_argument("--folder", type=Path, default=Path("out/chaos"), help="where they work (out/chaos)")
    options.add_argument("--seconds", type=float, default=float("inf"), help="begin no slice after so many")
    chosen = options.parse_args()
    began = time.monotonic()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    kind = KINDS[chosen.of]
    folder = chosen.folder.resolve() / f"{chosen.of}-seed-{chosen.seed}"
    reference = kind.run_reference(folder / "reference")
    ledger = folder / "slices.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    print(f"{'slice':>5}  {'fault':20}{'stage':16}{'after':>6}  {'exit':>4}{'seconds':>8}  what happened")
    for row in done[: chosen.slices]:
        show(row)
    for number in range(len(done), chosen.slices):
        if time.monotonic() - began > chosen.seconds:
            break
        planned, draw = kind.plan(number, chosen.seed, reference)
        row = asdict(planned) | {"failure": ""}
        try:
            row |= kind.run_slice(planned, draw, reference, folder / f"slice-{number}")
        except (AssertionError, subprocess.TimeoutExpired) as e:  # its folder stays, to be looked at
            row |= {"what": "FAILED", "exit": -1, "seconds": 0.0, "failure": str(e)[-2000:]}
        done.append(row)
        with open(ledger, "a") as f:
            f.write(json.dumps(row) + "\n")
        show(row)
    done = done[: chosen.slices]
    failed = [row["number"] for row in done if row["failure"]]
    faults = Counter(row["fault"] for row in done)
    print(json.dumps({"slices": len(done), "of": chosen.slices, "failed": failed, "faults": faults}))
    return 1 if failed else 0


def show(row: dict[str, object]) -> None:
    print(
        f"{row['number']:5}  {row['fault']:20}{row['stage']:16}{row['after']:6}  {row['exit']:4}{row['seconds']:8}  "
        f"{row['what']}{row['failure']}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
