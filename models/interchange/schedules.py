"""The diffusion process of a model as a scheduler's scheduler_config.json in diffusers' layout.

UnCLIPScheduler, Karlo's, knows the cosine schedule and predictions of noise or data. Anything else is a DDPMScheduler
with the same betas and grid; UnCLIPPipeline does not take that one, a sampling loop of one's own does.
"""

from pathlib import Path
from typing import Any, NamedTuple

from models.image_configs import Prediction
from models.interchange.files import check_config, derive, read_json, write_json
from models.prior_configs import Schedule

FILE = "scheduler_config.json"
PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETAS: dict[Schedule, str] = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
IDLE = {
    "_class_name",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "timestep_spacing",
    "trained_betas",
    "steps_offset",
    "dynamic_thresholding_ratio",
    "sample_max_value",
}
"""Fields of sampling, for which our bundles have options of their own."""


class Process(NamedTuple):
    """Holds the ``schedule`` "cosine" or "linear", the ``steps`` T, and the ``prediction`` "eps", "v" or "x0"."""

    schedule: Schedule
    steps: int
    prediction: Prediction


def scheduler_config(process: Process, variance: str, clip: float | None) -> dict[str, Any]:
    """Returns the file's content.

    ``variance`` is "fixed_small_log" or "learned_range"; ``clip`` bounds predictions of x0.
    """
    config = {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": process.steps,
        "beta_schedule": BETAS[process.schedule],
        "prediction_type": PREDICTIONS[process.prediction],
        "variance_type": variance,
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
    }
    if process.schedule == "cosine" and process.prediction != "v":
        return config
    config |= {"_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}
    if process.schedule == "linear":
        config |= {"beta_start": 0.1 / process.steps, "beta_end": 20 / process.steps}
    return config


def write_scheduler(folder: Path, process: Process, variance: str, clip: float | None) -> None:
    """Writes ``folder/scheduler_config.json``."""
    write_json(folder / FILE, scheduler_config(process, variance, clip))


def read_scheduler(folder: Path) -> Process:
    """Reads the process in ``folder/scheduler_config.json``. Raises as ``read_json``, and ValueError on another."""
    path = folder / FILE
    found = read_json(path)
    betas = {theirs: ours for ours, theirs in BETAS.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    beta, prediction = found.get("beta_schedule", "squaredcos_cap_v2"), found.get("prediction_type", "epsilon")
    if str(beta) not in betas or str(prediction) not in predictions:
        raise ValueError(f"{path} does not fit: beta_schedule {beta!r} with prediction_type {prediction!r} is unknown")
    process = derive(
        path, lambda: Process(betas[beta], int(found.get("num_train_timesteps", 1000)), predictions[prediction])
    )
    idle = IDLE if process.schedule == "linear" else IDLE | {"beta_start", "beta_end"}
    check_config(path, found, scheduler_config(process, "", None), idle)
    return process


def check_process(folder: Path, found: Process, expected: Process) -> None:
    """Raises ValueError unless the scheduler in ``folder`` describes the process of the model beside it."""
    if found != expected:
        raise ValueError(f"{folder / FILE} does not fit: it is for {found}, the model was trained for {expected}")
