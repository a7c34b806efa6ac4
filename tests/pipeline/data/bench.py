"""The data stages run one by one on a list of one's own, and an HTTP server for its pictures."""

import csv
import io
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import zip_longest
from pathlib import Path
from ssl import SSLContext
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

from models.clip import Clip
from pipeline.build import build
from pipeline.config import make_config, preset_config
from pipeline.data.fetch.fetcher import Fetched, Fetcher
from pipeline.data.source.journal import read_journal
from pipeline.data.source.stage import scan
from pipeline.graph.artifacts import Artifact, read_shards, read_table
from pipeline.graph.execute import make_context
from pipeline.graph.plan import plan
from pipeline.graph.runs import record_run
from pipeline.graph.stages import Context, stage_key
from pipeline.parse import overlay
from pipeline.store import open_store

COLUMNS = ("url", "caption", "split", "sha256")


@dataclass(frozen=True)
class Page:
    """What the server answers, without the headers that are empty. ``drip_s``: pause before each byte of the body."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    drip_s: float = 0.0


class Pages(dict[str, Page | list[Page]]):
    """Pages by path, of a list one a request and the last one from then on; ``asked`` notes the paths."""

    def __init__(self, pages: Mapping[str, Page | list[Page]]):
        super().__init__(pages)
        self.asked: list[str] = []

    def get(self, path: str, default: Any = None) -> Any:
        self.asked.append(path)
        found = super().get(path, default)
        return found if isinstance(found, Page) else found.pop(0) if len(found) > 1 else found[0]


@contextmanager
def serving(pages: Mapping[str, Page] | Pages, tls: SSLContext | None = None) -> Iterator[str]:
    """Serve ``pages`` by path, 404 for any other; yields "127.0.0.1:PORT"."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        do_PUT = do_POST

        def do_GET(self) -> None:
            page = pages.get(self.path, Page(status=404))
            self.send_response(page.status)
            for name, value in {"Content-Length": str(len(page.body)), **page.headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            with suppress(OSError):  # the caller gave up first
                if not page.drip_s:
                    self.wfile.write(page.body)
                for i in range(len(page.body) if page.drip_s else 0):
                    self.wfile.write(page.body[i : i + 1])
                    time.sleep(page.drip_s)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with listening(Handler, tls) as address:
        yield address


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], tls: SSLContext | None = None) -> Iterator[str]:
    """An HTTP server on loopback with a thread a request; yields "127.0.0.1:PORT"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def picture(seed: int, width: int = 80, height: int = 72, kind: str = "PNG") -> bytes:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], mode: Any = "w") -> Path:
    """Writes a tar of these files, in order."""
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_list(path: Path, rows: Sequence[Sequence[str]]) -> str:
    """A CSV list of (url, caption, split, sha256); rows may be shorter."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        writer.writerows([*row, *[""] * (len(COLUMNS) - len(row))] for row in rows)
    return str(path)


def write_listed(folder: Path, images: Sequence[bytes], splits: Sequence[str] = (), caption: str = "picture {}") -> str:
    """A CSV list of these images, which are written beside it; rows without a split are for training."""
    rows = []
    for i, (data, split) in enumerate(zip_longest(images, splits, fillvalue="train")):
        (folder / f"{i}.png").write_bytes(data)
        rows.append((f"file://{folder}/{i}.png", caption.format(i), split))
    return write_list(folder / "list.csv", rows)


def save_clip(folder: Path) -> str:
    """A nano CLIP with random weights, in open_clip's local-dir layout; how a recipe names it."""
    Clip.build(preset_config("nano").clip.model, seed=0).save(folder)
    return f"local-dir:{folder}"


def fetch_all(fetcher: Fetcher, references: Sequence[str]) -> list[Fetched]:
    """What each reference gave, in their order."""
    return [fetched for _, fetched in sorted(fetcher.fetch(references), key=lambda one: one[0])]


class Bench:
    """The graph of one configuration in a folder; stages are made one at a time, in this process."""

    def __init__(self, folder: Path, paths: Sequence[str], **changes: Any):
        values: dict[str, Any] = {
            "project": "bench",
            "preset": "nano",
            "store": str(folder),
            "source": {"paths": list(paths), "shard_rows": 10},
            "run": {name: {"workers": 0} for name in ("pairs", "filter", "embeddings", "curation", "index", "codec")},
        }
        self.store = open_store(str(folder))
        self.config = make_config(overlay(values, changes))
        self.graph = build(self.config)
        journal = read_journal(self.store, self.config.project)
        project = self.config.project
        self.scan = scan(self.config.source, self.store, write=False, journal=journal, project=project)
        self.source_keys = self.scan.keys
        self.made: dict[str, Artifact] = {}

    def record(self) -> None:
        """Records that all stages are asked for, as a run does before it makes anything."""
        project = self.config.project
        verdicts = plan(self.graph, self.source_keys, project, self.store, {})
        record_run(self.store, project, self.graph, verdicts, segments=self.scan.segments)

    def context(self, name: str) -> Context:
        """The context that the graph would give a stage whose inputs are made."""
        stage = self.graph[name]
        for needed in stage.inputs:
            if self.graph[needed].on_demand and needed not in self.made:
                self.make(needed)
        key = self.source_keys.get(name) or stage_key(stage, {n: self.made[n].key for n in stage.inputs})
        return make_context(stage, key, self.made, self.store, self.config)

    def make(self, *names: str) -> Artifact:
        """Make these stages, whose inputs are there, and return the last one."""
        for name in names:
            self.made[name] = self.graph[name].run(self.context(name))
        return self.made[names[-1]]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Every row of the indices of a stage, in order."""
        shards = read_shards(self.store, self.made[stage])
        return [row for s in shards for row in read_table(self.store, s.blobs["index"]).to_pylist()]

    def blobs(self, stage: str) -> list[tuple[str, Mapping[str, str]]]:
        """Key and blobs of every shard, in order."""
        return [(shard.key, shard.blobs) for shard in read_shards(self.store, self.made[stage])]
