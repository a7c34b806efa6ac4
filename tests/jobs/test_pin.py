"""``unclip pin`` says what drifts before it moves anything; a dry run moves nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from jobs.project import open_project
from models.clip import Clip
from models.presets import PRESETS
from pipeline.graph.artifacts import artifact_path, load_artifact
from pipeline.store.records import blob_path
from tests.pipeline.data.bench import picture, save_clip, write_list

ROWS = 40
COARSE = ("codec.buckets=8", "ar_prior.model.buckets=8")
Say = Callable[..., str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that is run up to the codec, with other CLIPs, codecs and thresholds beside its own."""
    folder = tmp_path_factory.mktemp("pin")
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i))
    rows = [(f"file://{folder}/{i}.png", f"picture {i}", "test" if i % 4 == 3 else "train") for i in range(ROWS)]
    listed = write_list(folder / "list.csv", rows)
    narrow = replace(PRESETS["nano"]["clip"], embed_dim=32)
    Clip.build(narrow, seed=1).save(folder / "narrow")
    values = {
        "project": "pins",
        "preset": "nano",
        "store": str(folder / "store"),
        "source": {"paths": [listed], "shard_rows": 10},
        "clip": {"weights": save_clip(folder / "clip")},
        "thresholds": {"similarity": 0.1},
        "codec": {"components": 4},
        "run": {name: {"workers": 0} for name in ("pairs", "embeddings", "thresholds", "curation", "index", "codec")},
    }
    path = folder / "pins.yaml"
    path.write_text(yaml.safe_dump({**values, "run": {**values["run"], "output": str(folder / "out")}}))
    for changes in (
        (),
        ("codec.components=6",),
        COARSE,
        ("thresholds.similarity=0.5",),
        other_clip(folder),
    ):
        assert main(["run", str(path), *changes, "--until", "codec"]) == 0
    assert main(["run", str(path), "clip.weights=local-dir:" + str(folder / "clip") + "/.", "--until", "clip"]) == 0
    return path


def other_clip(folder: Path) -> tuple[str, ...]:
    """Overrides that take the CLIP of 32 dimensions."""
    return (f"clip.weights=local-dir:{folder / 'narrow'}",)


def key(config: Path, stage: str, *overrides: str) -> str:
    return next(v.key for v in open_project(str(config), overrides).plan() if v.stage == stage)


@pytest.fixture
def say(config: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command on the configuration, which must succeed, and returns what it printed."""

    def run(command: str, *words: str) -> str:
        capsys.readouterr()
        assert main([command, str(config), *words]) == 0
        return capsys.readouterr().out

    return run


def test_a_clip_is_compared_on_held_out_rows_before_it_is_moved(config: Path, say: Say) -> None:
    own, other = key(config, "clip"), key(config, "clip", *other_clip(config.parent))
    said = say("pin", "clip", "--key", other[:12], "--dry-run")
    first, *lines = said.splitlines()
    assert first == f"clip {own[:12]} -> {other[:12]}"
    assert lines[0] == "  of 10 test rows:"
    assert re.fullmatch(r"    9\.0 of a picture's 9 nearest pictures stay the same \(9\.0 by chance\)", lines[1])
    rank = re.fullmatch(r"    the median rank of a caption's own picture is ([\d.]+) -> ([\d.]+), of 10", lines[2])
    similarity = re.fullmatch(r"    the mean cosine of caption and picture is (-?[\d.]+) -> (-?[\d.]+)", lines[3])
    assert rank
    assert similarity
    assert similarity[1] != similarity[2]
    assert f"  clip            pinned  {other[:12]}  " in said
    assert f"  embeddings      fresh   {key(config, 'embeddings', *other_clip(config.parent))[:12]}" in said
    assert key(config, "clip") == own  # nothing has moved

    moved = say("pin", "clip", "--key", other[:12])
    assert moved == said
    assert key(config, "clip") == other
    back = say("pin", "clip", "--key", own[:12])
    assert f"is {rank[2]} -> {rank[1]}, of 10" in back
    assert f"is {similarity[2]} -> {similarity[1]}\n" in back
    assert key(config, "clip") == own


def test_what_is_pinned_already_drifts_nowhere(config: Path, say: Say) -> None:
    assert say("pin", "clip") == "nothing becomes stale\n"


def test_a_clip_that_has_embedded_nothing_is_moved_all_the_same(config: Path, say: Say) -> None:
    own, bare = key(config, "clip"), key(config, "clip", f"clip.weights=local-dir:{config.parent / 'clip'}/.")
    said = say("pin", "clip", "--key", bare)
    assert f"the drift is not known: the pairs of now are not embedded with clip {bare[:12]}; unclip run with" in said
    assert "  embeddings      stale" in said
    assert key(config, "clip") == bare
    assert "the drift is not known" in say("pin", "clip", "--key", own)


def test_codecs_are_compared_on_the_same_embeddings(config: Path, say: Say) -> None:
    own, more = key(config, "codec"), key(config, "codec", "codec.components=6")
    said = say("pin", "codec", "--key", more, "--dry-run").splitlines()
    assert said[:2] == [f"codec {own[:12]} -> {more[:12]}", "  of 10 test rows:"]
    shares = re.fullmatch(r"    codes a row 4 -> 6, which hold ([\d.]+) -> ([\d.]+) of the variance", said[2])
    assert shares
    assert 0 < float(shares[1]) < float(shares[2]) <= 1
    errors = re.fullmatch(r"    the mean error of a component after coding is ([\d.]+) -> ([\d.]+)", said[3])
    assert errors
    assert 0 < float(errors[2]) < float(errors[1])
    assert said[4] == "    0% of the codes change, by 0.0 of 1,024 buckets on the mean"  # of the four that both have
    coarse = say("pin", "codec", "--key", key(config, "codec", *COARSE), "--dry-run")
    assert "    buckets 1,024 -> 8: no code means what it meant\n" in coarse


def test_a_codec_of_another_clip_is_told_apart_by_its_dimensions(config: Path, say: Say) -> None:
    narrow = key(config, "codec", *other_clip(config.parent))
    said = say("pin", "codec", "--key", narrow, "--dry-run")
    assert f"the drift is not known: codec {narrow[:12]} is one of embeddings of 32 dimensions" in said
    assert "those of the plan's CLIP have 64" in said


def test_thresholds_are_told_by_their_bound(config: Path, say: Say) -> None:
    project = open_project(str(config), ())
    other = key(config, "thresholds", "thresholds.similarity=0.5")
    bounds = []
    for each in (key(config, "thresholds"), other):
        artifact = load_artifact(project.store, "thresholds", each)
        assert artifact is not None
        bounds.append(f"{artifact.metrics['min_similarity']:.4f}")
    said = say("pin", "thresholds", "--key", other, "--dry-run")
    assert f"  rows are rejected below a similarity of {' -> '.join(bounds)}\n" in said
    assert "  curation        " in said


def test_a_dry_run_of_unpin_lifts_nothing(config: Path, say: Say) -> None:
    path = config.parent / "list.csv"
    before = path.read_text()
    path.write_text(before + f"file://{config.parent}/0.png#again,picture again,train,\n")
    try:
        said = say("unpin", "clip", "--dry-run")
        assert "  clip            stale" in said
        assert "nothing becomes stale" in say("pin", "clip", "--dry-run")
        assert "  clip            pinned" in say("plan")
    finally:
        path.write_text(before)


def test_a_damaged_codec_hinders_no_pin(config: Path, say: Say) -> None:
    store = open_project(str(config), ()).store
    own, coarse = key(config, "codec"), key(config, "codec", *COARSE)
    artifact = load_artifact(store, "codec", coarse)
    assert artifact is not None
    store.delete([blob_path(artifact.blobs["model.safetensors"])])
    said = say("pin", "codec", "--key", coarse)
    assert "the drift is not known: blobs/" in said
    assert key(config, "codec") == coarse
    say("pin", "codec", "--key", own)
    store.delete([artifact_path("codec", coarse)])
