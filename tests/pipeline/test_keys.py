"""Keys: pinned for the shipped configurations, moved by every recipe field, by no setting, and by code on purpose."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from pipeline.build import build
from pipeline.config import Config, load_config
from pipeline.data.source.stage import SourceRecipe, scan
from pipeline.graph.plan import plan
from pipeline.graph.stages import Graph, ordered
from pipeline.store import open_store
from tests.pipeline.golden import FILE, NO_LIST, ROOT, Sources, golden_keys, source_digests, versions

GOLDEN = json.loads(FILE.read_text())
CONFIG = load_config(ROOT / "configs/nano.yaml")
DESCENDANTS = {
    "pairs": {
        "pairs", "clip", "embeddings", "curation", "codec", "ar_prior", "diffusion_prior", "decoder", "upsampler_256",
        "upsampler_1024", "bundle", "samples", "index", "evaluation",
    },
    "clip": {
        "clip", "embeddings", "curation", "codec", "ar_prior", "diffusion_prior", "decoder", "upsampler_256",
        "upsampler_1024", "bundle", "samples", "index", "evaluation",
    },
    "embeddings": {
        "embeddings", "curation", "codec", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024",
        "bundle", "samples", "index", "evaluation",
    },
    "curation": {
        "curation", "codec", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024", "bundle",
        "samples", "index", "evaluation",
    },
    "index": {"index"},
    "codec": {"codec", "ar_prior", "bundle", "samples", "evaluation"},
    "ar_prior": {"ar_prior", "bundle", "samples", "evaluation"},
    "diffusion_prior": {"diffusion_prior", "bundle", "samples", "evaluation"},
    "decoder": {"decoder", "bundle", "samples", "evaluation"},
    "upsampler_256": {"upsampler_256", "bundle", "samples", "evaluation"},
    "upsampler_1024": {"upsampler_1024", "bundle", "samples", "evaluation"},
    "bundle": {"bundle", "samples", "evaluation"},
    "samples": {"samples"},
    "evaluation": {"evaluation"},
}  # fmt: skip

# Valid values for fields whose next value by type would be refused, with the fields that must move along.
CHOSEN: dict[str, dict[str, Any]] = {
    "pairs.encode_format": {"encode_format": "webp"},
    "embeddings.heads": {"heads": {"aesthetic": str(FILE)}},  # only its bytes count before it is used
    "clip.weights": {"weights": "open_clip:ViT-L-14:openai"},
    "clip.model.tower": {"tower": "resnet", "layers": (1, 1, 1, 1)},
    "clip.model.image_size": {"image_size": 128},
    "clip.model.embed_dim": {"embed_dim": 32},
    "clip.model.layers": {"layers": (3,)},
    "clip.model.width": {"width": 128},
    "clip.model.patch": {"patch": 8},
    "clip.model.temperature": {"temperature": 0.05},
    "clip.model.least_crop": {"least_crop": 0.5},
    "clip.model.text_heads": {"text_heads": 4},
    "clip.model.text_width": {"text_width": 66},
    "ar_prior.model.text_width": {"text_width": 66},
    "ar_prior.model.text_heads": {"text_heads": 4},
    "ar_prior.model.width": {"width": 66},
    "ar_prior.model.heads": {"heads": 4},
    "ar_prior.model.text_encoder": {"text_encoder": "own", "ridge": False},
    "ar_prior.model.ridge": {"ridge": False},
    "diffusion_prior.model.text_encoder": {"text_encoder": "own", "ridge": False},
    "diffusion_prior.model.ridge": {"ridge": False},
    "diffusion_prior.model.width": {"width": 66},
    "diffusion_prior.model.heads": {"heads": 4},
    "decoder.model.image_size": {"image_size": 128, "attention_resolutions": (32,)},
    "decoder.model.attention_resolutions": {"attention_resolutions": (16,)},
    "decoder.model.channels": {"channels": 48},
    "decoder.model.multipliers": {"multipliers": (1, 3)},
    "decoder.model.head_channels": {"head_channels": 8},
    "decoder.model.patch": {"patch": 2, "attention_resolutions": (16,)},
    "decoder.model.text_width": {"text_width": 64},
    "decoder.model.embedding_norm": {"whiten": False, "embedding_norm": 1.0},
    "decoder.model.text_heads": {"text_heads": 4},
    "decoder.model.null_image": {"null_image": "learned"},
    "decoder.model.text_encoder": {"text_encoder": "clip"},
    "decoder.model.context_width": {"text_encoder": "clip", "context_width": 8},
    "decoder.model.drop_image": {"drop_image": 0.2},
    "decoder.model.drop_text": {"drop_text": 0.6},
    "upsampler_256.model.low_size": {"low_size": 128},
    "upsampler_256.model.image_size": {"image_size": 512},
    "upsampler_256.model.corruption": {"corruption": "bsr"},
    "upsampler_1024.model.low_size": {"low_size": 128, "image_size": 512},
    "upsampler_1024.model.image_size": {"low_size": 128, "image_size": 512},
    "upsampler_1024.model.corruption": {"corruption": "bsr"},
    "bundle.models": {"models": ("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")},
    "bundle.sampling.prior": {"prior": "ar"},
    "bundle.sampling.prior_sampler": {"prior_sampler": "ddim"},
    "bundle.sampling.decoder_sampler": {"decoder_sampler": "ddpm"},
    "bundle.sampling.decoder_guidance_to": {"decoder_guidance_to": 0.5},
    "bundle.sampling.size": {"size": 256},
    "bundle.sampling.precision": {"precision": "bf16"},
    "evaluation.judge": {"judge": "local-dir:clip"},
}
for _stage in ("clip", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"):
    CHOSEN |= {f"{_stage}.{name}": {name: 2 * getattr(getattr(CONFIG, _stage), name)} for name in ("batch", "samples")}
    CHOSEN |= {f"{_stage}.lanes": {"lanes": 4}}
    CHOSEN |= {f"{_stage}.beta2": {"beta2": 0.5}}
    for name, choices in {
        "captions": ("first", "any"),
        "optimizer": ("adamw", "muon"),
        "precision": ("bf16", "fp32"),
    }.items():
        CHOSEN |= {f"{_stage}.{name}": {name: next(c for c in choices if c != getattr(getattr(CONFIG, _stage), name))}}
    CHOSEN |= {f"{_stage}.model.drop_text": {"drop_text": 0.2}, f"{_stage}.model.dropout": {"dropout": 0.2}}
for _stage in ("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"):
    _schedule = "linear" if getattr(CONFIG, _stage).model.schedule == "cosine" else "cosine"
    CHOSEN |= {f"{_stage}.model.schedule": {"schedule": _schedule}, f"{_stage}.model.prediction": {"prediction": "eps"}}
for _stage in ("upsampler_256", "upsampler_1024"):
    CHOSEN |= {f"{_stage}.model.crop": {"crop": 0.5}, f"{_stage}.model.patch": {"patch": 2}}
    CHOSEN |= {f"{_stage}.model.multipliers": {"multipliers": (1, 3)}, f"{_stage}.model.channels": {"channels": 32}}


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


def other(kind: Any, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return 0.5
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return value | {"a": "b"}
    assert isinstance(value, tuple)
    item = get_args(kind)[0]
    return (*value, item(1))


OTHERS = {
    "keys": ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",)
}  # of fields that take few texts


def changed(owner: Any, path: list[str], changes: dict[str, Any] | None) -> Any:
    """``owner`` with the field at ``path`` changed: by ``changes``, or to another value of its type."""
    name, *rest = path
    value = getattr(owner, name)
    if rest:
        return replace(owner, **{name: changed(value, rest, changes)})
    return replace(owner, **(changes or {name: OTHERS.get(name) or other(get_type_hints(type(owner))[name], value)}))


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
            f"{stage}: code that it runs has changed. If results differ, raise the stage's VERSION; then, or if they "
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
    config = changed(CONFIG, name.split("."), None)
    assert config != CONFIG
    assert keys(config) == keys(CONFIG)


def test_the_expected_descendants_are_those_of_the_graph() -> None:
    graph: Graph = build(CONFIG)
    for name, expected in DESCENDANTS.items():
        found = {name}
        for stage in ordered(graph):
            if found & set(stage.inputs):
                found.add(stage.name)
        assert found == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_field_moves_its_stage_and_all_that_follows(name: str) -> None:
    stage = name.partition(".")[0]
    before, after = keys(CONFIG), keys(changed(CONFIG, name.split("."), CHOSEN.get(name)))
    assert {s for s in after if after[s] != before[s]} == DESCENDANTS[stage] & after.keys()


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
