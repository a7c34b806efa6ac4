"""Keys: pinned for the shipped configurations, moved by every recipe field, by no setting, and by code on purpose."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from pipeline.build import build
from pipeline.config import Config, load_config
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.graph.plan import plan
from pipeline.graph.stages import ordered
from pipeline.store import open_store
from tests.pipeline.golden import FILE, NO_LIST, ROOT, Sources, golden_keys, source_digests, versions

GOLDEN = json.loads(FILE.read_text())
CONFIG = load_config(ROOT / "configs/nano.yaml")

# Of fields that others must move along with, or whose value is no value of its type alone.
CHOSEN: dict[str, dict[str, Any]] = {
    "embeddings.heads": {"heads": {"aesthetic": str(FILE)}},  # only its bytes count before it is used
    "clip.weights": {"weights": "open_clip:ViT-L-14:openai"},
    "clip.model.tower": {"tower": "resnet", "layers": (1, 1, 1, 1)},
    "ar_prior.model.text_encoder": {"text_encoder": "own", "ridge": False},
    "diffusion_prior.model.text_encoder": {"text_encoder": "own", "ridge": False},
    "decoder.model.image_size": {"image_size": 128, "attention_resolutions": (32,)},
    "decoder.model.attention_resolutions": {"attention_resolutions": (16,)},
    "decoder.model.patch": {"patch": 2, "attention_resolutions": (16,)},
    "decoder.model.embedding_norm": {"whiten": False, "embedding_norm": 1.0},
    "decoder.model.context_width": {"text_encoder": "clip", "context_width": 8},
    "upsampler_1024.model.low_size": {"low_size": 128, "image_size": 512},
    "upsampler_1024.model.image_size": {"low_size": 128, "image_size": 512},
    "bundle.models": {"models": ("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")},
    "bundle.sampling.prior": {"prior": "ar"},
    "bundle.sampling.size": {"size": 256},
    "samples.captions": {"captions": ("first", "any")},
    "evaluation.judge": {"judge": "local-dir:clip"},
    "release.keys": {
        "keys": ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",),
    },
}


def keys(config: Config) -> dict[str, str]:
    store = open_store("never-written")
    return {v.stage: v.key for v in plan(build(config), NO_LIST, config.project, store, {})}


def leaves(recipe: Any, prefix: str) -> Iterator[str]:
    """The dotted names of all fields of a nested dataclass."""
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, name)
        else:
            yield name


def others(kind: Any, value: Any) -> list[Any]:
    """Other values of the same type, of which one goes with the fields beside it."""
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [0.5]
    if isinstance(value, int | float):
        return [value + 1, 2 * value, value // 2, value / 2, 0.2, 0.5]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, dict):
        return [value | {"a": "b"}]
    assert isinstance(value, tuple)
    return [(*value, get_args(kind)[0](1)), value[:-1] + tuple(item + 1 for item in value[-1:])]


def with_changes(owner: Any, path: list[str], changes: dict[str, Any]) -> Any:
    """``owner`` with changes beside the field at ``path``."""
    name, *rest = path
    return replace(owner, **({name: with_changes(getattr(owner, name), rest, changes)} if rest else changes))


def changed(name: str) -> Config:
    """The configuration with another value of this field."""
    *places, last = name.split(".")
    owner: Any = CONFIG
    for place in places:
        owner = getattr(owner, place)
    if name in CHOSEN:
        return with_changes(CONFIG, [*places, last], CHOSEN[name])
    value = getattr(owner, last)
    for other in others(get_type_hints(type(owner))[last], value):
        if other == value:
            continue
        with suppress(ValueError):
            return with_changes(CONFIG, [*places, last], {last: other})
    raise AssertionError(f"{name}: choose a value")


RECIPES = [
    name for stage in build(CONFIG).values() if stage.name not in ("source", "captions")
    for name in leaves(stage.recipe, stage.name)
]  # fmt: skip


# --- golden -----------------------------------------------------------------------------------------------------------


def test_the_keys_of_shipped_configurations_are_pinned() -> None:
    now = golden_keys()
    moved = [
        f"{config} {stage}"
        for config in GOLDEN["keys"].keys() | now.keys()
        for stage in GOLDEN["keys"].get(config, {}).keys() | now.get(config, {}).keys()
        if GOLDEN["keys"].get(config, {}).get(stage) != now.get(config, {}).get(stage)
    ]
    assert not moved, (
        f"keys moved: {', '.join(sorted(moved))}. What users have made of these is stale now; if that is meant, record "
        "it with python -m tests.pipeline.golden"
    )


def test_code_changes_only_with_its_version() -> None:
    now, digests = versions(), source_digests()
    assert digests.keys() == GOLDEN["stages"].keys()
    for stage, pinned in GOLDEN["stages"].items():
        assert now[stage] >= pinned["version"], f"{stage}: its version went down"
        assert (now[stage], digests[stage]) == (pinned["version"], pinned["digest"]), (
            f"{stage}: code that it runs has changed. If results differ, raise its version; then, or if they "
            "are the same, record it with python -m tests.pipeline.golden"
        )


def test_a_constant_moves_the_digests_of_the_stages_that_use_it_and_a_comment_none(tmp_path: Path) -> None:
    for package in ("models", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digests(tmp_path)
    assert before == source_digests()

    schedules = tmp_path / "models/diffusion/schedules.py"
    text = schedules.read_text()
    assert "0.008" in text  # the offset s of the cosine schedule
    schedules.write_text(text.replace('"""', '"""Other words. ', 1) + "\n# a remark\n")
    assert source_digests(tmp_path) == before
    schedules.write_text(text.replace("0.008", "0.009"))
    moved = {stage for stage, digest in source_digests(tmp_path).items() if digest != before[stage]}
    assert moved == {"diffusion_prior", "decoder", "upsampler", "samples", "evaluation"}

    schedules.write_text(text)
    upsampler = tmp_path / "models/upsampler.py"
    upsampler.write_text(upsampler.read_text() + "\nEXTRA = 1\n")
    moved = {stage for stage, digest in source_digests(tmp_path).items() if digest != before[stage]}
    assert moved == {"upsampler", "samples", "evaluation"}


def test_digests_see_imports_inside_functions() -> None:
    pairs = Sources(ROOT).closure(("pipeline.data.pairs.stage",))
    assert {"pipeline.data.fetch.fetcher", "pipeline.data.pairs.image"} <= pairs.keys()
    assert [name for name in pairs if name.startswith("models")] == ["models.view"]
    assert "models.view" in Sources(ROOT).closure(("pipeline.data.embeddings.stage",))


# --- settings and recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*leaves(CONFIG.run, "run"), *leaves(CONFIG.release, "release")])
def test_no_setting_moves_a_key(name: str) -> None:
    config = changed(name)
    assert config != CONFIG
    assert keys(config) == keys(CONFIG)


def followers(name: str) -> set[str]:
    """A stage and all that is made from it; what is made from what is pinned with the keys."""
    found = {name}
    for stage in ordered(build(CONFIG)):
        if found & set(stage.inputs):
            found.add(stage.name)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_field_moves_its_stage_and_all_that_follows(name: str) -> None:
    before, after = keys(CONFIG), keys(changed(name))
    assert {s for s in after if after[s] != before[s]} == followers(name.partition(".")[0]) & after.keys()


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"image_column": "other"}, {"source"}),
        ({"caption_column": "other"}, {"captions"}),
        ({"group_column": "other"}, {"source"}),
        ({"split_column": "other"}, {"source"}),
        ({"hash_column": "other"}, {"source"}),
        ({"shard_rows": 3}, {"source", "captions"}),
        ({"validation": 0.5}, {"source"}),
        ({"test": 0.5}, {"source"}),
    ],
)
def test_source_fields_move_what_the_rows_then_say(tmp_path: Path, change: dict[str, Any], moved: set[str]) -> None:
    """Source keys come from the content of the list, so a field counts by what it makes of the rows."""
    split = "test" if "split_column" in change else ""
    lines = [f"http://h/{i},picture {i},g{i % 2},{split},,train" for i in range(8)]
    (tmp_path / "list.csv").write_text("\n".join(["url,caption,group,split,sha256,other", *lines]) + "\n")
    recipe = SourceRecipe((str(tmp_path / "list.csv"),), shard_rows=4, validation=0.1, test=0.1)
    store = open_store(str(tmp_path / "store"))
    before, after = (scan(r, store, write=False).keys for r in (recipe, replace(recipe, **change)))
    assert {name for name in before if before[name] != after[name]} == moved
