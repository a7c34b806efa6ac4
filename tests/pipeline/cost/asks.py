"""Configurations to be estimated."""

from dataclasses import replace
from pathlib import Path

from pipeline.build import build
from pipeline.config import Config, load_config
from pipeline.cost.devices import Fleet
from pipeline.cost.estimate import PlanInput

ROOT = Path(__file__).parents[3]
NANO = load_config(ROOT / "configs/nano.yaml")
PAPER = load_config(ROOT / "configs/paper.yaml")


def paper(*overrides: str) -> Config:
    return load_config(ROOT / "configs/paper.yaml", overrides)


def asked(config: Config = NANO, rows: int = 320, fleet: Fleet | None = None) -> PlanInput:
    return PlanInput(config, build(config), rows, 0.1, fleet=fleet)


def again(ask: PlanInput, config: Config) -> PlanInput:
    """Returns the same ask of another configuration."""
    return replace(ask, config=config, graph=build(config))
