"""A bundle as one file: small, fetched by its hash and no other, and with the training images that may travel."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load_file

import unclip
from jobs import archives
from jobs.bundles import find_bundle
from jobs.cli import main
from pipeline.errors import UserError
from pipeline.sampling import nearest
from pipeline.sampling.recipe import read_recipe
from serve.bundle import ServedBundle
from serve.nearest import training_images
from serve.settings import ServeSettings
from tests.pipeline.data.bench import Bench, listening, picture
from tests.serve.trained import api_of, make_trained

FEW = ("size=64", "decoder_steps=2", "prior_steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    """The store of a bundle and of the rows that it was trained on, which ``out`` names."""
    return make_trained(folder)


@pytest.fixture(scope="module")
def archive(folder: Path, bench: Bench) -> Path:
    """That bundle as one file, with the training images of one licence."""
    assert main(["export", str(folder / "out"), "--to", str(folder / "fox.zip"), "--license", "CC-BY 4.0"]) == 0
    return folder / "fox.zip"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a current folder where nothing was made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(archives.DEMO_SETTING, raising=False)
    monkeypatch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    archives.say_once.cache_clear()
    training_images.cache_clear()
    return tmp_path / "cache/unclip"


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def sampled(to: str, *words: str) -> Path:
    """Draws a caption, and returns the file."""
    assert main(["sample", "a red fox", *words, "-o", to, *FEW]) == 0
    return Path(to)


def test_one_file_holds_half_of_the_bytes_and_draws_nearly_the_same(folder: Path, archive: Path) -> None:
    bundle = find_bundle(str(archive))
    weights = {name: file for name in bundle.blobs if (file := bundle.folder / name).suffix == ".safetensors"}
    whole = find_bundle(str(folder / "out")).folder
    for name, file in weights.items():
        if name != nearest.IMAGES:
            before, after = load_file(whole / name), load_file(file)
            full = name.startswith("codec/")
            for key, tensor in before.items():
                half = not full and tensor.ndim > 1 and tensor.dtype == torch.float32
                assert after[key].dtype == (torch.float16 if half else tensor.dtype), (name, key)
                assert torch.equal(after[key], tensor.half() if half else tensor)
    apart = abs(
        pixels(sampled("half.png", "--from", str(archive)))
        - pixels(sampled("whole.png", "--from", str(folder / "out")))
    )
    assert 0 < apart.mean() < 3
    card = (bundle.folder / "README.md").read_text()
    assert "half precision (fp16)" in card
    assert "2 of 2 training images (CC-BY 4.0) travel along" in card


def test_a_bundle_that_was_fetched_draws_its_images_again_without_being_named(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sampled("first.png", "--from", str(archive))
    capsys.readouterr()
    assert main(["redraw", str(first)]) == 0
    assert "the same pixels" in capsys.readouterr().out


def test_the_same_bundle_makes_the_same_bytes_without_a_path_of_this_machine(
    folder: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--license", "CC-BY 4.0"]
    assert main(["export", str(folder / "out"), "--to", "again.zip", *words]) == 0
    said = capsys.readouterr().out
    assert Path("again.zip").read_bytes() == archive.read_bytes()
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"sha256 {sha256}\n" in said
    assert f"elsewhere: --from https://HOST/again.zip#sha256={sha256}\n" in said
    with zipfile.ZipFile(archive) as files:
        assert files.testzip() is None
        assert not [name for name in files.namelist() if str(folder).encode() in files.read(name)]
    for source in (archive, folder / "bundle"):  # without a store: what it carries goes on as it is
        assert main(["export", str(source), "--to", f"{source.stem}-2.zip"]) == 0
    assert find_bundle("fox-2.zip").training().nearest(np.ones((1, 16), np.float32), 9)


def test_a_program_exports_what_the_command_does_and_nothing_is_printed(
    folder: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = unclip.export(folder / "out", "again.zip", licenses=["CC-BY 4.0"])
    assert Path("again.zip").read_bytes() == archive.read_bytes()
    assert (made.files, made.size) == (1, archive.stat().st_size)
    assert made.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert "(CC-BY 4.0) travel along" in made.remarks[0]
    native = unclip.export("again.zip", Path("theirs"), format="diffusers")
    assert "all others are in ours/" in native.remarks[0]
    assert native.files == sum(path.is_file() for path in Path("theirs").rglob("*"))
    with pytest.raises(unclip.UserError, match="unknown format onnx; use one of bundle, diffusers"):
        unclip.export(folder / "out", "onnx", format="onnx")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "fox.zip"), "fox.zip exists already; name another file"),
        (
            ("--to", "a.zip", "--license", "CC-BY"),
            "no training image has the licence CC-BY; the list names CC-BY 4.0, unknown",
        ),
        (("--to", "a.zip", "--format", "diffusers"), "a.zip is a file, and the format diffusers is a folder"),
        (
            ("--to", "a", "--license", "CC0"),
            "a is a folder, and training images are packed into a single file only",
        ),
        (("--to", "a.zip", "--license", "CC0"), "no training image has the licence CC0"),  # of the held-out one
    ],
)
def test_what_cannot_be_packed(
    folder: Path, bench: Bench, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fox.zip").touch()
    assert main(["export", str(folder / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "--" not in said  # as a program that calls unclip.export has not written
    assert [path.name for path in Path().iterdir()] == ["fox.zip"]


# --- trained on -------------------------------------------------------------------------------------------------------


def test_a_bundle_that_travelled_names_its_training_images_by_the_same_words_everywhere(
    archive: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.png").write_bytes(picture(2))
    model = unclip.load(archive, device="cpu")
    found = model.nearest("mine.png", n=5)
    assert [row.caption for row in found] == ["image 2", "image 0"]  # the others have another licence, or are held out
    assert found[0].similarity == pytest.approx(1, abs=0.01)
    assert (found[0].license, found[0].attribution, found[0].url) == ("CC-BY 4.0", "By 2", None)
    assert found[0].image
    assert found[0].image.size == (80, 72)
    stored = unclip.load(archive.parent / "out", device="cpu").nearest("mine.png", n=5)
    assert [row.caption for row in stored if row.license == "CC-BY 4.0"] == [row.caption for row in found]
    assert all(row.url for row in stored)  # files of one's own, by their own names
    capsys.readouterr()
    assert main(["edit", "nearest", "mine.png", "-n", "2", "--from", str(archive), "-o", "strip.png"]) == 0
    _, own, first, second = capsys.readouterr().out.splitlines()
    assert own == "  1: the image"
    assert re.fullmatch(r"  2: (100\.0|99\.\d)% alike, CC-BY 4\.0, By 2, image 2", first)
    assert second.endswith("CC-BY 4.0, By 0, image 0")
    recipe = read_recipe(Path("strip.png").read_bytes(), "strip.png")
    assert (recipe.operation, recipe.n, recipe.images[0].name) == ("nearest", 2, "mine.png")
    assert main(["redraw", "strip.png", "--from", str(archive), "-o", "again.png"]) == 0
    assert (pixels(Path("again.png")) == pixels(Path("strip.png"))).all()
    for place in (find_bundle(str(archive)).folder, archive.parent / "bundle"):  # the second carries none
        api = api_of(bench, ServeSettings(), "", {})
        api.state.gateway.served = ServedBundle("fox", key="b" * 64, folder=str(place))
        training_images.cache_clear()
        with TestClient(api, "http://127.0.0.1") as client:
            answer = client.post("/v1/unclip/nearest", data={"n": 2}, files={"image": picture(2)})
        if place.name == "bundle":
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")
        else:
            assert [row["caption"] for row in answer.json()["data"]] == ["image 2", "image 0"]
    with pytest.raises(UserError, match="have no index here: unclip run CONFIG --until index makes it"):
        unclip.load(archive.parent / "bundle", device="cpu").nearest("mine.png")
    with pytest.raises(UserError, match="these models do not come from a bundle"):
        model.replace().nearest("mine.png")
    with pytest.raises(UserError, match="n is 0; use 1 to 1000"):
        model.nearest("mine.png", n=0)


def test_of_many_rows_some_travel_and_stay_when_others_are_appended(
    folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training: Any = find_bundle(str(folder / "out")).training()
    licenses = {"CC-BY 4.0", "unknown"}
    monkeypatch.setattr(nearest, "MOST_CARRIED", 2)
    assert nearest.carry(training, licenses, tmp_path / "two") == (2, 3)
    monkeypatch.setattr(nearest, "MOST_CARRIED", 1)
    assert nearest.carry(training, licenses, tmp_path / "one") == (1, 3)
    captions = [{row.caption for row in nearest.CarriedImages(tmp_path / name).rows} for name in ("one", "two")]
    assert captions[0] < captions[1]


@pytest.mark.parametrize(
    ("file", "data"),
    [
        (nearest.ROWS, b"7\n7\n"),
        (nearest.ROWS, b'{"caption": "one row too few", "license": "a"}\n'),
        (nearest.ROWS, b'{"caption": 7, "license": "a"}\n{"caption": "b", "license": "a"}\n'),
        (nearest.IMAGES, b"no tensors"),
    ],
)
def test_damaged_training_images_are_one_line(archive: Path, tmp_path: Path, file: str, data: bytes) -> None:
    copy = tmp_path / "copy"
    with zipfile.ZipFile(archive) as files:
        files.extractall(copy)
    (copy / file).write_bytes(data)
    Path("mine.png").write_bytes(picture(2))
    with pytest.raises(UserError, match=r": damaged \(.*\); fetch the bundle again"):
        unclip.load(copy, device="cpu").nearest("mine.png")


def test_an_address_with_a_password_or_of_this_machine_does_not_travel(archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with zipfile.ZipFile(archive) as files:
        files.extractall(copy)
    rows = [json.loads(line) for line in (copy / nearest.ROWS).read_text().splitlines()]
    assert [row["url"] for row in rows] == [None, None]  # files of this machine
    rows[0]["url"], rows[1]["url"] = "https://ana:secret@example.org/a.png", "javascript:alert(1)"
    (copy / nearest.ROWS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = find_bundle(str(copy)).training().nearest(np.ones((1, 16), np.float32), 2)
    assert {row.url for row in found} == {"https://***@example.org/a.png", None}


# --- fetched by its hash ----------------------------------------------------------------------------------------------


class Files:
    """Answers for one file. ``ends``: bytes after which the next ones break; ``asked``: ranges so far."""

    def __init__(self, data: bytes):
        self.data, self.url, self.ranges = data, "", True
        self.asked, self.ends = list[str | None](), list[int]()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        self.asked.append(asked)
        if handler.path != "/unclip-demo.zip":
            handler.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if asked and start >= len(self.data):
            handler.send_error(416)
            return
        handler.send_response(206 if asked and self.ranges else 200)
        handler.send_header("Content-Length", str(len(self.data) - start))
        handler.end_headers()
        handler.wfile.write(self.data[start : self.ends.pop(0) if self.ends else None])


@contextmanager
def served(data: bytes) -> Iterator[Files]:
    files = Files(data)
    answers = {"do_GET": lambda handler: files.answer(handler), "log_message": lambda *_: None}
    with listening(type("Handler", (BaseHTTPRequestHandler,), answers)) as address:
        files.url = f"http://{address}/unclip-demo.zip"
        yield files


@pytest.fixture
def files(archive: Path) -> Iterator[Files]:
    with served(archive.read_bytes()) as files:
        yield files


@pytest.fixture
def address(files: Files) -> str:
    return f"{files.url}#sha256={hashlib.sha256(files.data).hexdigest()}"


def test_the_demo_is_fetched_once_and_draws(
    files: Files, address: str, archive: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv(archives.DEMO_SETTING, address)
    first = sampled("first.png", "--from", "demo")
    assert (pixels(first) == pixels(sampled("local.png", "--from", str(archive)))).all()
    again = sampled("again.png", "--from", address)
    assert again.read_bytes() == first.read_bytes()
    assert files.asked == [None]
    assert [path.name for path in cache.iterdir()] == [address.rpartition("=")[2]]
    assert main(["sample", "a red fox", "--from", "demo", *FEW]) == 0
    assert [path.suffix for path in Path("out/unclip-demo/samples").iterdir()] == [".png"]
    assert unclip.load("demo", device="cpu").bundle == find_bundle(str(archive)).key
    Path("demo").mkdir()  # a folder of the user's goes before
    with pytest.raises(UserError, match="demo: no finished bundle there"):
        find_bundle("demo")


def test_a_fetch_goes_on_where_it_was_broken(files: Files, address: str, cache: Path) -> None:
    files.ends = [100_000, 150_000]
    for end in (100_000, 150_000):
        with pytest.raises(UserError, match=rf"{end:,} of {len(files.data):,} bytes arrived; run the same"):
            find_bundle(address)
    assert find_bundle(address).folder.is_dir()
    assert files.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_server_without_ranges_and_a_file_that_is_whole_are_taken(files: Files, address: str, cache: Path) -> None:
    part = cache / f"{address.rpartition('=')[2]}.part"
    cache.mkdir(parents=True)
    part.write_bytes(b"the beginning of another file")
    files.ranges = False
    folder = find_bundle(address).folder
    assert folder.is_dir()
    folder.rename(cache / "elsewhere")
    part.write_bytes(files.data)
    files.ranges = True
    assert find_bundle(address).folder.is_dir()
    assert files.asked[-1] == f"bytes={len(files.data)}-"


def test_what_has_another_hash_is_not_used_and_not_kept(files: Files, address: str, cache: Path) -> None:
    files.data, good = b"another file", files.data
    with pytest.raises(UserError, match=r"has the sha256 .* and not .*, so nothing of it is used; ask the person who"):
        find_bundle(address)
    assert [path.stat().st_size for path in cache.iterdir()] == [0]
    files.data = good
    assert find_bundle(address).folder.is_dir()


def test_what_cannot_be_fetched_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with served(b"") as files:
        pass  # nothing listens there any longer
    hashed = f"#sha256={'a' * 64}"
    for address, says in (
        (f"{files.url}{hashed}", "cannot be fetched (["),
        (f"{files.url}{hashed}", "UNCLIP_DEMO names another address"),
        (f"http://no such host/{hashed}", "cannot be fetched ("),
        (files.url, "fetched only if its sha256 is known; write"),
        (f"{files.url}#sha256=abc", "fetched only if its sha256 is known"),
        ("gone.zip", "gone.zip: cannot be read (No such file or directory)"),
    ):
        assert main(["sample", "a red fox", "--from", address]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert says in line
    missing = pytest.raises(UserError, match="the server answers 404; run the same command again, or name a file")
    with served(b"") as files, missing:
        find_bundle(f"{files.url}.gone{hashed}")


def test_where_the_demo_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").touch()
    monkeypatch.setattr(archives, "shipped", lambda: {"demo": tmp_path / "demo.yaml"})
    monkeypatch.setattr(archives, "own_version", lambda: "1.2")
    about = Message()
    monkeypatch.setattr(archives, "metadata", lambda _: about)
    with pytest.raises(UserError, match=r"demo: version 1\.2 does not know where its bundle is; name its address"):
        archives.demo_address()
    about["Project-URL"] = "Releases, https://example.org/unclip/releases/"
    with pytest.raises(UserError, match="does not know"):
        archives.demo_address()  # nor its hash
    monkeypatch.setenv(archives.DEMO_SETTING, "http://mirror/x.zip")
    with pytest.raises(UserError, match=r"x\.zip: fetched only if its sha256 is known"):
        find_bundle("demo")
    monkeypatch.delenv(archives.DEMO_SETTING)
    (tmp_path / "demo.sha256").write_text(f"{'a' * 64}  unclip-demo.zip\n")
    hashed = f"#sha256={'a' * 64}"
    assert archives.demo_address() == f"https://example.org/unclip/releases/download/v1.2/unclip-demo.zip{hashed}"
    monkeypatch.setenv(archives.DEMO_SETTING, "http://mirror/x.zip")
    assert archives.demo_address() == f"http://mirror/x.zip{hashed}"
    monkeypatch.setenv(archives.DEMO_SETTING, f"http://mirror/x.zip#sha256={'b' * 64}")
    assert archives.demo_address() == f"http://mirror/x.zip#sha256={'b' * 64}"


# --- archives of strangers --------------------------------------------------------------------------------------------


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no zip", r"damaged \(File is not a zip file\)"),
        (zipped(a=b""), "holds no bundle; name a zip that unclip export wrote"),
        (zipped(**{"sampling.json": b"{}", "../out.txt": b"x"}), "'../out.txt' leads out of its folder"),
        (zipped(**{"sampling.json": b"{}", "/tmp/out.txt": b"x"}), "'/tmp/out.txt' leads out of its folder"),
        (zipped(**{"sampling.json": b"{}" * 99}).replace(b"{}{}", b"{}{ ", 1), "damaged .*CRC"),
        (zipped(**{"sampling.json": b"{}", "a": b"", "a/b": b""}), "cannot be unpacked"),
    ],
    ids=("no zip", "no bundle", "above", "absolute", "damaged", "file and folder"),  # not the bytes, which hold a time
)
def test_an_archive_that_is_none_or_leads_elsewhere_leaves_nothing(
    data: bytes, says: str, cache: Path, tmp_path: Path
) -> None:
    Path("strange.zip").write_bytes(data)
    with pytest.raises(UserError, match=f"strange.zip: {says}"):
        find_bundle("strange.zip")
    assert list(cache.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "here"}


def test_what_unpacks_to_more_than_the_disk_has_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bomb.zip").write_bytes(zipped(**{"sampling.json": b"{}", "a": bytes(1 << 20)}))
    usage: Callable[..., Any] = lambda _: type("Usage", (), {"free": 1 << 19})  # noqa: E731
    monkeypatch.setattr(archives.shutil, "disk_usage", usage)
    with pytest.raises(UserError, match="does not fit on the disk"):
        find_bundle("bomb.zip")
    assert list(cache.iterdir()) == []
