"""``unclip generate`` as a user runs it: on workers, one of which is killed."""

import json
import shutil
from pathlib import Path

import pytest

from tests.chain import done, unclip
from tests.pipeline.test_generation import publish_bundle


@pytest.mark.slow
def test_a_worker_that_dies_costs_no_picture(tmp_path: Path) -> None:
    """Three shards on one worker, killed before its first record, and in this process: the same files."""
    _, bundle = publish_bundle(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"picture {i}\n" for i in range(130)))
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    outputs = []
    for store, workers in (("store", 1), ("other", 0)):
        out = tmp_path / f"out-{workers}"
        out.mkdir()
        (out / "bundle.json").write_text(json.dumps({"store": str(tmp_path / store), "bundle": bundle.key}))
        words = ("generate", prompts, "--from", out, "--workers", workers, "--batch", 16)
        options = ("--set", "size=64", "--set", "decoder_steps=2", "--set", "prior_steps=2")
        crash = {"UNCLIP_CRASH": f"shard.before_record@{tmp_path / 'killed'}"} if workers else {}
        ended = unclip(*words, *options, env=crash)
        said = done(ended)
        assert "logging.cc" not in ended.stderr  # Ray's, about itself
        assert "generation: 130 of 130" in ended.stderr
        assert "130 pictures, " in said
        assert f"3 tars, each with a table of seeds and scores: {out}/generated" in said
        outputs.append({path.name: path.read_bytes() for path in (out / "generated").iterdir()})
    assert (tmp_path / "killed").exists()
    assert len(outputs[0]) == 2 * 3 + 1
    assert outputs[0] == outputs[1]


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    nowhere = unclip("generate", tmp_path / "prompts.txt", "--from", tmp_path)
    assert nowhere.returncode == 2
    assert "no finished bundle there" in nowhere.stderr
