"""The configuration of a project: a recipe for every stage, the gates of a release, and how to run.

Presets are files in ``presets``: values of stages that stand where a configuration gives none. Importing this module
imports neither Ray nor torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PositiveFloat

from models.prior_configs import VOCABULARY
from models.sampling_config import PRIORS, check_sampling
from pipeline.data.codec.recipe import CodecRecipe
from pipeline.data.curation.stage import CurationRecipe
from pipeline.data.curation.thresholds import ThresholdsRecipe
from pipeline.data.embeddings.stage import EmbeddingsRecipe
from pipeline.data.neighbours.stage import IndexRecipe
from pipeline.data.pairs.recipe import PairsRecipe
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.local import read_local
from pipeline.parse import ContentFile, load_yaml, overlay, parse, read_value
from pipeline.progress import read_count
from pipeline.sampling.bundle import BundleRecipe
from pipeline.sampling.samples import SamplesRecipe
from pipeline.settings import (
    EmbeddingsSettings,
    KubernetesSettings,
    PairsSettings,
    Prices,
    RaySettings,
    ReleaseGates,
    ShardSettings,
    TrainingSettings,
)
from pipeline.store.names import is_part
from pipeline.training.recipes import (
    ARPriorRecipe,
    ClipRecipe,
    DecoderRecipe,
    DiffusionPriorRecipe,
    TrainingRecipe,
    UpsamplerRecipe,
)

CONFIG_BYTES = 16 << 20
# Fields that hold a path, or a list of paths.
PATHS = re.compile(r"store|run\.output|source\.(paths|roots)|embeddings\.heads\.\w+|\w+\.init_from|pairs\.deny_\w+")
RELATIVE = re.compile(r"(?![A-Za-z][\w+.-]*:|[/~]|[0-9a-f]{64}$).")
PRESETS = ("nano", "tiny", "small", "karlo", "paper")  # by size; each is a file of pipeline/presets


@dataclass(frozen=True)
class Run:
    """Says how to run. None of these settings moves a key.

    Attributes:
        output: A local folder for the report and the images.
        budget_hours: Hours; a run whose estimate is above them stops without ``--yes``.
        trackers: Receivers of the metrics of trainings, previews, samples and figures: ``tensorboard``, ``wandb``,
            ``mlflow``, or a function of yours as ``module:function``.
        lease_s: Seconds without progress after which another run may take over.
        ray: The local Ray.
        kubernetes: The pods of a RayJob.
        prices: Prices by which the plan turns hours and bytes into costs.
    """

    output: str = "out"
    budget_hours: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 12.0
    trackers: tuple[str, ...] = ()
    lease_s: PositiveFloat = 60.0
    ray: RaySettings = field(default_factory=RaySettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    prices: Prices = field(default_factory=Prices)
    pairs: PairsSettings = field(default_factory=PairsSettings)
    clip: TrainingSettings = field(default_factory=TrainingSettings)
    embeddings: EmbeddingsSettings = field(default_factory=EmbeddingsSettings)
    thresholds: ShardSettings = field(default_factory=ShardSettings)
    curation: ShardSettings = field(default_factory=ShardSettings)
    index: ShardSettings = field(default_factory=ShardSettings)
    codec: ShardSettings = field(default_factory=ShardSettings)
    ar_prior: TrainingSettings = field(default_factory=TrainingSettings)
    diffusion_prior: TrainingSettings = field(default_factory=TrainingSettings)
    decoder: TrainingSettings = field(default_factory=TrainingSettings)
    upsampler_256: TrainingSettings = field(default_factory=TrainingSettings)
    upsampler_1024: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class Config:
    """Describes one project: its list, its store, and a recipe for every stage.

    Attributes:
        project: A name; pins and histories of one store are kept apart by it.
        store: A folder, or ``s3://bucket/prefix``.
        source: The list of image-caption pairs.
        release: Gates that a bundle must pass before it becomes the release.
        run: Settings, which move no key.
    """

    project: str
    store: str
    source: SourceRecipe
    pairs: PairsRecipe = field(default_factory=PairsRecipe)
    clip: ClipRecipe = field(default_factory=ClipRecipe)
    embeddings: EmbeddingsRecipe = field(default_factory=EmbeddingsRecipe)
    thresholds: ThresholdsRecipe = field(default_factory=ThresholdsRecipe)
    curation: CurationRecipe = field(default_factory=CurationRecipe)
    index: IndexRecipe = field(default_factory=IndexRecipe)
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    ar_prior: ARPriorRecipe = field(default_factory=ARPriorRecipe)
    diffusion_prior: DiffusionPriorRecipe = field(default_factory=DiffusionPriorRecipe)
    decoder: DecoderRecipe = field(default_factory=DecoderRecipe)
    upsampler_256: UpsamplerRecipe = field(default_factory=UpsamplerRecipe)
    upsampler_1024: UpsamplerRecipe = field(default_factory=UpsamplerRecipe)
    bundle: BundleRecipe = field(default_factory=BundleRecipe)
    samples: SamplesRecipe = field(default_factory=SamplesRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    release: ReleaseGates = field(default_factory=ReleaseGates)
    run: Run = field(default_factory=Run)


DEFAULTS = {field.name: field.default_factory for field in fields(Config) if field.default_factory is not MISSING}
RECIPES = tuple(name for name in DEFAULTS if name not in ("release", "run"))
TRAININGS = tuple(name for name in RECIPES if isinstance(DEFAULTS[name](), TrainingRecipe))
UPSAMPLERS = tuple(name for name in RECIPES if DEFAULTS[name] is UpsamplerRecipe)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, or takes its values, and applies ``key.key=value`` overrides. Raises UserError.

    Relative paths of a file count from its folder, those of overrides and of values from the current one.
    """
    values = source if isinstance(source, Mapping) else _read_values(source)
    for override in overrides:
        values = overlay(values, _override(override), emptying=True)
    config = make_config(values)
    config = replace(config, run=replace(config.run, output=os.path.expanduser(config.run.output)))
    for name in (*PRIORS.values(), "decoder"):
        if (words := getattr(config, name).model.vocabulary) != VOCABULARY:
            raise UserError(f"{name}.model.vocabulary: {words}; CLIP's tokens are {VOCABULARY}, so leave it out")
    return config


def _read_values(path: str | Path) -> Mapping[str, Any]:
    try:
        text = read_local(path, CONFIG_BYTES).decode()
    except FileNotFoundError:
        what = "unclip init writes one, the shipped ones are in configs/"
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
    store, moved = values.get("store"), found(overlay({"run": {"output": Run.output}}, given))
    if isinstance(store, str) and RELATIVE.match(store) and Path(store).is_dir() and not Path(moved["store"]).exists():
        raise UserError(
            f"{path}: store {store} counts from the folder of this file, {folder}, where there is none, and there is "
            f"one at {Path(store).absolute()}; move it, or write store: {os.path.relpath(store, folder)}"
        )
    return moved


def plain_values(value: Any, place: Callable[[str, Any], Any], name: str = "") -> Any:
    """Returns a configuration as values that YAML can hold; ``place`` gives each single value by its dotted name."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(below, place, f"{name}.{key}".lstrip(".")) for key, below in value.items()}
    if isinstance(value, tuple | list):
        return [plain_values(each, place, name) for each in value]
    return place(name, value)


def resolved_values(config: Config) -> dict[str, Any]:
    """Returns plain values from which ``make_config`` makes the same list, store and recipes, wherever it is called.

    Presets, ``scale`` and overrides are resolved, and local paths are absolute. ``release`` and ``run`` are left out.
    """

    def place(name: str, value: Any) -> Any:
        if isinstance(value, ContentFile):
            return value.path or str(value)
        is_local = isinstance(value, str) and PATHS.fullmatch(name) and RELATIVE.match(value)
        return os.path.abspath(value) if is_local else value

    values = plain_values(config, place)
    return {name: values[name] for name in ("project", "store", "source", *RECIPES)}


def _override(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{text}: an override is written key.key=value")
    nested = read_value(value, text)
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return nested


def make_config(values: Mapping[str, Any]) -> Config:
    """Returns the configuration of plain values, after the values of presets are filled in. Raises UserError."""
    values = dict(values)
    common, scale = values.pop("preset", "paper"), values.pop("scale", 1)
    for stage in RECIPES:
        given = values.get(stage)
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise UserError(f"{stage}: expected a mapping, got {given!r}")
        own = {name: value for name, value in given.items() if name != "preset"}
        preset = _preset(given.get("preset", common)).get(stage, {})
        values[stage] = overlay(preset | _decay(stage, preset, own.get("samples")), own)
    config = _with_clip_as_it_is(_scaled(parse(Config, values), scale))
    _check(config)
    return config


def preset_config(name: str) -> Config:
    """Returns a configuration of nothing but a preset, for callers that need models and trainings without a list."""
    return make_config({"project": name, "store": name, "source": {"paths": [name]}, "preset": name})


def _decay(stage: str, preset: Mapping[str, Any], samples: Any) -> dict[str, int]:
    """Returns the decay of a training that takes other ``samples`` than its preset: the same share of them."""
    samples = read_count(str(samples)) if isinstance(samples, str | float) else samples
    if "decay" not in preset or not isinstance(samples, int) or samples < 1:
        return {}
    usual = preset.get("samples", getattr(DEFAULTS[stage](), "samples", samples))
    return {"decay": round(preset["decay"] * samples / usual)}


def _scaled(config: Config, scale: Any) -> Config:
    """Returns ``config`` with every training ``scale`` times as long, its decay included.

    Its warmup stays: how many steps an optimiser needs to know its weights does not depend on how many follow.

    Raises UserError for a scale that is not a number above 0.
    """
    scale = parse(PositiveFloat, scale, "scale")
    longer = {}
    for stage in TRAININGS:
        recipe = getattr(config, stage)
        samples = max(recipe.batch, round(recipe.samples * scale))
        decay = min(samples, round(recipe.decay * scale))
        longer[stage] = dataclasses.replace(recipe, samples=samples, decay=decay)
    return dataclasses.replace(config, **longer)


def _with_clip_as_it_is(config: Config) -> Config:
    """Returns ``config`` without the training of a CLIP that exists: it happens nowhere, and must not count in keys."""
    clip = config.clip
    return dataclasses.replace(config, clip=ClipRecipe(weights=clip.weights)) if clip.pretrained else config


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


def _check(config: Config) -> None:
    """Raises UserError for recipes that do not fit each other."""
    check_project(config.project)
    _check_cascade(config)
    for bound in ("min_score", "max_score"):
        for name in getattr(config.curation, bound):
            if name not in config.embeddings.heads:
                raise UserError(f"curation.{bound}.{name}: embeddings.heads has no {name}; name its file there")
    try:
        models = {name: getattr(config, name).model for name in config.bundle.models}
        check_sampling(config.bundle.sampling, models)
    except ValueError as e:
        raise UserError(f"bundle.sampling.{e}") from e
    if "ar_prior" in config.bundle.models and config.ar_prior.model.buckets != config.codec.buckets:
        raise UserError(
            f"codec.buckets: {config.codec.buckets} is not ar_prior.model.buckets {config.ar_prior.model.buckets}"
        )


def _check_cascade(config: Config) -> None:
    side = 64
    if config.decoder.model.image_size != side:
        raise UserError(f"decoder.model.image_size: {config.decoder.model.image_size}; the cascade begins at {side}")
    for stage in UPSAMPLERS:
        low, side, model = side, 4 * side, getattr(config, stage).model
        if (model.low_size, model.image_size) != (low, side):
            raise UserError(
                f"{stage}.model: makes {model.low_size} -> {model.image_size}; the cascade needs {low} -> {side}"
            )
        if stage in config.bundle.models and config.pairs.image_size < side:
            raise UserError(
                f"pairs.image_size: {config.pairs.image_size} is too small for {stage}, which trains on {side} px; "
                f"raise it or leave {stage} out of bundle.models"
            )
