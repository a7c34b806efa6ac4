"""Lists on S3 and on web servers: read as those on this machine, once, and again when they change."""

import gzip
import io
import re
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.source import remote
from pipeline.data.source.lists import path_policy, read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.store import open_store
from tests.pipeline.data.bench import Page, Pages, serving
from tests.seaweed import BUCKET, Server


def of(path: str) -> SourceRecipe:
    return SourceRecipe((path,))


def test_a_list_on_a_web_server_is_fetched_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    body = b"URL,text\nhttp://h/0.jpg,a cat\nsub dir/1.jpg,a dog\n"
    pages = Pages({"/l/a.csv?v=1": Page(body, headers={"ETag": '"1"'})})
    store = open_store(str(tmp_path / "store"))
    with serving(pages) as address:
        path = f"http://{address}/l/a.csv?v=1"
        shards = scan(of(path), store, write=True).shards
        assert len(pages.asked) <= 4  # three times what it is, and once itself
        urls = read_table(store, shards[0].refs)["url"].to_pylist()
        assert urls == ["http://h/0.jpg", f"http://{address}/l/sub%20dir/1.jpg"]
        before = len(pages.asked)
        assert scan(of(path), store, write=True).shards == shards
        assert len(pages.asked) == before + 1
        pages["/l/a.csv?v=1"] = Page(body + b"http://h/2.jpg,a fox\n", headers={"ETag": '"2"'})
        assert scan(of(path), store, write=True).shards[0].ledger.rows == 3


@pytest.mark.parametrize("header", [{}, {"Last-Modified": "Sat, 28 Nov 2026 00:00:00 GMT"}])
def test_a_server_need_not_say_what_version_it_has(header: dict[str, str]) -> None:
    packed = gzip.compress(b'{"url": "http://h/0.jpg", "caption": "a cat"}\n')
    with serving({"/a.jsonl.gz": Page(packed, headers=header)}) as address:
        assert [row.captions for row in read_rows(f"http://{address}/a.jsonl.gz", of("."))] == [("a cat",)]


def test_a_list_on_s3_names_objects_of_its_own_folder(s3: Server) -> None:
    table = {
        "url": ["images/0 a.png", f"s3://{BUCKET}/lists/1.png", f"s3://{BUCKET}/2.png", "/etc/passwd", "http://h/3"]
    }
    out = io.BytesIO()
    pq.write_table(pa.table({**table, "caption": ["a cat"] * 5}), out)
    open_store(f"s3://{BUCKET}/lists").create("mine.parquet", out.getvalue())
    path = f"s3://{BUCKET}/lists/mine.parquet"
    rows = list(read_rows(path, of(path)))
    assert [row.url for row in rows[:2]] == [f"s3://{BUCKET}/lists/images/0 a.png", f"s3://{BUCKET}/lists/1.png"]
    assert [row.reject for row in rows] == [None, None, "forbidden_reference", "forbidden_reference", None]
    assert path_policy(of(path), path).named == [f"s3://{BUCKET}/lists"]
    open_store(f"s3://{BUCKET}/lists").create("empty.csv", b"")
    with pytest.raises(UserError, match=r"lists/empty\.csv: the file is empty"):
        list(read_rows(f"s3://{BUCKET}/lists/empty.csv", of(path)))
    with pytest.raises(UserError, match=r"lists/gone\.csv: no such object on S3"):
        scan(of(f"s3://{BUCKET}/lists/gone.csv"), open_store(f"{s3.url}/unused"), write=False)


def test_mistakes_are_one_line_that_names_the_url() -> None:
    with serving({"/a.csv": Page(b"link,caption\nhttp://h/0,x\n"), "/short.csv": Page(b"url")}) as address:
        for path, says in {
            f"http://{address}/gone.csv": "gone.csv: the server answers 404",
            f"http://{address}/a.csv": f"source http://{address}/a.csv: no column url; it has link, caption",
            f"http://{address}/00000.tar": "only .parquet, .csv, .tsv, .jsonl files",
            f"http://{address}/a.csv?X-Amz-Signature=abc": "its URL contains a secret",
            "http://127.0.0.1:9/a.csv": "cannot be fetched",
        }.items():
            with pytest.raises(UserError, match=re.escape(says)) as error:
                list(read_rows(path, of(path)))
            assert len(str(error.value).splitlines()) == 1
            assert "abc" not in str(error.value)
            assert remote._folder().name not in str(error.value)


BODY = b"url,caption\nhttp://h/0.jpg,a cat\n"


def refused(path: str) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(path, of(path)))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("promised", ["", str(4 << 20)])
def test_a_list_without_end_fills_no_disk(monkeypatch: pytest.MonkeyPatch, promised: str) -> None:
    monkeypatch.setattr(remote, "MOST_BYTES", 1 << 20)
    page = Page(BODY * (4 << 20 >> 5), headers={"Content-Length": promised, "ETag": "1"})
    remote._folder().cleanup()
    remote._folder.cache_clear()
    with serving({"/a.csv": page}) as address:
        said = refused(f"http://{address}/a.csv")
    assert not any(file.is_file() for file in Path(remote._folder().name).rglob("*"))
    assert ("sent over 1,048,576 bytes" if not promised else "the limit is 1,048,576") in said


def test_a_list_on_s3_has_the_same_budget_of_bytes(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST_BYTES", 1 << 20)
    store = open_store(f"s3://{BUCKET}/large")
    store.create("whole.csv", BODY.ljust(1 << 20, b"\n"))
    store.create("larger.csv", BODY.ljust((1 << 20) + 1, b"\n"))
    assert len(list(read_rows(f"s3://{BUCKET}/large/whole.csv", of(".")))) == 1
    said = refused(f"s3://{BUCKET}/large/larger.csv")
    assert "it has 1,048,577 bytes; the limit is 1,048,576; download it and name the file" in said
    assert not list(Path(remote._folder().name).rglob("larger.csv"))


def test_a_server_that_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.5)
    with serving(Pages({"/a.csv": Page(BODY * 100, headers={"ETag": "1"}, drip_s=0.02)})) as address:
        assert "less than 16,384 bytes a second" in refused(f"http://{address}/a.csv")
    with serving(Pages({"/a.csv": Page(BODY, headers={"ETag": "1"}, drip_s=3.0)})) as address:
        assert "cannot be fetched (timeout: " in refused(f"http://{address}/a.csv")


def test_a_redirect_leads_to_the_same_host_or_to_a_public_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"/b.csv": Page(BODY)}) as inner:
        port = inner.rpartition(":")[2]
        pages = {
            "/a.csv": Page(status=302, headers={"Location": "/b.csv"}),
            "/b.csv": Page(BODY),
            "/same.csv": Page(status=307, headers={"Location": f"http://{inner}/b.csv"}),
            "/inside.csv": Page(status=301, headers={"Location": f"http://127.0.0.2:{port}/b.csv"}),
            "/metadata.csv": Page(status=302, headers={"Location": "http://169.254.169.254/latest/"}),
            "/file.csv": Page(status=302, headers={"Location": "file:///etc/passwd"}),
            "/loop.csv": Page(status=302, headers={"Location": "/loop.csv"}),
        }
        with serving(pages) as address:
            for name in ("a", "same"):
                assert [row.url for row in read_rows(f"http://{address}/{name}.csv", of("."))] == ["http://h/0.jpg"]
            for name in ("inside", "metadata"):
                said = refused(f"http://{address}/{name}.csv")
                assert "that address is not public" in said
                assert "where it redirects to http://1" in said
            assert "that address is not public" in refused(f"http://{address}/file.csv")
            assert "unreachable" in refused(f"http://{address}/loop.csv")

            # A name that is looked up again: what it meant first may be reached, not what it means now.
            resolve, asked = socket.getaddrinfo, []

            def rebinding(host: str, *rest: Any, **options: Any) -> Any:
                asked.append(host)
                return resolve("127.0.0.1" if len(asked) > 1 else "192.0.2.1", *rest, **options)

            monkeypatch.setattr(socket, "getaddrinfo", rebinding)
            said = refused(f"http://evil.test:{address.rpartition(':')[2]}/b.csv")
            assert "that address is not public" in said
            assert len(asked) == 2
