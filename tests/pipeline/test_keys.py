"""Keys: pinned for the shipped configurations, moved by every recipe field, by no setting, and by code on purpose."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from pipeline.build import STAGES, build
from pipeline.config import Config, load_config
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.graph.plan import plan
from pipeline.graph.stages import ordered
from pipeline.store import open_store
from tests.pipeline.golden import FILE, NO_LIST, ROOT, flat, golden_keys, source_digests

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


# --- golden -----------------------------------------------------------------------------------------------------------


def test_the_keys_of_shipped_configurations_are_pinned() -> None:
    then, now = flat(GOLDEN["keys"]), flat(golden_keys())
    moved = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    assert not moved, (
        f"keys moved: {', '.join(moved)}. What users have made of these is stale now; if that is meant, record "
        "it with python -m tests.pipeline.golden"
    )


def test_code_changes_only_with_its_version() -> None:
    versions, digests = {stage.name: stage.version for stage in STAGES}, source_digests()
    assert digests.keys() == GOLDEN["stages"].keys()
    for stage, pinned in GOLDEN["stages"].items():
        assert versions[stage] >= pinned["version"], f"{stage}: its version went down"
        assert (versions[stage], digests[stage]) == (pinned["version"], pinned["digest"]), (
            f"{stage}: code that it runs has changed. If results differ, raise its version; then, or if they "
            "are the same, record it with python -m tests.pipeline.golden"
        )


def test_a_constant_moves_the_digests_of_the_stages_that_use_it_and_a_comment_none() -> None:
    text = (ROOT / "models/diffusion/schedules.py").read_text()
    before = source_digests()

    def moved(text: str) -> set[str]:
        now = source_digests({"models.diffusion.schedules": text})
        return {stage for stage, digest in now.items() if digest != before[stage]}

    assert moved(text.replace('"""', '"""Other words. ', 1) + "\n# a remark\n") == set()
    drawn = {"diffusion_prior", "decoder", "upsampler_256", "upsampler_1024", "samples", "evaluation"}
    assert moved(text.replace("0.008", "0.009")) == drawn  # the offset s of the cosine schedule


# --- settings and recipes ---------------------------------------------------------------------------------------------


def test_no_setting_moves_a_key() -> None:
    before = keys(CONFIG)
    for name in (*leaves(CONFIG.run, "run"), *leaves(CONFIG.release, "release")):
        config = changed(name)
        assert config != CONFIG, name
        assert keys(config) == before, name


def followers(name: str) -> set[str]:
    """A stage and all that is made from it; what is made from what is pinned with the keys."""
    found = {name}
    for stage in ordered(build(CONFIG)):
        if found & set(stage.inputs):
            found.add(stage.name)
    return found


def test_a_recipe_field_moves_the_stages_that_have_it_and_all_that_follow() -> None:
    before, expected = keys(CONFIG), defaultdict[str, set[str]](set)
    for stage in build(CONFIG).values():
        for name in leaves(stage.recipe, stage.section or stage.name) if stage.kind != "source" else ():
            expected[name] |= followers(stage.name)
    assert "clip" in expected["curation.max_caption"]
    assert "clip" not in expected["curation.min_similarity"]
    for name, follow in expected.items():
        after = keys(changed(name))
        moved = {s for s in after if after[s] != before[s]}
        assert moved == follow & after.keys(), name


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
