"""The configuration of a project: a recipe for every stage, the gates of a release, and how to run.

Presets are files in ``presets``: values of stages that stand where a configuration gives none. Importing this module
imports neither Ray nor torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import yaml
from pydantic import Field, PositiveFloat

from models.clip_weights import PATTERN
from pipeline.build import STAGES, all_stages
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.graph.stages import Stage
from pipeline.local import read_local
from pipeline.parse import SHORTHANDS, ContentFile, load_yaml, overlay, parse, read_count, read_value
from pipeline.settings import KubernetesSettings, Prices, RaySettings, ReleaseGates
from pipeline.store.names import is_part
from pipeline.training.recipes import ClipRecipe

CONFIG_BYTES = 16 << 20
# Fields that hold a path, or a list of paths.
PATHS = re.compile(
    r"store|run\.output|source\.(paths|roots|image_folder)|embeddings\.heads\.\w+|\w+\.init_from|pairs\.deny_\w+"
)
RELATIVE = re.compile(r"(?![A-Za-z][\w+.-]*:|[/~]|[0-9a-f]{64}$).")
PRESETS = ("nano", "tiny", "small", "karlo", "paper")  # by size; each is a file of pipeline/presets
RUN_FILE = "run.yaml"  # in a run's output folder: the configuration of the last run, resolved
SCHEMA = Path(__file__).with_name("schema.json")  # of configurations, for editors; tests/reference.py writes it


@dataclass(frozen=True)
class Run:
    """Says how to run. None of these settings changes a key.

    Attributes:
        output: Local folder for the report and the images.
        budget_hours: Maximum estimated hours of a run without ``--yes``.
        trackers: Trackers that receive training metrics, previews, samples and figures: ``tensorboard``, ``wandb``,
            ``mlflow``, ``prometheus``, or a function of yours as ``module:function``.
        lease_s: Seconds without progress after which another run may take over.
        ray: The local Ray.
        kubernetes: The pods of a RayJob.
        prices: Prices of hours and bytes for the plan.
    """

    output: str = "out"
    budget_hours: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 12.0
    trackers: tuple[str, ...] = ()
    lease_s: PositiveFloat = 60.0
    ray: RaySettings = field(default_factory=RaySettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    prices: Prices = field(default_factory=Prices)

    if TYPE_CHECKING:  # the settings of each stage, by its name

        def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Config:
    """Describes one project: its list, its store, and a recipe for every stage.

    ``config_type`` returns the class of whole configurations, in which every stage's recipe stands under its name, and
    its settings under ``run``.

    Attributes:
        stages: Declarations of all stages, in order.
        project: A name; pins and histories of one store are kept apart by it.
        store: A folder, or ``s3://``, ``gs://`` or ``az://`` and ``bucket/prefix``.
        source: The list of image-caption pairs.
        release: Gates that a bundle must pass before it becomes the release.
        run: Settings, which move no key.
    """

    stages: ClassVar[tuple[Stage, ...]]
    BESIDE: ClassVar = SHORTHANDS

    project: str
    store: str
    source: SourceRecipe
    release: ReleaseGates = field(default_factory=ReleaseGates)
    run: Run = field(default_factory=Run)

    if TYPE_CHECKING:  # the recipe of each stage, by its name

        def __getattr__(self, name: str) -> Any: ...


TRAININGS = tuple(stage.name for stage in STAGES if stage.kind == "training")


@cache
def config_type(stages: tuple[Stage, ...] = STAGES) -> type[Config]:
    """Returns the class of configurations with a recipe, and settings under ``run``, for each of some stages.

    Raises UserError for a stage that is named as something else there.
    """
    taken = {each.name for kind in (Config, Run) for each in fields(kind)} | {*sections(STAGES), *Config.BESIDE}
    if wrong := next((stage.name for stage in stages if stage not in STAGES and stage.name in taken), ""):
        raise UserError(f"stage {wrong}: the configuration has another field of this name; rename the stage")
    settings = [(each.name, each.settings, field(default_factory=each.settings)) for each in stages if each.settings]
    run = make_dataclass("Run", settings, bases=(Run,), frozen=True, namespace={"__doc__": Run.__doc__})
    own = [(stage.name, stage.recipe) for stage in _with_section(stages)]
    whole = [(name, kind, field(default_factory=kind)) for name, kind in (*own, ("run", run))]
    namespace = {"__doc__": Config.__doc__, "stages": stages}
    return make_dataclass("Config", whole, bases=(Config,), frozen=True, namespace=namespace)


def _with_section(stages: Iterable[Stage]) -> Iterator[Stage]:
    """Yields the stages whose recipe is a section of its own, besides ``source``."""
    yield from (stage for stage in stages if stage.kind != "source" and not stage.section)


def sections(stages: Iterable[Stage]) -> tuple[str, ...]:
    """Returns the sections of a configuration that hold a recipe, in order."""
    return tuple(dict.fromkeys(stage.section or stage.name for stage in stages))


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), more: Iterable[Stage] = ()
) -> Config:
    """Reads a YAML file, or takes its values, and applies ``key.key=value`` overrides. Raises UserError.

    Relative paths of a file count from its folder, those of overrides and of values from the current one.
    """
    values = source if isinstance(source, Mapping) else read_values(source)
    for override in overrides:
        values = overlay(values, _override(override), emptying=True)
    config = make_config(values, all_stages(more))
    return replace(config, run=replace(config.run, output=os.path.expanduser(config.run.output)))


def shipped() -> dict[str, Path]:
    """Returns the configurations that come with this software, by name; none in a job on a cluster."""
    here = Path(__file__).parent
    installed = here / "configs"  # where the wheel puts those of the checkout
    folder = installed if installed.is_dir() else here.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_values(path: str | Path) -> Mapping[str, Any]:
    """Returns the values of a YAML file, whose relative paths count from its folder, or of a shipped one by its name.

    Raises UserError.
    """
    ours = shipped()
    if str(path) in ours and not Path(path).is_file() and not Path(f"{path}.yaml").is_file():
        # As in the checkout: what they make lies in out/ of the current folder.
        return _placed(Path("configs"), yaml.safe_load(ours[str(path)].read_text()))
    try:
        text = read_local(path, CONFIG_BYTES).decode()
    except FileNotFoundError:
        what = f"unclip init writes one; shipped are {', '.join(ours)}"
        if Path(f"{path}.yaml").is_file():
            what = f"did you mean {path}.yaml?"
        raise UserError(f"{path}: no such configuration; {what}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', '') or e}); name a YAML file") from None
    try:
        values = load_yaml(text) or {}
    except ValueError as e:
        raise UserError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected a mapping of stages; if it is a list, unclip init my-project {path} writes one for it"
        )
    if not values:
        raise UserError(f"{path} is empty; unclip init writes a configuration")
    return _from_its_folder(Path(path), values)


def _from_its_folder(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a file, with paths that count from its folder written as they are found from here.

    Raises UserError where a store lies where an older version would have found it.
    """
    folder = path.parent
    if folder.samefile("."):
        return dict(values)
    store, moved = values.get("store"), _placed(folder, values)
    if isinstance(store, str) and RELATIVE.match(store) and Path(store).is_dir() and not Path(moved["store"]).exists():
        raise UserError(
            f"{path}: store {store} is relative to the folder of this file, {folder}, where there is none, and there "
            f"is one at {Path(store).absolute()}; move it, or write store: {os.path.relpath(store, folder)}"
        )
    return moved


def _placed(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values with paths that count from a folder written as they are found from here."""

    def found(value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: found(below, f"{name}.{key}".lstrip(".")) for key, below in value.items()}
        if isinstance(value, list):
            return [found(each, name) for each in value]
        if not (isinstance(value, str) and PATHS.fullmatch(name) and RELATIVE.match(value)):
            return value
        place = os.path.normpath(folder.absolute() / value)
        near = os.path.relpath(place)
        return place if near.startswith("..") else near

    given = {name: value for name, value in values.items() if value is not None}  # a heading may have nothing below it
    placed: dict[str, Any] = found(overlay({"run": {"output": Run.output}}, given))
    return placed


def plain_values(value: Any, place: Callable[[str, Any], Any], name: str = "") -> Any:
    """Returns a configuration as values that YAML can hold; ``place`` gives each single value by its dotted name."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(below, place, f"{name}.{key}".lstrip(".")) for key, below in value.items()}
    if isinstance(value, tuple | list):
        return [plain_values(each, place, name) for each in value]
    return place(name, value)


def whole_values(config: Config) -> dict[str, Any]:
    """Returns plain values from which ``make_config`` makes the same configuration, wherever it is called.

    Presets, ``scale`` and overrides are resolved, and local paths are absolute.
    """

    def place(name: str, value: Any) -> Any:
        if isinstance(value, ContentFile):
            return value.path or str(value)
        is_local = isinstance(value, str) and PATHS.fullmatch(name) and RELATIVE.match(value)
        return os.path.abspath(value) if is_local else value

    return cast(dict[str, Any], plain_values(config, place))


def resolved_values(config: Config) -> dict[str, Any]:
    """Returns the list, the store and the recipes of ``whole_values``, without ``release`` and ``run``."""
    values = whole_values(config)
    return {name: values[name] for name in ("project", "store", *sections(config.stages))}


def _override(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{text}: an override is written key.key=value")
    nested = read_value(value, text)
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return nested


def make_config(values: Mapping[str, Any], stages: tuple[Stage, ...] = ()) -> Config:
    """Returns the configuration of plain values, after the values of presets are filled in. Raises UserError.

    ``stages``: all that it has recipes for, by default the pipeline's and those of installed packages.
    """
    values, stages = dict(values), stages or all_stages()
    common, scale = values.pop("preset", "paper"), values.pop("scale", 1)
    for stage in _with_section(stages):  # a preset has no list
        given = values.get(stage.name)
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise UserError(f"{stage.name}: expected a mapping, got {given!r}")
        own = {name: value for name, value in given.items() if name != "preset"}
        preset = _preset(given.get("preset", common)).get(stage.name, {})
        values[stage.name] = overlay(preset | _decay(stage, preset, own.get("samples")), own)
    config = _with_clip_as_it_is(_scaled(parse(config_type(stages), values), scale))
    check_project(config.project)
    for stage in config.stages:
        if stage.fits:
            stage.fits(stage.bound(config), config)
    return config


def named_weights(config: Config, stages: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the setting and the value of each CLIP that somebody else has trained and that these stages load."""
    for stage in (stage.bound(config) for stage in config.stages if stage.name in stages):
        for name in stage.clips:
            if re.fullmatch(PATTERN, value := getattr(stage.recipe, name) or ""):
                yield f"{stage.name}.{name}", value


def preset_config(name: str) -> Config:
    """Returns a configuration of nothing but a preset, for callers that need models and trainings without a list."""
    return make_config({"project": name, "store": name, "source": {"paths": [name]}, "preset": name})


def _decay(stage: Stage, preset: Mapping[str, Any], samples: Any) -> dict[str, int]:
    """Returns the decay of a training that takes other ``samples`` than its preset: the same share of them."""
    samples = read_count(str(samples)) if isinstance(samples, str | float) else samples
    if "decay" not in preset or not isinstance(samples, int) or samples < 1:
        return {}
    usual = preset.get("samples", stage.recipe.samples)
    return {"decay": round(preset["decay"] * samples / usual)}


def _scaled(config: Config, scale: Any) -> Config:
    """Returns ``config`` with every training ``scale`` times as long, its decay included.

    Its warmup stays: how many steps an optimiser needs to know its weights does not depend on how many follow.

    Raises UserError for a scale that is not a number above 0.
    """
    scale = parse(PositiveFloat, scale, "scale")
    longer = {}
    for stage in (stage.name for stage in config.stages if stage.kind == "training"):
        recipe = getattr(config, stage)
        samples = max(recipe.batch, round(recipe.samples * scale))
        decay = min(samples, round(recipe.decay * scale))
        longer[stage] = dataclasses.replace(recipe, samples=samples, decay=decay)
    return dataclasses.replace(config, **longer)


def _with_clip_as_it_is(config: Config) -> Config:
    """Returns ``config`` without the training of a CLIP that exists: it happens nowhere, and must not count in keys."""
    if not config.clip.pretrained:
        return config
    return dataclasses.replace(config, clip=ClipRecipe(weights=config.clip.weights))  # type: ignore[call-arg]


def _preset(name: Any) -> Mapping[str, Any]:
    """Returns the values of a preset by stage. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
    return _read_preset(name)


@cache
def _read_preset(name: str) -> Mapping[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("presets").joinpath(f"{name}.yaml").read_text())


def check_project(name: str) -> None:
    """Raises UserError for a name that cannot be part of paths in the store."""
    if not is_part(name):
        raise UserError(f"project: {name!r} is not a plain name; use letters, digits, '.', '-' and '_'")
