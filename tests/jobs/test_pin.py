"""``unclip pin`` moves a pin and says what follows; a dry run says it and moves nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from jobs.project import open_project
from models.clip import Clip
from pipeline.config import preset_config
from tests.pipeline.data.bench import picture, save_clip, write_listed

ROWS = 40
Say = Callable[..., str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a configuration that ran to the codec, beside a CLIP that has embedded its rows and one that has not."""
    folder = tmp_path_factory.mktemp("pin")
    splits = ["test" if i % 4 == 3 else "train" for i in range(ROWS)]
    listed = write_listed(folder, [picture(i) for i in range(ROWS)], splits)
    Clip.build(replace(preset_config("nano").clip.model, embed_dim=32), seed=1).save(folder / "narrow")
    values = {
        "project": "pins",
        "preset": "nano",
        "store": str(folder / "store"),
        "source": {"paths": [listed], "shard_rows": 10},
        "clip": {"weights": save_clip(folder / "clip")},
        "codec": {"components": 4},
        "run": {name: {"workers": 0} for name in ("pairs", "embeddings", "thresholds", "curation", "index", "codec")},
    }
    path = folder / "pins.yaml"
    path.write_text(yaml.safe_dump({**values, "run": {**values["run"], "output": str(folder / "out")}}))
    for changes in ((), other_clip(folder)):
        assert main(["run", str(path), *changes, "--until", "codec"]) == 0
    assert main(["run", str(path), bare_clip(folder), "--until", "clip"]) == 0
    return path


def other_clip(folder: Path) -> tuple[str, ...]:
    """Returns overrides that take the CLIP of 32 dimensions."""
    return (f"clip.weights=local-dir:{folder / 'narrow'}",)


def bare_clip(folder: Path) -> str:
    """Returns an override that takes a CLIP that has embedded nothing."""
    return f"clip.weights=local-dir:{folder / 'clip'}/."


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


def test_a_dry_run_says_what_follows_and_the_move_says_the_same(config: Path, say: Say) -> None:
    own, other = key(config, "clip"), key(config, "clip", *other_clip(config.parent))
    said = say("pin", "clip", "--key", other[:12], "--dry-run")
    assert f"  clip            pinned  {other[:12]}  " in said
    assert f"  embeddings      fresh   {key(config, 'embeddings', *other_clip(config.parent))[:12]}" in said
    assert key(config, "clip") == own
    assert say("pin", "clip", "--key", other[:12]) == said
    assert key(config, "clip") == other
    say("pin", "clip", "--key", own[:12])
    assert key(config, "clip") == own


def test_pinning_what_is_pinned_already_changes_nothing(config: Path, say: Say) -> None:
    assert say("pin", "clip") == "nothing becomes stale\n"


def test_what_depends_on_a_clip_that_has_embedded_nothing_is_stale(config: Path, say: Say) -> None:
    own, bare = key(config, "clip"), key(config, "clip", bare_clip(config.parent))
    assert "  embeddings      stale" in say("pin", "clip", "--key", bare)
    assert key(config, "clip") == bare
    say("pin", "clip", "--key", own)


def test_a_dry_run_of_unpin_lifts_nothing(config: Path, say: Say) -> None:
    path = config.parent / "list.csv"
    before = path.read_text()
    path.write_text(before + f"file://{config.parent}/0.png#again,picture again,train,\n")
    try:
        said = say("unpin", "clip", "--dry-run")
        assert "  clip            stale" in said
        assert "nothing becomes stale" in say("pin", "clip", "--dry-run")
        assert "  clip            pinned" in say("plan")
        own = key(config, "clip")
        assert say("unpin", "clip") == said
        assert "  clip            stale" in say("plan")
        say("pin", "clip", "--key", own)
        assert "  clip            pinned" in say("plan")
    finally:
        path.write_text(before)
