"""Pictures that kill their decoder: real processes that die by real signals."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.pairs import decoding, packer
from pipeline.data.pairs.decoding import BASE_BYTES, BYTES_PER_PIXEL, KEEP_MEMORY, Decoding, ImageDecoder, TimeLimit
from pipeline.data.pairs.image import StoredImage, Storing, heif_is_there, inspect, prepare
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.sandbox import KEPT
from tests.pipeline.data.bench import Bench, picture, write_listed
from tests.pipeline.data.odd import encoded
from tests.pipeline.data.pairs.decoders import with_word, wrapped

LIMITS = (1_000_000, Storing(64, "jpg", 90))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageDecoder]:
    with closing(wrapped(tmp_path_factory.mktemp("decoder"))) as decoder:
        yield decoder


@pytest.mark.parametrize("word", ["SEGFAULT", "EXIT", "LIES", "LIST", "ENDLESS"])
def test_a_picture_that_kills_its_decoder_costs_itself(decoder: ImageDecoder, word: str) -> None:
    assert decoder.inspect(with_word(word), 1_000_000) == "decoder_crashed"
    assert decoder.inspect(picture(2), 1_000_000) == (80, 72)


def test_one_that_was_killed_once_has_another_try(tmp_path: Path) -> None:
    with closing(wrapped(tmp_path)) as decoder:
        assert decoder.inspect(with_word("ONCE"), 1_000_000) == (80, 72)


def test_answers_are_those_of_the_functions_whatever_is_printed(decoder: ImageDecoder) -> None:
    whole = picture(3, 300, 200)
    for data in (whole, whole[:-300], b"", b"<html>", picture(4, kind="WEBP"), with_word("CHATTER"), bytes(3_000_000)):
        for arguments in (LIMITS, (10, Storing(64, "png", 3))):
            assert decoder.prepare(data, *arguments) == prepare(data, *arguments)
        assert decoder.inspect(data, 1_000_000) == inspect(data, 1_000_000)
    assert isinstance(decoder.prepare(whole, *LIMITS), StoredImage)
    for mode in (
        "keep_ratio_largest",
        "center_crop",
        "border",
        "no",
    ):  # img2dataset's, which open /dev/null for writing
        storing = Storing(64, "jpg", 90, mode)
        assert decoder.prepare(whole, 1_000_000, storing) == prepare(whole, 1_000_000, storing), mode


SHORT = TimeLimit(0.2, 1e-6)


def test_one_that_takes_more_processor_time_than_its_pixels_may_is_not_tried_again(decoder: ImageDecoder) -> None:
    work = Decoding(SHORT)
    assert decoder.inspect(with_word("SPIN"), 10**9, work) == "decode_timeout"
    assert work.seconds > 0.15  # the kernel ends it at a tick near 0.2
    work = Decoding(SHORT)
    assert decoder.inspect(picture(2), 10**9, work) == (80, 72)
    assert work.pixels == 80 * 72
    assert work.seconds > 0


def test_one_that_only_waits_is_ended_by_the_clock(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LONGEST", TimeLimit(1.0, 1e-6))
    assert decoder.inspect(with_word("SLEEP"), 1) == "decode_timeout"
    monkeypatch.undo()
    assert decoder.inspect(picture(2), 1_000_000) == (80, 72)


def test_want_of_memory_costs_that_picture_and_not_the_child(decoder: ImageDecoder) -> None:
    assert decoder.inspect(picture(2), 1_000_000) == (80, 72)
    child = decoder._process
    assert decoder.inspect(with_word("GREEDY"), 1_000_000) == "decode_error"
    assert decoder.inspect(picture(2), 1_000_000) == (80, 72)
    assert decoder._process is child


def test_the_child_has_no_secrets_no_rights_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And imports nothing from the current folder, which may be a stranger's, or have a package of the same name."""
    for name in ("models", "pipeline", "numpy", "PIL"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "json.py").touch()
    monkeypatch.chdir(tmp_path)
    secrets = {"AWS_SECRET_ACCESS_KEY": "SEKRET", "RAY_AUTH_TOKEN": "SEKRET", "IMAGES_HEADERS": "Cookie: SEKRET"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with closing(ImageDecoder()) as decoder:
        assert decoder.inspect(picture(1), 1_000_000) == (80, 72)
        assert decoder._process is not None
        proc = Path(f"/proc/{decoder._process.pid}")
        environment = dict(part.split("=", 1) for part in (proc / "environ").read_text().split("\0") if part)
        assert "SEKRET" not in environment.values()
        assert environment.keys() <= {*KEPT, *KEEP_MEMORY, "PYTHONPATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        lines = [(line[:26].strip(), line[26:].split()) for line in (proc / "limits").read_text().splitlines()]
        limits = {name: soft for name, (soft, *_) in lines}
        if namespaces() and os.geteuid() == 0:  # of the child itself, after all that it imports; others may not look
            assert os.readlink(proc / "ns/net") != os.readlink("/proc/self/ns/net")
        assert limits["Max core file size"] == limits["Max file size"] == "0"
        assert limits["Max open files"] == "64"
        hard = {name: values[1] for name, values in lines}  # which nothing in it can raise
        assert (hard["Max core file size"], hard["Max file size"], hard["Max open files"]) == ("0", "0", "64")
        assert int(limits["Max cpu time"]) < 60
        mapped = 1024 * int(status["VmSize"].split()[0])
        assert 0 < int(limits["Max address space"]) - mapped <= BASE_BYTES + BYTES_PER_PIXEL * 1_000_000


def namespaces() -> bool:
    """Whether this machine lets a process have a namespace of its own, as many containers do not."""
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


def landlock() -> bool:
    """Whether this machine lets a process give up files, as Linux does since 5.13."""
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0


def test_the_child_has_no_network_and_neither_reads_nor_writes_files(tmp_path: Path) -> None:
    """Where the machine allows namespaces and Landlock; elsewhere the rest still holds."""
    (tmp_path / "credentials").write_text("SEKRET")
    code = """
    import os, socket, sys
    from pipeline.sandbox import give_up_rights
    home = os.readlink("/proc/self/ns/net")
    with open(sys.argv[1], "wb", 0) as f:  # before: where there is Landlock, no file is opened for writing afterwards
        give_up_rights()
        try:
            f.write(b"x")
        except OSError as e:
            print(e.errno)
    for path in (sys.argv[2], "/etc/passwd"):
        try:
            open(path, "rb").read()
        except OSError as e:
            print(e.errno)
    import statistics  # of Python's own, and not imported until now
    if os.readlink("/proc/self/ns/net") != home:
        print(*[name for _, name in socket.if_nameindex()])
        try:
            open(f"/proc/{os.getppid()}/environ", "rb").read()
        except OSError as e:
            print(e.errno)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "file"), str(tmp_path / "credentials")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    closed = [str(errno.EACCES)] * 2 if landlock() else []
    assert said == [str(errno.EFBIG), *closed, *(["lo", str(errno.EACCES)] if namespaces() else [])]


def test_an_idle_child_ends_and_the_next_picture_starts_another(tmp_path: Path) -> None:
    with closing(wrapped(tmp_path, 1)) as decoder:
        first = decoder.inspect(picture(1), 1_000_000)
        assert decoder._process is not None
        decoder._process.wait(120)
        assert decoder.inspect(picture(1), 1_000_000) == first == (80, 72)
        decoder._process.wait(120)
        assert decoder.inspect(with_word("ONCE"), 1_000_000) == (80, 72)  # which has its two tries all the same


def test_a_decoder_that_cannot_start_is_said_and_rejects_nothing() -> None:
    decoder = ImageDecoder((sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(UserError, match=r"run python -m pipeline\.data\.pairs\.decoding to see why"):
        decoder.inspect(picture(1), 1_000_000)


def test_the_child_ends_with_its_parent() -> None:
    code = """
    import time
    from pipeline.data.pairs.decoding import ImageDecoder
    decoder = ImageDecoder()
    decoder.inspect(b"x", 1)
    print(decoder._process.pid, flush=True)
    time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():  # not a zombie
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_without_the_extra_heic_is_counted_by_a_reason_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heif_is_there()
    heic = encoded(Image.new("RGB", (80, 72)), "HEIF")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/pillow_heif.py").write_text("raise ImportError\n")
    bench = Bench(tmp_path / "store", [write_listed(tmp_path, [picture(0), heic])])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    with closing(ImageDecoder()) as bare:
        monkeypatch.setattr(packer, "shared_decoder", lambda: bare)
        bench.make("source", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == [None, "needs_heif"]
    assert bench.made["pairs"].ledger.deferred == {"needs_heif": 1}
    assert "the extra heif" in REASONS["needs_heif"]


def test_a_shard_with_such_pictures_is_made_and_every_row_counted(
    tmp_path: Path, decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See tests/pipeline/data/test_in_place.py for those in tars."""
    source = write_listed(tmp_path, [picture(0), with_word("SEGFAULT"), picture(2)])
    monkeypatch.setattr(packer, "shared_decoder", lambda: decoder)
    bench = Bench(tmp_path / "store", [source])
    bench.make("source", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == [None, "decoder_crashed", None]
    assert bench.made["pairs"].ledger.rejected == {"decoder_crashed": 1}
