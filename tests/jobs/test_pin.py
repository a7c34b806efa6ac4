"""``unclip pin`` moves a pin and says what follows; a dry run says it and moves nothing."""

from dataclasses import replace

import pytest

from jobs.cli import main
from jobs.project import open_project
from pipeline.graph.artifacts import load_artifact, publish_artifact
from tests.jobs.releases import Made

OTHER, BARE = "clip.seed=5", "clip.seed=6"


@pytest.fixture
def pinned(made: Made) -> Made:
    """A project that is pinned to its CLIP; OTHER has embedded its rows, too, and BARE has not."""
    for overrides in ((), (OTHER,)):
        made.make(0.0, *overrides)
    clip = load_artifact(made.store, "clip", key(made, "clip"))
    assert clip is not None
    publish_artifact(made.store, replace(clip, key=key(made, "clip", BARE)), 0.0)
    assert say(made, "pin", "clip") == "nothing becomes stale\n"
    return made


def key(made: Made, stage: str, *overrides: str) -> str:
    return next(v.key for v in open_project(str(made.path), overrides).plan() if v.stage == stage)


def say(made: Made, command: str, *words: str) -> str:
    """Runs a command on the project, which must succeed, and returns what it printed."""
    made.output.readouterr()
    assert main([command, str(made.path), *words]) == 0
    return made.output.readouterr().out


def test_a_dry_run_says_what_follows_and_the_move_says_the_same(pinned: Made) -> None:
    own, other = key(pinned, "clip"), key(pinned, "clip", OTHER)
    said = say(pinned, "pin", "clip", "--key", other[:12], "--dry-run")
    assert f"  clip            pinned  {other[:12]}  " in said
    assert f"  embeddings      fresh   {key(pinned, 'embeddings', OTHER)[:12]}" in said
    assert key(pinned, "clip") == own
    assert say(pinned, "pin", "clip", "--key", other[:12]) == said
    assert key(pinned, "clip") == other


def test_what_depends_on_a_clip_that_has_embedded_nothing_is_stale(pinned: Made) -> None:
    bare = key(pinned, "clip", BARE)
    assert "  embeddings      stale" in say(pinned, "pin", "clip", "--key", bare)
    assert key(pinned, "clip") == bare


def test_a_dry_run_of_unpin_lifts_nothing(pinned: Made) -> None:
    with open(pinned.path.parent / "list.csv", "a") as file:
        file.write("http://closed.test/more.png,more\n")
    said = say(pinned, "unpin", "clip", "--dry-run")
    assert "  clip            stale" in said
    assert "  clip            pinned" in say(pinned, "plan")
    assert say(pinned, "unpin", "clip") == said
    assert "  clip            stale" in say(pinned, "plan")
