"""Runs one trial of a recipe and adds its line to the record: ``python -m benchmarks.recipes TRIAL.yaml --store DIR``.

Trains one model of a configuration for a fixed budget of processor seconds, in this process and without Ray, and
measures it on validation rows. What the training reads and the store lacks is made first, outside the budget.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipes.record import LOG, PAGE, check_new, page, read_log, write_line
from benchmarks.recipes.trial import describe, read_trial, run
from pipeline.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("trial", nargs="?", help="a YAML file; see docs/recipes.md")
    parser.add_argument("--store", help="the folder of the store that has, or is to have, the rows")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (0)")
    parser.add_argument("--judge", help="a CLIP's folder, made by the trial judge.yaml; it looks at drawn images")
    parser.add_argument("--prior", help="a prior's folder; a decoder draws from captions through it")
    parser.add_argument("--decoder", help="a decoder's folder; it draws what a prior makes of captions")
    parser.add_argument("--save", help="a new folder for the trained model")
    parser.add_argument("--held-out", action="store_true", help="measure on test rows too: only what was chosen")
    parser.add_argument("--log", type=Path, default=LOG, help="the record (benchmarks/recipes/log.jsonl)")
    parser.add_argument("--table", action="store_true", help="write the tables of docs/recipes.md from the record")
    options = parser.parse_args(argv)
    if options.table:
        PAGE.write_text(page(PAGE.read_text(), read_log(options.log)))
        return 0
    if not options.trial or not options.store:
        parser.error("give a trial and --store, or --table")
    trial = read_trial(options.trial)
    if options.save and Path(options.save).exists() and any(Path(options.save).iterdir()):
        raise UserError(f"{options.save} is not empty: name a new folder for the model")
    partners = {name: folder for name in ("judge", "prior", "decoder") if (folder := getattr(options, name))}
    check_new(read_log(options.log), describe(trial, partners), options.seed)
    line = run(trial, options.store, options.seed, partners, options.save, options.held_out)
    write_line(options.log, line)
    for name, (value, low, high) in line["figures"].items():
        print(f"{name:40} {value:10.4f}   {low:.4f} to {high:.4f}")
    return 0


if __name__ == "__main__":
    from jobs.cli import guard

    sys.exit(guard(main, sys.argv[1:]))
