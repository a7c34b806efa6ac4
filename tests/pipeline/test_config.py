import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.build import STAGES, build
from pipeline.config import PRESETS, TRAININGS, load_config, make_config, preset_config, shipped
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
LEAST: dict[str, Any] = {"project": "p", "store": "s", "source": {"paths": ["a.csv"]}}


@pytest.fixture
def least(tmp_path: Path) -> Path:
    path = tmp_path / "least.yaml"
    path.write_text("project: p\nstore: s\nsource: {paths: [a.csv]}\n")
    return path


def test_a_configuration_needs_a_project_a_store_and_a_list() -> None:
    config = make_config(LEAST)
    assert (config.project, config.store, config.source.paths) == ("p", "s", ("a.csv",))
    for name in LEAST:
        with pytest.raises(UserError, match=f"^{name}: missing; it has no default"):
            make_config({k: v for k, v in LEAST.items() if k != name})
    with pytest.raises(UserError, match=r"^source\.paths: missing"):
        make_config({**LEAST, "source": {}})


def test_a_shipped_configuration_is_found_by_its_name_and_makes_its_output_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert load_config("nano") == load_config("configs/nano.yaml")
    (tmp_path / "nano").mkdir()  # a folder is no configuration
    monkeypatch.chdir(tmp_path)
    nano = load_config("nano", ["scale=2"])
    assert (nano.store, nano.run.output, nano.source.paths) == ("out/nano/store", "out/nano", ("drawings:nano",))
    assert {"demo", "nano", "paper"} <= shipped().keys()
    with pytest.raises(UserError, match=r"^mini: no such configuration; .*; shipped are demo, nano, paper$"):
        load_config("mini")
    (tmp_path / "demo.yaml").write_text("project: mine\nstore: s\nsource: {paths: [a.csv]}\n")
    with pytest.raises(UserError, match=r"^demo: no such configuration; did you mean demo\.yaml\?"):
        load_config("demo")


def test_a_configuration_has_what_its_stages_declare() -> None:
    config = make_config(LEAST)
    for stage in STAGES:
        assert isinstance(getattr(config, stage.section or stage.name), stage.recipe)
        assert type(stage.bound(config).recipe) is stage.recipe
        assert not stage.settings or isinstance(getattr(config.run, stage.name), stage.settings)


def test_the_api_takes_plain_values_and_leaves_them_as_they_were() -> None:
    values = {**LEAST, "preset": "nano", "decoder": {"samples": 4096, "model": {"channels": 32}}}
    before = repr(values)
    config = make_config(values)
    assert repr(values) == before
    assert (config.decoder.samples, config.decoder.model.channels) == (4096, 32)
    assert config.decoder.batch == preset_config("nano").decoder.batch


def test_scale_changes_how_long_every_model_trains_and_nothing_else() -> None:
    assert make_config(LEAST) == make_config({**LEAST, "preset": "paper"})
    whole = make_config({**LEAST, "preset": "tiny", "decoder": {"samples": 1000}})
    for scale in (0.25, 1, 3, 1e-9):
        config = make_config({**LEAST, "preset": "tiny", "decoder": {"samples": 1000}, "scale": scale})
        for stage in TRAININGS:
            before, after = getattr(whole, stage), getattr(config, stage)
            samples = max(before.batch, round(scale * before.samples))
            decay = min(samples, round(scale * before.decay))
            assert after == dataclasses.replace(before, samples=samples, decay=decay)
        assert config.evaluation == whole.evaluation
    demo = load_config(ROOT / "configs/demo.yaml", ["scale=0.1"])  # whose rate falls: it was a traceback once
    assert 0 < demo.decoder.decay < load_config(ROOT / "configs/demo.yaml").decoder.decay


def test_a_clip_that_exists_is_the_same_whatever_trainings_are() -> None:
    """So nothing that is made with it becomes stale."""
    clip = {"clip": {"weights": "open_clip:ViT-B-32:openai"}}
    found = [make_config({**LEAST, **clip, **other}).clip for other in ({}, {"scale": 0.5}, {"preset": "small"})]
    assert found[0] == found[1] == found[2]
    assert make_config({**LEAST, "clip": {**clip["clip"], "seed": 7}}).clip == found[0]


def test_other_samples_than_a_preset_s_keep_the_share_over_which_its_rate_falls() -> None:
    plain = make_config({**LEAST, "preset": "tiny"}).decoder
    for samples in (64, 1000, 10 * plain.samples):
        found = make_config({**LEAST, "preset": "tiny", "decoder": {"samples": samples}}).decoder
        assert found.decay / samples == pytest.approx(plain.decay / plain.samples, abs=0.01)
        assert found == dataclasses.replace(plain, samples=samples, decay=found.decay)
    own = make_config({**LEAST, "preset": "tiny", "decoder": {"samples": 1000, "decay": 0}}).decoder
    assert own.decay == 0
    with pytest.raises(UserError, match="decoder: decay is 2000: use at most samples, 1000"):
        make_config({**LEAST, "preset": "tiny", "decoder": {"samples": 1000, "decay": 2000}})


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"decoder_steps": 1}, "bundle.sampling: decoder_steps is 1: use 2 or more"),
        ({"decoder_steps": 5000}, "bundle.sampling.decoder_steps is 5000, and decoder has 1000 timesteps: use 2 to"),
        ({"prior_steps": 5000}, "bundle.sampling.prior_steps is 5000, and diffusion_prior has 1000 timesteps"),
        ({"upsampler_1024_steps": 1001}, "bundle.sampling.upsampler_1024_steps is 1001, and upsampler_1024 has 1000"),
        (
            {"decoder_threshold": 99.5},
            "bundle.sampling: decoder_threshold is 99.5: use a share from 0 to 1, such as 0.995",
        ),
        ({"tile": 100}, "bundle.sampling.tile is 100: upsampler_256 takes multiples of 8 px"),
        ({"tile": 8}, "bundle.sampling.tile is 8: upsampler_256 takes multiples of 8 px, from 16 on"),
    ],
)
def test_steps_and_tiles_that_sampling_would_refuse_are_refused_here(sampling: dict[str, int], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config({**LEAST, "bundle": {"sampling": sampling}})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    small = {"models": ["diffusion_prior", "decoder"], "sampling": {"size": 64, "upsampler_256_steps": 27}}
    make_config({**LEAST, "bundle": small, "upsampler_256": {"model": {"steps": 20}}})  # a model that is not sampled
    with pytest.raises(UserError, match="upsampler_256_steps is 27, which takes 50 or more timesteps"):
        make_config({**LEAST, "upsampler_256": {"model": {"steps": 40}}})


@pytest.mark.parametrize(
    ("model", "dropped", "sampling"),
    [
        ("decoder", "drop_text", {"decoder_guidance": 1.0}),
        ("decoder", "drop_image", {"decoder_guidance": 1.0}),
        ("diffusion_prior", "drop_text", {"prior_guidance": 1.0, "prior": "diffusion"}),
    ],
)
def test_what_was_never_trained_without_its_condition_is_not_guided(
    model: str, dropped: str, sampling: dict[str, Any]
) -> None:
    values = {**LEAST, model: {"model": {dropped: 0}}, "bundle": {"sampling": sampling}}
    with pytest.raises(UserError, match=r"guidance is 1\.0, and the model was trained without .*drop_"):
        make_config(values)
    make_config({**values, "bundle": {"sampling": {**sampling, f"{model.removeprefix('diffusion_')}_guidance": 0}}})


@pytest.mark.parametrize("scale", [0, -1, True, "half", float("inf"), float("nan"), None])
def test_a_scale_that_is_not_a_number_above_0_is_refused(scale: object) -> None:
    with pytest.raises(UserError, match=r"^scale: (expected a (finite )?number, got|-?[01] is not above 0)"):
        make_config({**LEAST, "scale": scale})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_every_model(preset: str) -> None:
    config = make_config({**LEAST, "preset": preset})
    values = yaml.safe_load((ROOT / f"pipeline/presets/{preset}.yaml").read_text())
    for stage, fields in values.items():
        recipe = getattr(config, stage)
        model = fields.pop("model", {}) | fields.pop("sampling", {})
        assert {name: json.loads(json.dumps(getattr(recipe, name))) for name in fields} == fields
        inner = getattr(recipe, "sampling" if stage == "bundle" else "model", None)
        assert {name: json.loads(json.dumps(getattr(inner, name))) for name in model} == model


def test_a_stage_may_have_a_preset_of_its_own_and_single_fields_win() -> None:
    decoder = {"preset": "tiny", "model": {"dropout": 0.3}}
    config = make_config({**LEAST, "preset": "nano", "decoder": decoder})
    assert config.decoder.model == dataclasses.replace(preset_config("tiny").decoder.model, dropout=0.3)
    assert config.decoder.samples == preset_config("tiny").decoder.samples
    assert config.upsampler_256.model == preset_config("nano").upsampler_256.model


def test_relative_paths_count_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every folder it is the same project; what the command line names counts from the current one."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/urls").write_text("http://a.test/")
    path = tmp_path / "mine/p.yaml"
    path.write_text(
        "project: p\nstore: out/store\npairs: {deny_urls: urls}\n"
        "source: {paths: [a.csv, ../b.csv, /c.csv, 'drawings:nano'], roots: ['s3://bucket', images]}\n"
    )
    for folder in (tmp_path, tmp_path / "mine", ROOT):
        monkeypatch.chdir(folder)
        config = load_config(path, ["run.pairs.hosts={store: 'x:1'}"])
        assert Path(config.store).absolute() == tmp_path / "mine/out/store"
        assert Path(config.run.output).absolute() == tmp_path / "mine/out"
        assert [os.path.abspath(p) for p in config.source.paths[:3]] == [
            f"{tmp_path}/mine/a.csv", f"{tmp_path}/b.csv", "/c.csv"
        ]  # fmt: skip
        assert config.source.paths[3] == "drawings:nano"
        assert config.source.roots[0] == "s3://bucket"
        assert config.pairs.deny_urls is not None
        assert config.run.pairs.hosts == {"store": "x:1"}
    monkeypatch.chdir(tmp_path)
    assert load_config(path, ["store=here"]).store == "here"
    (tmp_path / "out/store").mkdir(parents=True)  # made when paths counted from the current folder
    with pytest.raises(UserError, match=r"p\.yaml: store out/store is relative to .*write store: \.\./out/store$"):
        load_config(path)


def test_a_count_in_words_is_the_count(least: Path) -> None:
    counts = ("100000", "100k", "1e5", "1.0e+5", "100000.0")
    one, *others = (load_config(least, ["preset=tiny", f"decoder.samples={count}"]) for count in counts)
    assert others == [one] * 4
    assert one.decoder.decay < 100_000  # its share of the preset's


def test_a_decay_shrinks_with_samples_that_only_the_recipe_gives(least: Path) -> None:
    usual, short = load_config(least, ["preset=paper"]), load_config(least, ["preset=paper", "clip.samples=1M"])
    assert short.clip.decay == round(1_000_000 * usual.clip.decay / usual.clip.samples)


def test_overrides_are_yaml_and_the_last_one_wins(least: Path) -> None:
    config = load_config(
        least,
        [
            "decoder.model.dropout=0.2", "decoder.model.dropout=0.3", "source.paths=[b.csv, c.csv]", "preset=nano",
            "run.pairs.hosts={a.test: '127.0.0.1:80'}", "codec.variance_target=null", "clip.learning_rate=1e-4",
            "samples.captions=['a = b']",
        ],
    )  # fmt: skip
    assert config.decoder.model.dropout == 0.3
    assert config.decoder.model.channels == preset_config("nano").decoder.model.channels
    assert config.source.paths == ("b.csv", "c.csv")
    assert config.run.pairs.hosts == {"a.test": "127.0.0.1:80"}
    assert config.codec.variance_target is None
    assert config.clip.learning_rate == 1e-4
    assert config.samples.captions == ("a = b",)


def test_an_empty_override_empties(least: Path) -> None:
    values = yaml.safe_load(least.read_text()) | {"run": {"decoder": {"nodes": {"pool": "gpu"}}}}
    assert load_config(values, ["run.decoder.nodes={zone: b}"]).run.decoder.nodes == {"pool": "gpu", "zone": "b"}
    assert load_config(values, ["run.decoder.nodes={}"]).run.decoder.nodes == {}
    assert load_config(values, ["preset=tiny", "decoder={}"]).decoder == load_config(least, ["preset=tiny"]).decoder


def test_the_output_may_lie_at_home(least: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(least, ["run.output=~/out"]).run.output == "/home/me/out"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoder", "decoder: an override is written key.key=value"),
        ("=3", "=3: an override is written key.key=value"),
        ("decoder.samples=[1", "decoder.samples=[1: [1 is not YAML; write a number, a word, or a list such as [a, b]"),
        ("project=2024-02-30", "project=2024-02-30: 2024-02-30 is not YAML"),  # reads as a day that there is not
        ("decoder.samples=0x_", "decoder.samples=0x_: 0x_ is not YAML"),
        ("decoder={batch: 8, batch: 9}", "decoder={batch: 8, batch: 9}: {batch: 8, batch: 9} is not YAML"),
        ("run.pairs.retrys=1", "run.pairs.retrys: unknown key; did you mean retries?"),
        ("run.embeddings.gpus=1.5", "run.embeddings.gpus: 1.5 is neither a share of one GPU nor a whole"),
        ("run.embeddings.gpus=-1", "run.embeddings.gpus: -1 is neither a share of one GPU"),
        ("run.ray.object_store_mb=99", "run.ray.object_store_mb: 99 is below 100"),
        ("curation.near_duplicate=1.5", "curation.near_duplicate: 1.5 is above 1"),
        ("thresholds.similarity=1", "thresholds.similarity: 1 is not below 1"),
        ("index.flat_rows=255", "index.flat_rows: 255 is below 256"),
        ("clip.learning_rate=.nan", "clip.learning_rate: expected a finite number, got nan"),
        ("decoder.beta2=1", "decoder.beta2: 1 is not below 1"),
        ("run.xyz=1", "run.xyz: unknown key; known are"),
        ("decoder.model.vocabulary=50000", "decoder.model.vocabulary: 50000; CLIP's tokens are 49408, so leave it out"),
        ("codec=[]", "codec: expected a mapping, got []"),
        ("preset=[nano]", "preset: ['nano'] is not one of nano, tiny, small, karlo, paper"),
        ("clip.preset=huge", "preset: 'huge' is not one of nano, tiny, small, karlo, paper"),
        ("samples.captions=[]", "samples.captions: has 0 entries; name 1 or more"),
        ("evaluation.rows=7", "evaluation.rows: 7 is below 8"),
        ("release.gates=[]", "release.gates: unknown key"),
        ("evaluation.judge=train", "evaluation: judge is 'train': use open_clip:NAME:TAG, local-dir:FOLDER or null"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(least: Path, override: str, message: str) -> None:
    """See test_parse.py and tests/jobs/test_table_of_mistakes.py for others."""
    with pytest.raises(UserError) as caught:
        load_config(least, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": {"buckets": 512}}, "codec.buckets: 512 is not ar_prior.model.buckets 1024"),
        ({"pairs": {"image_size": 512}}, "pairs.image_size: 512 is too small for upsampler_1024"),
        (
            {"decoder": {"model": {"image_size": 128, "patch": 8}}},
            "decoder.model.image_size: 128; the cascade begins at 64",
        ),
        (
            {"upsampler_256": {"model": {"low_size": 128}}},
            "upsampler_256.model: makes 128 -> 256; the cascade needs 64",
        ),
        ({"bundle": {"models": ["decoder"]}}, "bundle: models: a bundle needs the decoder and at least one prior"),
        ({"bundle": {"models": ["ar_prior"]}}, "bundle: models: a bundle needs the decoder and at least one prior"),
        ({"bundle": {"models": ["decoder", "clip"]}}, "bundle: models: clip is not one of ar_prior"),
        (
            {"bundle": {"models": ["ar_prior", "decoder", "upsampler_1024"]}},
            "bundle: models: upsampler_1024 needs upsampler_256 before it",
        ),
        ({"bundle": {"models": ["ar_prior", "decoder"]}}, "bundle: sampling.prior: diffusion, but diffusion_prior"),
        (
            {"bundle": {"models": ["diffusion_prior", "decoder"]}},
            "bundle: sampling.size: 1024, but these models reach 64 px at most",
        ),
        ({"source": {"paths": []}}, "source.paths: has 0 entries; name 1 or more"),
        (
            {"source": {"paths": ["a"], "test": 0.6, "validation": 0.4}},
            "source: validation and test: these shares leave no rows",
        ),
    ],
)
def test_combinations_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config({**LEAST, "preset": "nano", **changes})
    assert str(caught.value).startswith(message)


def test_a_bundle_that_stops_early_needs_less() -> None:
    bundle = {"models": ["diffusion_prior", "decoder"], "sampling": {"size": 64}}
    graph = build(
        make_config({**LEAST, "preset": "nano", "bundle": bundle, "pairs": {"image_size": 64}, "codec": {"buckets": 9}})
    )
    assert set(graph) == {
        "source", "captions", "pairs", "filter", "clip", "embeddings", "curation", "index", "diffusion_prior",
        "decoder", "bundle", "samples", "evaluation",
    }  # fmt: skip


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """See tests/jobs/test_table_of_mistakes.py for others."""
    day = "not valid YAML: day is out of range for month"
    for content, said in ((b"\xff\xfe\x00", "cannot be read"), (b"samples: {captions: [2021-02-30]}", day)):
        (tmp_path / "my.yaml").write_bytes(content)
        with pytest.raises(UserError, match=rf"my\.yaml: {said}"):
            load_config(tmp_path / "my.yaml")


def test_a_key_that_stands_twice_is_refused_and_values_that_are_merged_are_not(least: Path) -> None:
    text = least.read_text()
    least.write_text(f"{text}run: {{budget_hours: 1}}\nsamples: {{seed: 1}}\nrun: {{lease_s: 9}}\n")
    with pytest.raises(UserError, match=r"least\.yaml: not valid YAML: run stands twice; make one of it .*line 6"):
        load_config(least)
    least.write_text(f"{text}clip: &own {{eps: 0.1}}\ndecoder: &more {{<<: *own, eps: 0.2}}\nar_prior: {{<<: *more}}\n")
    config = load_config(least)
    assert (config.clip.eps, config.decoder.eps, config.ar_prior.eps) == (0.1, 0.2, 0.2)


def test_a_heading_without_values_leaves_the_output_beside_the_file(least: Path) -> None:
    least.write_text(f"{least.read_text()}run:\n  # budget_hours: 1\n")
    assert Path(load_config(least).run.output) == least.parent / "out"
