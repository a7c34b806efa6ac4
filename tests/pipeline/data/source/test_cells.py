"""Parquet files with images inside, as Hugging Face's datasets writes them."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.pairs.preview import preview
from pipeline.data.source import tables
from pipeline.data.source.cells import read_cells
from pipeline.data.source.lists import read_rows, source_at
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError
from pipeline.local import NOTHING, PathPolicy
from tests.pipeline.data.bench import Page, picture, serving, write_list

LOST = (b"", b"<html>", None)


def write(path: Path, images: list[bytes | None], group: int = 4, **columns: Any) -> Path:
    structs = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    captions = [f"picture {i}" for i in range(len(images))]
    pq.write_table(pa.table({"image": structs, "text": captions, **columns}), path, row_group_size=group)
    return path


def rows_of(path: Path) -> list[ListRow]:
    return list(read_rows(str(path), SourceRecipe((str(path),))))


def bytes_of(path: Path, rows: list[ListRow], most: int = 1 << 20) -> list[bytes | str]:
    return list(read_cells([row.url for row in rows], most, PathPolicy((str(path.parent),))))


def test_what_datasets_writes_is_fetched_out_of_its_files(tmp_path: Path) -> None:
    """Two parts, with captions and splits; what is no image costs its own row."""
    import datasets

    for part in range(2):
        images = [{"bytes": data, "path": None} for data in (*(picture(10 * part + i) for i in range(6)), *LOST[:2])]
        names = [[f"picture {10 * part + i}", "another"] for i in range(8)]
        table = {"image": images, "text": names, "split": ["train"] * 7 + ["test"]}
        kinds = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}
        features = datasets.Features({**kinds, "split": datasets.Value("string")})
        datasets.Dataset.from_dict(table, features).to_parquet(
            str(tmp_path / f"train-0000{part}.parquet"), batch_size=5
        )
    assert [row.captions for row in rows_of(tmp_path)][9] == ("picture 11", "another")
    found = bytes_of(tmp_path / "any", rows_of(tmp_path))
    assert found == [each for part in (0, 10) for each in (*(picture(part + i) for i in range(6)), *LOST[:2])]
    seen = preview(SourceRecipe((str(tmp_path),)))
    assert seen.sides == (72,) * 12
    assert {reason for _, reason in seen.unopened} == {"zero_bytes", "not_an_image"}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "jpg"])
def test_a_column_of_bytes_holds_images_where_it_begins_as_they_do(tmp_path: Path, kind: Any, name: str) -> None:
    images = [picture(i, kind="JPEG") for i in range(5)]
    table = {name: pa.array([None, *images], kind), "txt": ["a cat"] * 6}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = bytes_of(tmp_path / "a.parquet", rows_of(tmp_path / "a.parquet"))
    assert found == ["missing_file", *images]


def test_a_file_that_is_replaced_has_other_rows_where_its_images_changed(tmp_path: Path) -> None:
    images: list[bytes | None] = [picture(i) for i in range(10)]
    path = write(tmp_path / "a.parquet", images)
    before = rows_of(path)
    write(path, [*images[:8], picture(99), picture(98), picture(97)])
    after = rows_of(path)
    assert [row.url for row in after[:8]] == [row.url for row in before[:8]]
    assert not {row.url for row in before[8:]} & {row.url for row in after}
    assert bytes_of(path, [*before[:8], *before[8:]]) == [*images[:8], "missing_file", "missing_file"]


def test_images_are_read_in_any_order_within_limits(tmp_path: Path) -> None:
    images: list[bytes | None] = [picture(i, 8 * (i + 1)) for i in range(9)]
    path = write(tmp_path / "a.parquet", [*images, *LOST])
    rows = rows_of(path)
    order = [8, 0, 3, 3, 2, 7, 11, 5, 9]
    whole = [*images, b"", b"<html>", "missing_file"]
    assert bytes_of(path, [rows[i] for i in order]) == [whole[i] for i in order]
    most = len(images[4] or b"")
    assert [found == "too_large" for found in bytes_of(path, rows[:9], most)] == [len(data) > most for data in images]
    row = rows[0].url
    for url, reason in (
        (row.replace("row=0", "row=4"), "missing_file"), (row.replace("group=0", "group=9"), "missing_file"),
        (row.replace("row=0", "row=-1"), "unsupported_reference"), ("parquet://x", "unsupported_reference"),
        (row.replace("column=image", "column=text"), "missing_file"), (row.replace("a.par", "b.par"), "missing_file"),
    ):  # fmt: skip
        assert list(read_cells([url], 1 << 20, PathPolicy((str(tmp_path),)))) == [reason]
    assert list(read_cells([row], 1 << 20, NOTHING)) == ["forbidden_reference"]


def test_a_damaged_page_costs_the_rows_behind_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.parquet", [picture(i) for i in range(12)])
    place = pq.read_metadata(path).row_group(1).column(0)
    start, size = place.dictionary_page_offset or place.data_page_offset, place.total_compressed_size
    data = path.read_bytes()
    path.write_bytes(data[:start] + b"\xff" * size + data[start + size :])
    caplog.set_level("INFO", "unclip")
    found = bytes_of(path, rows_of(path))
    assert found[:4] == [picture(i) for i in range(4)]
    assert found[4:] == ["decode_error"] * 8
    assert "a.parquet: images in it cannot be read" in caplog.text


def test_a_list_names_images_in_parquet_files_of_its_own_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    own = rows_of(write(tmp_path / "own/a.parquet", [picture(0)]))[0].url
    other = rows_of(write(tmp_path / "other/a.parquet", [picture(0)]))[0].url
    path = Path(write_list(tmp_path / "own/list.csv", [(own, "a"), (other, "b")]))
    assert [row.reject for row in rows_of(path)] == [None, "forbidden_reference"]


def test_a_table_on_the_web_with_images_inside_has_to_be_downloaded(tmp_path: Path) -> None:
    body = write(tmp_path / "a.parquet", [picture(0)]).read_bytes()
    with serving({"/a.parquet": Page(body, headers={"ETag": "1"})}) as address:
        url = f"http://{address}/a.parquet"
        with pytest.raises(UserError, match="images inside of a file are read on this machine; download it"):
            list(read_rows(url, SourceRecipe((url,))))


def test_a_large_file_is_known_by_its_size_and_time_in_place_of_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", [picture(0)])
    for largest, same in ((tables.LARGE, True), (10, False)):
        monkeypatch.setattr(tables, "LARGE", largest)
        before = source_at(str(path)).fingerprint()
        os.utime(path, (largest, largest))
        assert (source_at(str(path)).fingerprint() == before) == same
