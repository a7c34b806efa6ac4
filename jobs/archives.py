"""A bundle as one file that travels: packed small, fetched by its hash, and unpacked once into a cache."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shutil
import tempfile
import zipfile
import zlib
from importlib.metadata import metadata
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from pipeline.config import shipped
from pipeline.errors import UserError
from pipeline.progress import Progress, say_once
from pipeline.sampling.recipe import own_version
from pipeline.store.names import is_digest, is_file_name

SUFFIX = ".zip"
DEMO, DEMO_FILE, DEMO_SETTING = "demo", "unclip-demo.zip", "UNCLIP_DEMO"
HASH = "#sha256="
EARLIEST = (1980, 1, 1, 0, 0, 0)  # a zip has no earlier time
MOST_FILES = 10_000  # of an archive
PART_BYTES, TIMEOUT_S = 1 << 18, 30.0  # of a read, and of a server that sends nothing
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError)
"""What zipfile raises for files that are damaged, encrypted or compressed in a way that it does not know."""


def pack(folder: Path, file: Path) -> str:
    """Writes the files of a folder into a zip, the same bytes for the same files, and returns its sha256."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            about = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EARLIEST)
            about.compress_type, about.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with open(path, "rb") as source, archive.open(about, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, PART_BYTES)
    return sha256_of(file)


def sha256_of(file: Path) -> str:
    """Returns the sha256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_archive(source: str) -> bool:
    """Returns whether ``--from`` names a bundle that is one file, on this machine or at an address."""
    return source.startswith(("http://", "https://")) or source.endswith(SUFFIX)


def archived_bundle(source: str) -> tuple[Path, str]:
    """Returns the folder of a bundle that is one file, and a name for it; fetched and unpacked the first time.

    Args:
        source: A zip that ``unclip export`` wrote, or an address of one that ends in ``#sha256=`` and its hash.

    Raises:
        UserError: It cannot be reached or read, has another hash, or is not an archive of a bundle.
    """
    if source.startswith(("http://", "https://")):
        url, _, sha256 = source.partition(HASH)
        name = Path(unquote(urlsplit(url).path)).stem or "bundle"
        if not is_digest(sha256):
            raise UserError(f"{url}: fetched only if its sha256 is known; write {url}{HASH} and the 64 digits")
        return _cached(sha256, url), name
    file = Path(source)
    try:
        sha256 = sha256_of(file)
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror}); name a zip that unclip export wrote") from None
    return _cached(sha256, file), file.stem


def cached_folders() -> list[Path]:
    """Returns the folders of the bundles that were unpacked on this machine."""
    return sorted(path.parent for path in _cache().glob("*/sampling.json") if is_digest(path.parent.name))


def demo_address() -> str:
    """Returns the address of the demo's bundle, with its sha256 unless the setting lacks it.

    Raises UserError where none is known.
    """
    setting, version = os.environ.get(DEMO_SETTING, ""), own_version()
    named = setting
    urls = dict(text.split(", ", 1) for text in metadata("unclip-ray").get_all("Project-URL") or ())
    if not named and "Releases" in urls:
        named = f"{urls['Releases'].rstrip('/')}/download/v{version}/{DEMO_FILE}"
    recorded = shipped()[DEMO].with_suffix(".sha256")
    if named and HASH not in named and recorded.is_file():
        named += HASH + recorded.read_text().split()[0]
    if HASH not in named and not setting:
        raise UserError(
            f"demo: version {version} does not know where its bundle is; name its address, {DEMO_SETTING}="
            f"https://HOST/{DEMO_FILE}{HASH}DIGITS, or train it in 20 to 30 minutes: unclip demo"
        )
    return named


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unclip"


def _cached(sha256: str, source: str | Path) -> Path:
    """Returns the folder of what has this hash, which a file or an address has."""
    cache = _cache()
    folder = cache / sha256
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        _unpack(source, folder)
        return folder
    with open(cache / f"{sha256}.part", "a+b") as part:
        fcntl.flock(part, fcntl.LOCK_EX)  # of two processes the second finds what the first has fetched
        if not folder.is_dir():
            _fetch(source, part)
            found = sha256_of(Path(part.name))
            if found != sha256:
                part.truncate(0)
                raise UserError(
                    f"{source}: has the sha256 {found[:12]}... and not {sha256[:12]}..., so nothing of it is used; ask "
                    "the person who gave the address, or take the file from elsewhere"
                )
            _unpack(Path(part.name), folder)
        Path(part.name).unlink(missing_ok=True)
    return folder


def _fetch(url: str, part: BinaryIO) -> None:
    """Fetches what a file does not hold yet of what an address has, and shows progress. Raises UserError."""
    part.seek(0, os.SEEK_END)
    begun = part.tell()
    headers = {"User-Agent": f"unclip-ray/{own_version()}"} | ({"Range": f"bytes={begun}-"} if begun else {})
    say_once(f"fetching {url}")
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                part.truncate(0)
                part.seek(begun := 0)
            length = int(answer.headers["Content-Length"] or 0)
            _copy(url, answer, part, begun + length)
    except HTTPError as e:
        if e.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # else all of it is there
            raise UserError(f"{url}: the server answers {e.code}; {_elsewhere(url)}") from None
    except (URLError, OSError, ValueError, http.client.HTTPException) as e:
        raise UserError(f"{url}: cannot be fetched ({getattr(e, 'reason', e)}); {_elsewhere(url)}") from None


def _copy(url: str, answer: http.client.HTTPResponse, part: BinaryIO, whole: int) -> None:
    most = part.tell() + shutil.disk_usage(Path(part.name).parent).free // 2  # it is unpacked, too
    with Progress(Path(urlsplit(url).path).name, whole >> 10, "KiB", start=part.tell() >> 10) as progress:
        while data := answer.read(PART_BYTES):
            part.write(data)
            if part.tell() > most:
                raise UserError(f"{url}: larger than half of the free disk; free space, or name another file")
            progress.advance((part.tell() >> 10) - progress.done)
    part.flush()
    if part.tell() < whole:
        raise UserError(f"{url}: {part.tell():,} of {whole:,} bytes arrived; run the same command again to resume")


def _elsewhere(url: str) -> str:
    again = "run the same command again, or name a file that you have fetched otherwise with --from FILE.zip"
    return f"{again}; {DEMO_SETTING} names another address" if url.endswith(DEMO_FILE) else again


def _unpack(file: Path, folder: Path) -> None:
    """Unpacks an archive, which may come from anybody, into a folder that is there when all of it is."""
    try:
        with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory(dir=folder.parent) as made:
            members = [member for member in archive.infolist() if not member.is_dir()]
            names = [member.filename for member in members]
            if "sampling.json" not in names or len(names) > MOST_FILES:
                raise UserError(f"{file}: holds no bundle; name a zip that unclip export wrote")
            if strange := [name for name in names if not is_file_name(name)]:
                raise UserError(f"{file}: {strange[0][:100]!r} leads out of its folder, so nothing is unpacked")
            if sum(member.file_size for member in members) > shutil.disk_usage(made).free:
                raise UserError(f"{file}: does not fit on the disk of {folder.parent} when it is unpacked; make room")
            for member in members:
                target = Path(made, "bundle", member.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "xb") as out:
                    shutil.copyfileobj(source, out, PART_BYTES)
            if not folder.is_dir():
                Path(made, "bundle").rename(folder)
    except BROKEN as e:
        raise UserError(f"{file}: damaged ({e}); fetch or make it again") from None
    except OSError as e:
        if not folder.is_dir():  # else another process was first
            raise UserError(f"{file}: cannot be unpacked in {folder.parent} ({e.strerror})") from None
