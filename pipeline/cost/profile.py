"""What stages took where they were made: observations, read from artefacts or from a file, and lines through them.

A profile says seconds = start + work / workers, with work a line in the amount: rows, samples, or passes through the
networks. What workers and trainings record of their own time tells the part that grows from the part that does not,
so one observation is enough; with several the line goes through all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.prior_configs import ASKED
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.runs import last_run
from pipeline.held_out import FEWEST
from pipeline.sampling.bundle import MODELS
from pipeline.store import Store
from pipeline.store.records import read_blob

FORMAT = 1
COUNTED = ("samples", "evaluation")  # stages whose amount is passes through networks
ROWS_OF = {"priors": "rows", "decoder": "decoder_rows"}
ROWS_OF |= {name: f"{name}_rows" for name in ("upsampler_256", "upsampler_1024")}  # field by part of an evaluation
SHAPED_BY = {"embeddings": ("clip",)}  # stages whose speed hangs on models that other stages make
PICTURES = ("image_size", "encode_format")


@dataclass(frozen=True)
class Observation:
    """One time that a stage was made.

    ``amount`` of rows or samples; ``passes`` through each network instead, where networks draw. ``short``: held-out
    rows, by part of an evaluation and for each row of the list, where there were fewer than it asked for. ``seconds``
    from its beginning to its record, of which ``work`` / ``workers`` grew with the amount: ``work`` counts all workers'
    seconds, and ``steps`` parts of them by name. ``shards`` that were made, and ``disk``, the bytes of all blobs.
    ``requests`` as in an artefact. ``shape`` is what else the speed hangs on: another model is another stage.
    ``utilisation``: see pipeline.training.timing.
    """

    amount: float
    seconds: float
    work: float
    workers: int
    shape: Mapping[str, Any]
    passes: Mapping[str, float] = field(default_factory=dict)
    short: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    shards: int = 0
    disk: float = 0.0
    requests: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    utilisation: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Observations by stage."""

    stages: Mapping[str, Sequence[Observation]] = field(default_factory=dict)

    def of(self, stage: str, shape: Mapping[str, Any]) -> list[Observation]:
        """Those of a stage with this shape."""
        return [seen for seen in self.stages.get(stage, ()) if seen.shape == shape]

    def __add__(self, other: Profile) -> Profile:
        names = {**self.stages, **other.stages}
        return Profile({name: [*self.stages.get(name, ()), *other.stages.get(name, ())] for name in names})

    def save(self, path: Path) -> None:
        """Write it as JSON. Raises UserError if that cannot be done."""
        body = {"format": FORMAT, "stages": {name: list(map(asdict, seen)) for name, seen in self.stages.items()}}
        try:
            path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
        except OSError as e:
            raise UserError(f"--save-profile {path}: cannot be written ({e.strerror})") from None


def load_profile(path: Path) -> Profile:
    """A profile that was saved. Raises UserError."""
    try:
        body = json.loads(path.read_text())
        if body["format"] > FORMAT:
            raise UserError(f"--profile {path}: its format {body['format']} is newer than this version; update unclip")
        return Profile({name: [Observation(**one) for one in seen] for name, seen in body["stages"].items()})
    except OSError as e:
        raise UserError(f"--profile {path}: cannot be read ({e.strerror}); --save-profile writes one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--profile {path}: not a profile; --save-profile writes one") from None


# --- what artefacts say -----------------------------------------------------------------------------------------------


def observe(store: Store, project: str) -> Profile:
    """What the artefacts that the last run of a project asked for say, as far as they are there."""
    asked = last_run(store, project)
    made = {name: load_artifact(store, name, stage["key"]) for name, stage in asked.items()}
    recipes = {name: stage["recipe"] for name, stage in asked.items()}
    rows = made["pairs"].ledger.rows if made.get("pairs") else 0  # type: ignore[union-attr]
    seen = {name: _observed(store, artifact, recipes, rows) for name, artifact in made.items() if artifact is not None}
    return Profile({name: [one] for name, one in seen.items() if one is not None})


def shape(stage: str, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What besides the amount a stage's time hangs on, of flattened recipes by stage."""
    models = SHAPED_BY.get(stage, (stage,))
    if stage in COUNTED:
        models = tuple(recipes.get("bundle", {}).get("models", ()))
    found = {
        f"{name}.{field}": value
        for name in models
        for field, value in recipes.get(name, {}).items()
        if (field.startswith("model.") and "drop" not in field) or field == "weights"
    }
    if stage == "pairs":
        found = {field: recipes["pairs"][field] for field in PICTURES}
    return found


def _observed(
    store: Store, artifact: Artifact, recipes: Mapping[str, Mapping[str, Any]], rows: int
) -> Observation | None:
    """None where nothing was done, because another run had done it."""
    times, stage = artifact.times, artifact.stage
    seconds = max(times.get("whole_seconds", 0.0), times["seconds"])
    workers = max(1, int(times.get("workers", artifact.environment.get("workers", 1))))
    amount, work, passes, short = float(rows), seconds * workers, {}, {}
    if "busy_seconds" in times:  # a data stage
        share = times["made_rows"] / max(1, artifact.ledger.rows)
        amount, work = rows * min(1.0, share), min(times["busy_seconds"], work)
    elif "samples_per_second" in times:  # a training
        amount = artifact.metrics["samples_seen"]
        work = times["seconds"] * (1 - times.get("share_pause", 0.0)) * workers
    elif stage in COUNTED:
        there = _looked_at(store, artifact)
        passes = passes_of(stage, recipes, there)
        if not any(passes.values()):  # an evaluation of too few rows tells nothing of one that measures
            return None
        short = {part: n / max(1, rows) for part, n in there.items() if n < recipes[stage][ROWS_OF[part]]}
    elif stage == "clip":  # weights that were fetched
        amount, work = 1.0, 0.0
    if not amount:
        return None
    disk = max(times.get("written_bytes", 0.0), artifact.requests.get("bytes_written", 0.0))
    return Observation(
        amount,
        seconds,
        work,
        workers,
        shape(stage, recipes),
        passes,
        short,
        steps={name: value for name, value in times.items() if name in ("decode_seconds", "encode_seconds")},
        shards=int(times.get("shards_made", 0)),
        disk=disk,
        requests=artifact.requests,
        device=artifact.environment.get("device", "cpu").partition(":")[0],
        utilisation=times.get("utilisation", 0.0),
    )


def _looked_at(store: Store, artifact: Artifact) -> dict[str, int]:
    """Rows that an evaluation has looked at or found too few, by part; {} of another stage, and where they cannot be
    read."""
    try:
        said = json.loads(read_blob(store, artifact.blobs["evaluation.json"]))
        return {part: len(rows["keys"]) for part, rows in said["rows"].items()} | said["few"]
    except (KeyError, CorruptObject):  # a run notices the damage, and mends it
        return {}


def passes_of(
    stage: str, recipes: Mapping[str, Mapping[str, Any]], there: Mapping[str, int] | None = None
) -> dict[str, float]:
    """How often samples or an evaluation send a row through each network, counted in passes of its training.

    ``recipes`` are flattened, by stage. ``there``: held-out rows, by part of an evaluation, where there are fewer than
    its recipe asks for. All codes of the AR prior are one pass, and so is a caption to the diffusion prior, whose steps
    are a few positions each. Upsamplers train on crops, and so they are evaluated, but they draw whole pictures.
    """
    s = {name.removeprefix("sampling."): value for name, value in recipes["bundle"].items()}
    models = [name for name in s["models"] if name in MODELS]
    steps: dict[str, float] = {
        name: 1 if name == "ar_prior" else s[f"{name.removeprefix('diffusion_')}_steps"] for name in models
    }
    if "diffusion_prior" in models:
        positions = recipes["diffusion_prior"]["model.text_context"] + 1 + ASKED
        steps["diffusion_prior"] = 1 + s["prior_steps"] * ASKED / positions
    guided = {name: 2 if s[f"{_family(name)}_guidance"] else 1 for name in models if not name.startswith("upsampler")}
    one = {name: steps[name] * guided.get(name, 1) for name in models}  # passes of one row
    if stage == "samples":
        prior = {"ar": "ar_prior", "diffusion": "diffusion_prior"}[s["prior"]]
        counts = {prior: s["candidates"], "decoder": 1.0}
        for name in ("upsampler_256", "upsampler_1024"):
            if name in models and s["size"] >= int(name.rpartition("_")[2]):
                counts[name] = recipes[name]["model.crop"] ** -2
        return {name: len(recipes["samples"]["captions"]) * count * one[name] for name, count in counts.items()}
    asked = recipes["evaluation"]

    def rows(name: str, part: str) -> int:
        found = min(asked[name], (there or {}).get(part, asked[name]))
        return found if found >= FEWEST else 0

    drawn, captioned = rows("decoder_rows", "decoder"), rows("caption_rows", "decoder")
    priors = [name for name in models if name.endswith("prior")]
    pictures = drawn * (2 if asked["early"] else 1) + captioned * len(priors) + 3 * min(8, captioned)
    sampled = rows("sampled_rows", "priors") * asked["prior_samples"] + captioned * s["candidates"]
    counts = {"decoder": pictures, **dict.fromkeys(priors, sampled)}
    for name in ("upsampler_256", "upsampler_1024"):
        if name in models:
            counts[name] = rows(f"{name}_rows", name) * asked["upsampler_samples"]
    return {name: float(count * one[name]) for name, count in counts.items()}


def _family(name: str) -> str:
    return "prior" if name.endswith("prior") else name


# --- lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """y = start + slope x, neither below 0."""

    start: float
    slope: float

    def at(self, x: float) -> float:
        return self.start + self.slope * x


def fit(points: Iterable[tuple[float, float]]) -> Line:
    """The line that leaves the least sum of squares of relative errors; through the origin where all x are the same.

    Raises ValueError without a point.
    """
    x, y = np.array(list(points), float).reshape(-1, 2).T
    if not len(x):
        raise ValueError("no point to draw a line through")
    weight = 1 / np.maximum(y, 1e-9)
    if np.ptp(x) > 0:
        (start, slope), *_ = np.linalg.lstsq(np.stack([weight, weight * x], axis=1), weight * y)
        if start >= 0 and slope >= 0:
            return Line(float(start), float(slope))
        if slope < 0:  # the larger one took no longer: nothing is seen to grow
            return Line(float((weight**2 * y).sum() / (weight**2).sum()), 0.0)
    scaled = weight * x
    return Line(0.0, float((scaled * weight * y).sum() / max((scaled**2).sum(), 1e-300)))


@dataclass(frozen=True)
class Pace:
    """How long a stage takes: ``start`` seconds, and ``work`` seconds of one worker."""

    start: float
    work: Line

    def seconds(self, amount: float, workers: int) -> float:
        return self.start + self.work.at(amount) / workers

    def startup(self, workers: int) -> float:
        """The part that does not grow."""
        return self.start + self.work.start / workers


def pace(seen: Sequence[tuple[float, Observation]]) -> Pace:
    """Of observations with their amounts. Raises ValueError without one."""
    work = fit((amount, one.work) for amount, one in seen)
    rest = [one.seconds - work.at(amount) / one.workers for amount, one in seen]
    return Pace(max(0.0, float(np.median(rest))), work)
