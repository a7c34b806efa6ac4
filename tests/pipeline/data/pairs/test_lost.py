"""Rows that pairs lost are named, with what to do about where they lie."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.run import _list_lost
from pipeline.data.fetch.opener import Guard
from pipeline.data.pairs.lost import (
    FILE,
    blocked_rows,
    check_any_kept,
    lost_lines,
    lost_text,
    place_advice,
)
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.report.data import data_section
from pipeline.report.inputs import ReportInput
from tests.pipeline.data.bench import Bench, picture


@pytest.mark.parametrize(
    ("reason", "urls", "says"),
    [
        (
            "forbidden_address",
            ["http://10.0.0.1/a.png", "http://nas.home/b.png"],
            "allow: [10.0.0.1, nas.home] below pairs",
        ),
        ("forbidden_reference", ["/data/a/1.png", "file:///data/b%20c/2.png"], "roots: [/data/a, /data/b c] below"),
        ("forbidden_reference", ["/data/a/b/1.png", "/data/a/c/2.png"], "roots: [/data/a] below source:"),
        ("forbidden_reference", ["/etc/passwd", "/data/a/1.png"], "roots: [/data/a] below source:"),
        ("forbidden_reference", ["/mnt/x, y/1.png", "s3://birds/1.png"], "roots: ['s3://birds', '/mnt/x, y'] below"),
        ("forbidden_reference", ["", "no URL [at all", "/a.png"], ""),
        ("truncated", ["/data/a.png"], ""),
    ],
)
def test_the_line_to_paste_has_the_very_place(reason: str, urls: list[str], says: str) -> None:
    advice = place_advice(reason, urls)
    assert says in advice
    assert bool(advice) == bool(says)


def test_a_link_is_advised_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "photos/a.png").write_bytes(picture(1))
    link = tmp_path / "links/a.png"
    link.symlink_to(tmp_path / "photos/a.png")
    assert f"roots: [{tmp_path}/photos] below" in place_advice("forbidden_reference", [f"file://{link}"])


def test_lost_rows_are_named_by_reason_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"x{i}.png").write_bytes(b"<html>")
    (folder / "cut.png").write_bytes(picture(9)[:-200])
    for file in sorted(folder.iterdir()):
        file.with_suffix(".txt").write_text("a cat")
    bench = Bench(tmp_path / "store", [str(folder)])
    made = bench.make("source", "pairs")
    lines = list(lost_lines(bench.store, made, None, "mine.yaml", "out/rejected.txt"))
    place = str(folder)
    assert f"not_an_image: {place}/x0.png, {place}/x1.png, {place}/x2.png and 1 more" in lines
    assert any(line.endswith(f": {place}/cut.png") for line in lines)
    assert "out/rejected.txt" in lines[-1]
    assert not any("retry" in line for line in lines)
    rows = [line.split("\t") for line in lost_text(bench.store, made).splitlines()[1:]]
    assert [row[3] for row in rows] == [f"file://{place}/{name}.png" for name in ("cut", "x0", "x1", "x2", "x3")]
    assert rows[1][:2] == ["not_an_image", "rejected"]
    check_any_kept(bench.store, made)
    project: Any = SimpleNamespace(store=bench.store, config=SimpleNamespace(run=SimpleNamespace(output=tmp_path)))
    file = tmp_path / FILE
    for before, after in (("", whole := lost_text(bench.store, made)), (once := whole[:-9], once)):
        file.write_text(before)
        _list_lost(project, made)  # a list of these artefacts is not read of the store again
        assert file.read_text() == after
    assert "rejected.txt beside this page names each" in data_section(
        ReportInput(bench.store, bench.made, folder=tmp_path)
    )


def test_pairs_without_a_row_are_an_error_that_says_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    listed = tmp_path / "lists/pairs.csv"
    listed.write_text("url,caption\n" + "".join(f"/elsewhere/{i}.png,a cat\n" for i in range(9)) + ",no image\n")
    bench = Bench(tmp_path / "store", [str(listed)])
    made = bench.make("source", "pairs")
    with pytest.raises(
        UserError, match=r"no pair is left: 9 of 10 rows are forbidden_reference .* roots: \[/elsewhere\]"
    ):
        check_any_kept(bench.store, made)
    found = blocked_rows(SourceRecipe((str(listed),)), Guard({}, ()))
    assert found.nearly_all
    assert [line.split(" are ")[0] for line in found.lines()] == ["9 of the first 10 rows"]


def test_hosts_are_refused_by_name_only_where_that_is_sure(tmp_path: Path) -> None:
    listed = tmp_path / "pairs.csv"
    hosts = ("127.0.0.1:80", "[::1]", "localhost", "93.184.215.14", "example.org", "nas")
    listed.write_text("url,caption\n" + "".join(f"http://{host}/a.png,a cat\n" for host in hosts))
    source = SourceRecipe((str(listed),))
    found = blocked_rows(source, Guard({}, ()))
    assert (found.rows, len(found.urls["forbidden_address"]), found.nearly_all) == (6, 3, False)
    assert "allow: [127.0.0.1, '::1', localhost]" in next(found.lines())
    assert not blocked_rows(source, Guard({"localhost": "1.1.1.1:80"}, ("127.0.0.0/8", "::1"))).urls
