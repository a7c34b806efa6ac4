"""unclip plan with costs, as a user calls it: a list that is not there yet, slips, and a probe of a real chain."""

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.probe import _write_lists
from jobs.project import open_project
from pipeline.data.source.journal import change_journal, reference_mark, with_forgotten
from pipeline.data.source.lists import read_rows
from tests.chain import ROOT, done, here, refused, unclip, write_config, write_list


@pytest.mark.slow  # it counts the arithmetic of the largest models; test_for_programs.py plans for a list of some size
def test_the_table_of_the_documents_is_what_the_command_prints() -> None:
    page = (ROOT / "docs/scale.md").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^    (unclip plan .*--pairs .*)$", page, flags=re.MULTILINE)
    printed = done(here(*shlex.split(command)[1:])).splitlines()
    shown = [line.removeprefix("    ") for line in page.splitlines() if line.startswith("    ")]
    start = shown.index(printed[0])
    assert shown[start : start + len(printed)] == printed


def _sixty_pairs(folder: Path, more: str = "") -> str:
    (folder / "list.csv").write_text("url,caption\n" + "".join(f"http://closed.test/{i},a\n" for i in range(60)))
    text = f"project: p\npreset: nano\nstore: {folder}/store\nsource: {{paths: [{folder}/list.csv], test: 0.2}}\n"
    (folder / "mine.yaml").write_text(text + more)
    return str(folder / "mine.yaml")


def test_what_a_gpu_does_in_minutes_is_not_left_to_a_cpu_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    config = _sixty_pairs(tmp_path, "decoder: {preset: small}\nrun: {decoder: {keep_checkpoints: 1}}\n")
    assert main(["run", config, "--until", "decoder"]) == 2
    shown = capsys.readouterr()
    assert re.search(r"^runs on .*1 core \(.*\)$", shown.out, re.MULTILINE)
    assert re.fullmatch(
        r"error: decoder needs a GPU: \d+ cores? would take about .* for decoder; run it where there is one, or take "
        r"preset=tiny, or scale=0\.1; add --yes to go on anyway\n",
        shown.err,
    )
    assert main(["plan", config]) == 0
    assert re.search(r"^warning: decoder needs a GPU: .*preset=tiny", capsys.readouterr().out, re.MULTILINE)
    assert main(["plan", config, "--pairs", "1000"]) == 0
    assert re.search(r"^warning: decoder needs a GPU: .*preset=tiny", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "store/runs").exists()
    request.getfixturevalue("gpus")
    assert main(["plan", config, "-v", "run.clip.device=cpu", "run.ar_prior.workers=2"]) == 0
    said = capsys.readouterr().out
    assert "8 H100 (diffusion_prior, decoder, upsampler_256, upsampler_1024)" in said
    assert "2 H100 (ar_prior)" in said
    assert "1 H100 (embeddings, samples, evaluation)" in said
    assert "clip" not in re.findall(r"H100 \((.*?)\)", said)
    assert "assumed: one H100 reaches" in said


def test_captions_that_curation_would_reject_are_said_before_clip_learns_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = [1000, 1001, 1500, 40, 40, 40]
    rows = [f"http://closed.test/{i},{'a cat ' * (n // 6)}{'x' * (n % 6)}\n" for i, n in enumerate(lengths)]
    Path("list.csv").write_text("url,caption\n" + "".join(rows))
    said = "2 of 6 pairs have a first caption of more than 1,000 characters"
    assert main(["init", "mine", "list.csv"]) == 0
    found = capsys.readouterr().out
    assert "2 of the first 6 captions have more than 1,000 characters" in found
    assert re.search(r"3 of the first 6 captions have more than the \d+ tokens that this CLIP reads", found)
    assert main(["plan", "mine.yaml", "preset=nano"]) == 0
    assert f"warning: {said}" in capsys.readouterr().out
    assert main(["plan", "mine.yaml", "preset=nano", "--json"]) == 0
    assert any(said in line for line in json.loads(capsys.readouterr().out)["warnings"])
    assert main(["plan", "mine.yaml", "preset=nano", "curation.max_caption=1500"]) == 0
    assert "first caption" not in capsys.readouterr().out
    monkeypatch.setattr("jobs.doctor.check_nodes", lambda *_: ())
    main(["doctor", "mine.yaml", "preset=nano"])
    assert said in capsys.readouterr().out


def test_a_probe_fetches_nothing_that_was_forgotten(tmp_path: Path, pictures: str) -> None:
    config = write_config(tmp_path, str(tmp_path / "store"), pictures, [write_list(tmp_path / "list.csv", 0, 6)])
    urls = [row.url for row in read_rows(str(tmp_path / "list.csv"), open_project(config).config.source)]
    marks = {reference_mark(url) for url in urls[:2]}
    change_journal(open_project(config).store, open_project(config).config.project, lambda j: with_forgotten(j, marks))
    _write_lists(open_project(config), tmp_path)
    written = pq.read_table(tmp_path / "1.parquet").to_pylist()
    assert [row["url"] for row in written] == ["", "", *urls[2:]]
    assert written[0]["caption"] == []
    assert written[2]["caption"]


@pytest.mark.slow
def test_a_probe_measures_every_stage_and_writes_nothing(tmp_path: Path, pictures: str) -> None:
    rows = write_list(tmp_path / "list.csv", 0, 60)
    config = write_config(tmp_path, str(tmp_path / "store"), pictures, [rows])
    said = done(unclip("plan", config, "--probe"))
    assert "it ended early" not in said
    assert "(a guess)" not in said
    assert not (tmp_path / "store").exists()  # only the scratch stores were written
    line = next(line for line in said.splitlines() if line.startswith("measured and scaled: "))
    measured = {"source", "pairs", "clip", "embeddings", "codec", "decoder", "samples", "evaluation"}
    assert measured <= {word.strip(",;") for word in line.split()}


def test_a_disk_that_is_too_small_is_told_of_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _sixty_pairs(tmp_path)
    many = "run.decoder.keep_checkpoints=1000000000000"
    says = rf"the disk of .*the store {tmp_path}/store is too small: about .* PB will be needed, and .* are free; "
    said = refused("run", config, many, says="; add --yes to go on anyway").stderr
    assert re.match(f"error: {says}", said)
    assert not (tmp_path / "store").exists()
    assert main(["plan", config, many]) == 0
    assert re.search(rf"^warning: {says}", capsys.readouterr().out, re.MULTILINE)
    assert main(["run", config, many, "--yes", "-n"]) == 0
