"""Captions of a vision model as a user has them made: by the page's commands, and after kills."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.source.rows import read_captions
from pipeline.graph.artifacts import read_shards
from pipeline.store import open_store
from tests.chain import ROOT, done, here
from tests.chain import unclip as run
from tests.faults import artifact
from tests.jobs.kills import IN_ARTIFACTS, contents, killed_everywhere, unclip
from tests.jobs.pages import commands, small
from tests.pipeline.data.bench import picture, write_listed
from tests.vision import KEY, Vision, serving

PAGE = (ROOT / "docs/recaption.md").read_text()
SPLITS = ["validation" if i % 8 == 5 else "test" if i % 8 == 7 else "train" for i in range(24)]


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vision]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as vision:
        monkeypatch.setenv("OPENAI_BASE_URL", vision.url)
        yield vision


def configure(folder: Path, path: str, **settings: Any) -> Path:
    """A configuration of a list with what the page adds to it, small enough to run."""
    folder.mkdir(exist_ok=True)
    [added] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    given = {"project": "my-project", "store": "store", "source": {"paths": [path], "shard_rows": 10}}
    values = small(given) | yaml.safe_load(added)
    values["run"] |= {"output": "out", "lease_s": 0.2, "recaption": {"workers": 0, **settings}}
    (folder / "my-project.yaml").write_text(yaml.safe_dump(values))
    return folder / "my-project.yaml"


def test_the_commands_of_the_page_caption_and_train(tmp_path: Path, vision: Vision) -> None:
    configure(tmp_path, write_listed(tmp_path, [picture(i) for i in range(24)], SPLITS))
    said = [done(here(*command.split()[1:], cwd=tmp_path)) for command, whole in commands(PAGE) if whole]
    assert len(said) == 3
    assert "warning: recaption sends up to 24 images to Qwen/Qwen2.5-VL-7B-Instruct: roughly " in said[0]
    assert re.search(r"^  recaption +stale ", said[0], re.MULTILINE)
    assert re.search(r"^  recaption +fresh ", said[2], re.MULTILINE)
    assert vision.asked.total() == 24
    store = open_store(str(tmp_path / "store"))
    made, trained = artifact(store, "recaption"), artifact(store, "decoder")
    assert trained.inputs["recaption"] == made.key
    assert "captions" not in trained.inputs
    page = (tmp_path / "out/report.html").read_text()
    section = page.partition('<section id="stage-recaption">')[2].partition("</section>")[0]
    assert "<td>made captions</td>" in section
    assert len(re.findall(r"the list: picture \d+; made: picture [0-9a-f]{12} of ", section)) >= 8
    texts = [text for shard in read_shards(store, made) for text in read_captions(store, shard).values()]
    row = done(here("data", "search", "my-project.yaml", "picture", "--count", "1", cwd=tmp_path)).split("\t")
    assert row[4].strip() in {text[0] for text in texts}
    assert "nothing to do" in done(here("run", "my-project.yaml", cwd=tmp_path))
    secret = KEY.encode()
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and secret in file.read_bytes()]


def test_a_run_that_is_killed_everywhere_pays_once_and_ends_alike(tmp_path: Path, vision: Vision) -> None:
    path = write_listed(tmp_path, [picture(i) for i in range(24)], SPLITS)
    calm, killed = (configure(tmp_path / name, path, url=vision.url) for name in ("calm", "killed"))
    for config in (calm, killed):
        assert unclip("run", config, "--until", "pairs") == 0
    assert unclip("run", calm, "--until", "recaption") == 0
    once = vision.asked
    points = ("shard.before_record", "shard.after_record", *IN_ARTIFACTS)
    words = ("run", killed, "--until", "recaption")
    assert killed_everywhere(points, tmp_path / "kills", unclip, *words) == set(points)
    ours, theirs = (open_store(str(config.parent / "store")) for config in (killed, calm))
    assert contents(ours, "recaption") == contents(theirs, "recaption")
    # Each part was killed once before its record, and asked for again; killed afterwards it was not.
    assert vision.asked - once == once + once


@pytest.mark.slow  # of parts that are killed in the driver, see above
def test_ray_workers_that_are_killed_at_every_record_end_alike(tmp_path: Path, vision: Vision) -> None:
    """What a worker had under way is asked for again: a shard in hand, and the one that is begun beside it."""
    path = write_listed(tmp_path, [picture(i) for i in range(24)], SPLITS)
    calm = configure(tmp_path / "calm", path, url=vision.url)
    on_ray = configure(tmp_path / "ray", path, url=vision.url, workers=2)
    assert unclip("run", calm, "--until", "recaption") == 0
    assert unclip("run", on_ray, "--until", "pairs") == 0
    once = vision.asked
    kills = tmp_path / "kills"
    kills.mkdir()
    crash = {"UNCLIP_CRASH": f"shard.before_record@{kills}"}
    done(run("run", on_ray, "--until", "recaption", env=crash))
    assert len(list(kills.iterdir())) == 3 + 3  # answers of a shard, and its joined captions
    theirs, ours = (open_store(str(config.parent / "store")) for config in (calm, on_ray))
    assert contents(ours, "recaption") == contents(theirs, "recaption")
    asked = vision.asked - once
    assert asked.keys() == once.keys()
    assert all(2 <= count <= 1 + 3 for count in asked.values())  # three of the kills were between answers and record
