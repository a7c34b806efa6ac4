"""The plan of ``unclip plan --probe`` against the real run: seconds of every stage, predicted and actual.

The nano preset is probed and then run in a folder of its own, as configs/nano.yaml stands. With ``--store`` and
``--config`` the probe is compared with a store that is finished already and is only read. A stage's ratio is the
larger over the smaller; below a second both count as a second.
"""

import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from jobs.probe import probe
from jobs.project import open_project
from pipeline.cost.estimate import Ask, estimate
from pipeline.cost.profile import Profile, load_profile, observe

WANTED, WANTED_SHORT, SHORT = 1.5, 2.0, 60.0  # of stages that take a minute and more, and of shorter ones
LEAST = 1.0  # seconds
ROOT = Path(__file__).parents[1]
QUICK = (  # a chain whose numbers mean nothing
    *(f"{stage}.samples=64" for stage in ("clip", "diffusion_prior", "decoder")),
    *(f"{stage}.batch=32" for stage in ("clip", "diffusion_prior", "decoder")),
    'bundle.models=["diffusion_prior", "decoder"]',
    "bundle.sampling.size=64",
    "bundle.sampling.decoder_steps=2",
    "evaluation.rows=8",
    "evaluation.decoder_rows=8",
    "evaluation.caption_rows=8",
    "source.shard_rows=20",
    'run={"pairs": {"workers": 0}, "embeddings": {"workers": 0}, "curation": {"workers": 0}}',
)


def run(config: str, overrides: Sequence[str]) -> None:
    """A run as a user starts it."""
    command = [sys.executable, "-m", "jobs.run", config, *overrides, "--yes"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compare(profile: Profile, actual: Profile, ask: Ask) -> float:
    """Print every stage; return the largest ratio over what is wanted of it."""
    worst, sums = 0.0, [0.0, 0.0]
    for stage, (one, *_) in actual.stages.items():
        cost = estimate(stage, ask)
        ratio = max(cost.seconds, LEAST) / max(one.seconds, LEAST)
        ratio = max(ratio, 1 / ratio)
        wanted = WANTED if one.seconds >= SHORT else WANTED_SHORT
        worst = max(worst, ratio / wanted)
        sums = [sums[0] + cost.seconds, sums[1] + one.seconds]
        print(
            f"  {stage:16} predicted {cost.seconds:8.1f} s (start {cost.startup:5.1f}), actual {one.seconds:8.1f} s: "
            f"{ratio:.2f} of {wanted}{'' if cost.basis == 'measured' else ', ' + cost.basis}"
        )
    print(f"  {'all':16} predicted {sums[0]:8.1f} s, actual {sums[1]:8.1f} s")
    return worst


def measure(options: Namespace) -> float:
    config, overrides = options.config, list(QUICK if options.quick else ())
    with tempfile.TemporaryDirectory() as folder:
        own = [f"store={options.store or f'{folder}/store'}", f"run.output={folder}/out"]
        project = open_project(config, [*overrides, *own])
        profile = load_profile(options.profile) if options.profile else probe(project, config, [*overrides, *own])
        if not options.store:
            run(config, [*overrides, *own])
        rows = sum(shard.ledger.kept for shard in project.scan.shards)
        actual = observe(project.store, project.config.project)
        return compare(profile, actual, Ask(project.config, rows, profile))


def main() -> None:
    from benchmarks.timing import begin, finish, parser

    arguments = parser(__doc__)
    arguments.add_argument("--config", default=str(ROOT / "configs/nano.yaml"), help="of the store (configs/nano.yaml)")
    arguments.add_argument("--store", help="a finished store, such as out/emoji/store, with its --config")
    arguments.add_argument("--profile", type=Path, help="one that unclip plan --save-profile wrote, instead of a probe")
    options = arguments.parse_args()
    begin(__doc__, options)
    finish({"worst_over_bound": measure(options)})


if __name__ == "__main__":
    main()
