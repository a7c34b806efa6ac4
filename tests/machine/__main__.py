"""``python -m tests.machine --seed S --minutes M``: runs programs of rules for a while, and prints those that fail.

Each failure is made as short as hypothesis can, printed as a program, and followed by the next seed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.machine.machine import BucketMachine, Machine, StrangerBucketMachine, StrangerMachine

MACHINES = {
    "folder": Machine,
    "stranger": StrangerMachine,
    "bucket": BucketMachine,
    "stranger-bucket": StrangerBucketMachine,
}
PROGRAMS = 25  # of one seed, between two looks at the clock


def main() -> int:
    """Returns 1 if any program has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.machine", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of the first programs; the next ones add one")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no more programs begin")
    parser.add_argument("--steps", type=int, default=40, help="rules of a program")
    parser.add_argument("--only", choices=MACHINES, help="one machine; by default one after another")
    asked = parser.parse_args()
    machines = [MACHINES[asked.only]] if asked.only else list(MACHINES.values())
    until, number, failed = time.monotonic() + 60 * asked.minutes, asked.seed, 0
    quiet = settings(
        max_examples=PROGRAMS,
        stateful_step_count=asked.steps,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.normal,
    )
    while time.monotonic() < until:
        for machine in machines:
            try:
                run_state_machine_as_test(seed(number)(type(machine.__name__, (machine,), {})), settings=quiet)
            except Exception as e:
                failed += 1
                print(f"--- {machine.__name__}, seed {number}", flush=True)
                traceback.print_exception(e, limit=-8)
                sys.stderr.flush()
        print(f"seed {number}: {failed} failed so far", flush=True)
        number += 1
    print(f"{(number - asked.seed) * PROGRAMS * len(machines):,} programs, {failed} of them failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
