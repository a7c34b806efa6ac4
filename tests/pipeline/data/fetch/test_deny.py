"""Deny lists: what they name is neither asked for nor kept, and their content, not their place, is in the key."""

import hashlib
from pathlib import Path

import pytest
import yaml

import unclip
from pipeline.config import Config, make_config
from pipeline.data.fetch.opener import Refused, normal_url
from pipeline.data.fetch.rules import DenyLists, read_deny_lists
from pipeline.data.fetch.visit import private_headers
from pipeline.data.pairs.row_index import read_opt_outs
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import read_shards
from pipeline.graph.keys import differences
from pipeline.parse import ContentFile, parse
from pipeline.settings import PairsSettings
from pipeline.store import open_store
from pipeline.store.records import put_blob
from tests.chain import ROOT
from tests.pipeline.data.bench import Bench, Page, Pages, picture, serving, write_list, write_tar


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lists(folder: Path, **texts: str) -> DenyLists:
    files: dict[str, ContentFile | None] = dict.fromkeys(("hosts", "urls", "sha256"))
    for kind, text in texts.items():
        (folder / kind).write_text(text)
        files[kind] = ContentFile.at(str(folder / kind), kind)
    store = open_store(str(folder / "store"))
    for kind in texts:
        put_blob(store, folder / kind)
    return read_deny_lists(store, **files)


def test_a_host_stands_for_all_below_it_and_a_url_for_every_spelling(tmp_path: Path) -> None:
    deny = lists(
        tmp_path,
        hosts="\ufeffExample.org\n\n# a remark\n  # another\n*.wild.test # of May\n.dot.test.\nпример.рф\n",
        urls="http://a.test/x y.png?q=é#part\nhttps://a.test:443/tls\t# asked us on 2 May\nhttp://b.test/~u/%e2%82%ac/x.png\n",
    )
    hosts = ["example.org", "www.EXAMPLE.org", "a.b.example.org", "wild.test", "x.wild.test", "dot.test", "пример.рф"]
    assert all(deny.url(normal_url(f"https://{host}:8443/a.png")) for host in hosts)
    assert all(deny.url(normal_url(f"https://example.org{dot}/a.png")) for dot in (".", "\u3002", "\uff0e", "\uff61"))
    for dots in ("..", ".\u3002"):
        with pytest.raises(Refused):
            normal_url(f"https://example.org{dots}/a.png")
    assert not any(
        deny.url(normal_url(f"http://{host}/a.png")) for host in ("badexample.org", "org", "example.org.test")
    )
    urls = ["http://A.test/x%20y.png?q=%C3%A9", "https://a.test./x y.png?q=é#other", "http://a.test:80/tls"]
    assert [deny.url(normal_url(url)) is not None for url in urls] == [True, True, True]
    escaped = ["http://b.test/%7Eu/%E2%82%AC/x.png", "https://b.test/%7eu/€/./x.png", "http://b.test/a/../~u/€/x.png"]
    assert all(deny.url(normal_url(url)) for url in escaped)
    assert deny.url(normal_url("http://a.test/x y.png")) is None
    assert deny.url(normal_url("http://www.example.org/")) == "deny_hosts: example.org"


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [("hosts", "a.test\nb.test/path", 2), ("hosts", "a b", 1), ("hosts", "a.test:8080", 1), ("hosts", "*", 1),
     ("urls", "\n\nexample.org/a.png", 3), ("urls", "ftp://a.test/", 1), ("sha256", "0" * 63, 1),
     ("sha256", "x" * 64, 1)],
)  # fmt: skip
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, kind: str, text: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"/{kind} line {line}: .* is not an? "):
        lists(tmp_path, **{kind: text})


def config(folder: Path, **pairs: str) -> Config:
    return make_config({"project": "p", "store": str(folder), "source": {"paths": ["a.csv"]}, "pairs": pairs})


def test_the_key_holds_what_a_list_says_and_not_where_it_lies(tmp_path: Path) -> None:
    for name, text in (("a", "a.test\n"), ("copy", "a.test\n"), ("b", "a.test\nb.test\n")):
        (tmp_path / name).write_text(text)
    a, copy, b = (differences(config(tmp_path, deny_hosts=str(tmp_path / name)).pairs) for name in ("a", "copy", "b"))
    assert a == copy == {"deny_hosts": sha256(b"a.test\n")}
    assert a != b
    with pytest.raises(UserError, match=r"pairs\.deny_hosts: .*none cannot be read \(No such file"):
        config(tmp_path, deny_hosts=str(tmp_path / "none"))


def test_what_is_denied_is_not_asked_for_and_not_kept(tmp_path: Path) -> None:
    pages = Pages({f"/{i}.png": Page(picture(i)) for i in range(6)})
    pages["/to-host"] = Page(status=302, headers={"Location": "http://www.denied.test/0.png"})
    pages["/to-url"] = Page(status=302, headers={"Location": "/1.png"})
    (tmp_path / "kept.png").write_bytes(picture(7))
    (tmp_path / "copy.png").write_bytes(picture(2))
    write_tar(tmp_path / "a.tar", {"0.png": picture(2), "0.txt": b"a picture"})
    denied = {"hosts": "denied.test", "urls": "https://a.test/1.png", "sha256": sha256(picture(2)).upper()}
    for name, text in denied.items():
        (tmp_path / name).write_text(text + "\n")
    rows = [  # url, sha256 of the list, and how it must end
        ("http://a.test/0.png", "", None),
        ("http://denied.test/3.png", "", "denied"),
        ("http://a.test/1.png", "", "denied"),
        ("http://a.test/to-host", "", "denied"),
        ("http://a.test/to-url", "", "denied"),
        ("http://a.test/2.png", "", "denied"),
        ("http://a.test/4.png", sha256(picture(2)), "denied"),
        (f"file://{tmp_path}/kept.png", "", None),
        (f"file://{tmp_path}/copy.png", "", "denied"),
    ]
    source = write_list(tmp_path / "list.csv", [(url, "a picture", "", digest) for url, digest, _ in rows])
    with serving(pages) as address:
        hosts = dict.fromkeys(("a.test", "denied.test", "www.denied.test"), address)
        deny = {f"deny_{kind}": str(tmp_path / kind) for kind in ("hosts", "urls", "sha256")}
        paths = [source, str(tmp_path / "a.tar")]
        bench = Bench(tmp_path / "store", paths, pairs=deny, run={"pairs": {"hosts": hosts, "retries": 2}})
        bench.make("source", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == [*(reason for *_, reason in rows), "denied"]
    assert sorted(pages.asked) == ["/0.png", "/2.png", "/robots.txt", "/to-host", "/to-url"]
    found = list(read_opt_outs(bench.store, read_shards(bench.store, bench.made["pairs"])))
    assert list(unclip.Artifact(bench.store, bench.made["pairs"]).opt_outs()) == found
    by_url, by_hash = "deny_urls: http://a.test/1.png", f"deny_sha256: {sha256(picture(2))}"
    by_host = "deny_hosts: denied.test"
    assert [row["evidence"] for row in found] == [by_host, by_url, by_host, by_url, *[by_hash] * 4]
    assert {row["reason"] for row in found} == {"denied"}


def test_a_list_that_is_lost_or_changed_on_the_way_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a.test\n")
    source = write_list(tmp_path / "list.csv", [(f"file://{tmp_path}/a.png", "a picture")])
    bench = Bench(tmp_path / "store", [source], pairs={"deny_hosts": str(tmp_path / "hosts")})
    with pytest.raises(CorruptObject, match="is missing"):
        read_deny_lists(bench.store, bench.config.pairs.deny_hosts, None, None)
    (tmp_path / "hosts").write_text("b.test\n")
    with pytest.raises(UserError, match=r"pairs\.deny_hosts: .*hosts changed during this command"):
        bench.make("source", "pairs")


def test_what_the_page_shows_can_be_written_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/fetch.md").read_text()
    lists = yaml.safe_load(page[page.index("      pairs:\n") : page.index("  Their content")])
    (tmp_path / "lists").mkdir()
    for path in lists["pairs"].values():
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    assert config(tmp_path, **lists["pairs"]).pairs.deny_lists == (sha256(b""),) * 3
    values = yaml.safe_load(page[page.index("    run:\n") :])
    headers = parse(PairsSettings, values["run"]["pairs"], "run.pairs").headers
    assert private_headers(headers, {"IMAGES_HEADERS": "Cookie: a=b"}) == {
        "https://images.example.org": {"Cookie": "a=b"}
    }
