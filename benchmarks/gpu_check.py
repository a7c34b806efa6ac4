"""Checks a GPU: that it computes what a CPU does, that nothing waits, and how fast each stage is on it.

Eleven parts, each of which prints a line and PASS, FAIL or SKIP. No data and no network is needed: rows are made up or
drawn, and weights are random. ``--json`` writes what was found; ``unclip plan --profile FILE`` plans with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from time import perf_counter

from benchmarks.gpu.bench import Bench, Outcome, Skipped
from benchmarks.gpu.image import image
from benchmarks.gpu.machine import device_name, machine, peaks
from benchmarks.gpu.parity import parity
from benchmarks.gpu.peers import peers
from benchmarks.gpu.run import chain
from benchmarks.gpu.several import several
from benchmarks.gpu.steps import speed, waits
from benchmarks.gpu.storing import checkpoint, feed
from benchmarks.timing import commit
from pipeline.errors import UserError
from pipeline.graph.device import choose_device

PARTS: tuple[tuple[str, Callable[[Bench], Outcome]], ...] = (
    ("machine", machine),
    ("peaks", peaks),
    ("parity", parity),
    ("waits", waits),
    ("training", speed),
    ("peers", peers),
    ("feed", feed),
    ("checkpoint", checkpoint),
    ("image", image),
    ("several", several),
    ("run", chain),
)
PRESETS = ("small", "karlo", "paper")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu (cuda)")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="whose speed counts (small)")
    parser.add_argument("--quick", action="store_true", help="nano sizes: only crashes and parity mean something")
    parser.add_argument("--compile", action="store_true", help="also compile every network, which takes minutes")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="also train on N GPUs of this machine (1)")
    parser.add_argument("--part", type=int, action="append", metavar="N", help="only this part, and others named so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, and the image beside it")
    return parser.parse_args(argv)


def check(bench: Bench, number: int, name: str, part: Callable[[Bench], Outcome]) -> dict[str, object]:
    """Runs one part, prints its line, and returns what it found."""
    began = perf_counter()
    try:
        outcome = part(bench)
        result = "FAIL" if outcome.failures else "PASS"
    except Skipped as e:
        outcome, result = Outcome(str(e)), "SKIP"
    except Exception as e:  # one part's crash must not hide what the others find
        traceback.print_exc()
        failure = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        outcome, result = Outcome("it broke off", failures=[failure]), "FAIL"
    seconds = perf_counter() - began
    print(f"{number:2} {name:10} {result}  {outcome.line} ({seconds:.0f} s)", flush=True)
    for failure in outcome.failures:
        print(f"     {failure}", flush=True)
    bench.free()
    return {"part": name, "result": result, "seconds": seconds, **asdict(outcome)}


def summary(found: Sequence[Mapping[str, object]]) -> str:
    """Returns how many parts passed, and which failed and were skipped: a skipped part has not passed."""
    named = {result: [str(each["part"]) for each in found if each["result"] == result] for result in ("FAIL", "SKIP")}
    line = f"{len(found) - len(named['FAIL']) - len(named['SKIP'])} of {len(found)} passed"
    for result, said in (("FAIL", "failed"), ("SKIP", "skipped")):
        line += f"; {said}: {', '.join(named[result])}" if named[result] else ""
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 1 if one fails."""
    options = arguments(argv)
    try:
        device = choose_device(options.device)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    bench = Bench(device, "nano" if options.quick else options.preset, options.quick, options.compile, options.gpus)
    chosen = [(n, *part) for n, part in enumerate(PARTS, 1) if not options.part or n in options.part]
    found = [check(bench, *part) for part in chosen]
    document = {
        "device": device_name(bench),
        "kind": device.type,
        "preset": bench.preset,
        "commit": commit(),
        "date": f"{date.today()}",
        "parts": found,
        "profile": bench.profile,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
        if bench.png:
            options.json.with_suffix(".png").write_bytes(bench.png)
    print(summary(found))
    return 1 if any(each["result"] == "FAIL" for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
