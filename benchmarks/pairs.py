"""Compares the pairs stage with img2dataset's own distributor, and measures its growth where servers are slow.

Both fetch one list of JPEG files, half of them with a short side of about 1,000 pixels and half of about 512, from one
local server, shrink the short side to 512 with area interpolation and store JPEG of quality 95 in webdataset tars: two
workers of 16 threads. Ours has every guard on. The rate is that of the middle of a run, by the server's clock: start-up
and end are left out, and the time of the whole is shown. Then, with a server that waits 200 ms before each answer, one
of our workers and four, on small pictures, so that waiting and not the processor is the bound. Then a list as the web
has them, one worker with its own settings against one process with 256 threads and shards of 10,000 rows: answers come
after 0.84 s on average, 5% of the rows are on hosts that never answer, which both give 20 s, 5% on one host that begins
answers and never ends them, 3% on hosts that are five times as slow, 4% are gone and 3% are pages. Linux only.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image

from benchmarks.timing import begin, finish, parser
from pipeline.build import build
from pipeline.config import make_config
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.stage import scan
from pipeline.graph.artifacts import Artifact, read_shards, read_table
from pipeline.graph.execute import make_context
from pipeline.store import open_store

HOSTS = 64  # as real lists have many; four requests at once to each
THREADS = 16
SIZE = 512
QUALITY = 95
MIXED = ((1000, 1000), (1280, 960), (960, 1200), (1024, 1024), (512, 512), (683, 512), (512, 640), (768, 512))
SMALL = ((200, 160),)
DELAY_S = 0.2
WEB_S, WEB_SPREAD, DEAD_S = 0.84, 0.6, 20.0
WEB_HOST_ROWS = 4


def make_pictures(folder: Path, sizes: tuple[tuple[int, int], ...], count: int) -> None:
    """Returns JPEG files as photographs are: amplitudes that fall with the frequency, and edges."""
    for i in range(count):
        rng = np.random.default_rng(i)
        width, height = sizes[i % len(sizes)]
        fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        fall = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** 1.4
        planes = []
        for strength in (1.0, 0.4, 0.4):
            plane = np.fft.irfft2(fall * np.exp(2j * np.pi * rng.random(fall.shape)), (height, width))
            planes.append(strength * plane / plane.std())
        y, x = np.mgrid[:height, :width]
        for _ in range(12):
            a, b, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.05, 0.3) * width
            planes[0] += np.where(np.hypot(x - a, y - b) < r, rng.normal(), 0)
        pixels = np.stack(planes, -1) * (50, 25, 25) + 128
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")
        picture.save(folder / f"{i:03}.jpg", quality=90)


@dataclass(frozen=True)
class Site:
    """A running server, and its images."""

    port: int

    def write_list(self, file: Path, rows: int) -> Path:
        """Writes a list of ``rows`` images, one host after the other."""
        return _write(file, (f"http://127.0.0.{i % HOSTS + 1}:{self.port}/{i}.jpg" for i in range(rows)))

    def write_web_list(self, file: Path, rows: int) -> Path:
        """Writes a list of ``rows`` references as the web has them, in an order without order."""
        urls = []
        for i in range(rows):
            group, kind = divmod(i // WEB_HOST_ROWS, 100)
            own = f"{group}.{kind + 1}"
            host = f"9.{own}" if kind < 5 else "7.0.1" if kind < 10 else f"8.{own}" if kind < 13 else f"1.{own}"
            path = f"gone{i}" if 13 <= kind < 17 else f"page{i}" if 17 <= kind < 20 else f"{i}.jpg"
            urls.append(f"http://127.{host}:{self.port}/{path}")
        random.Random(0).shuffle(urls)
        return _write(file, urls)

    def report(self) -> tuple[list[float], float]:
        """Returns the times of all requests since the last call, and the server's processor time."""
        with urlopen(f"http://127.0.0.1:{self.port}/report") as answer:
            found = json.load(answer)
        return found["times"], found["cpu"]


def _write(file: Path, urls: Iterable[str]) -> Path:
    file.write_text("url,caption\n" + "".join(f"{url},picture\n" for url in urls))
    return file


@contextmanager
def serving(pictures: Path, delay_s: float, spread: float = 0.0) -> Iterator[Site]:
    """Yields a server that runs as long as the block."""
    command = [sys.executable, "-m", "benchmarks.pairs_server", str(pictures), str(delay_s), str(spread)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Site(int(process.stdout.readline()))
        finally:
            process.kill()


@dataclass(frozen=True)
class Run:
    """Returns images a second in the middle of a run, the seconds of the whole, and the server's share of a core."""

    rate: float
    seconds: float
    server: float


def nearly_all(found: int, rows: int) -> bool:
    """Returns whether at most one of 1,000 rows is missing: on the web, a slow host's answer can come too late."""
    return rows - rows // 1000 <= found <= rows


def measured(site: Site, rows: int, seconds: float) -> Run:
    """Returns the time from 3/8 of the requests, when all workers work, to 7/8, when none has run out of work."""
    times, cpu = site.report()
    if not nearly_all(len(times), rows):
        raise SystemExit(f"{len(times)} pictures were asked for instead of {rows}")
    rows = len(times)
    first, last = rows * 3 // 8, rows * 7 // 8
    return Run((last - first) / (times[last] - times[first]), seconds, cpu / (times[-1] - times[0]))


def ours(file: Path, site: Site, folder: Path, kept: int, shard_rows: int, **settings: Any) -> tuple[Run, Artifact]:
    """Runs the pairs stage on a list, with these settings, into a store in ``folder``."""
    config = make_config(
        {
            "project": "benchmark",
            "preset": "nano",
            "store": str(folder),
            "source": {"paths": [str(file)], "shard_rows": shard_rows},
            "pairs": {"image_size": SIZE, "encode_quality": QUALITY, "allow": ["127.0.0.0/8"]},
            "bundle": {"models": ["diffusion_prior", "decoder"], "sampling": {"size": 64}},
            "run": {
                "pairs": settings,
                "ray": {"cpus": 4},
            },
        }
    )
    store, graph = open_store(config.store), build(config)
    made: dict[str, Artifact] = {}
    for name in ("source", "pairs"):
        stage = graph[name]
        key = scan(config.source, store, write=False).keys.get(name, name)
        ctx = make_context(stage, key, made, store, config)
        start = perf_counter()
        made[name] = stage.run(ctx)
    run = measured(site, kept, perf_counter() - start)
    if not nearly_all(made["pairs"].ledger.kept, kept):
        raise SystemExit(f"ours kept {made['pairs'].ledger}")
    return run, made["pairs"]


def theirs(file: Path, site: Site, folder: Path, kept: int, shard_rows: int, **settings: Any) -> Run:
    """Runs img2dataset on a list, with these settings, into ``folder``/out."""
    options = {
        "url_list": file,
        "input_format": "csv",
        "output_folder": folder / "out",
        "output_format": "webdataset",
        "number_sample_per_shard": shard_rows,
        "image_size": SIZE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_format": "jpg",
        "encode_quality": QUALITY,
        "extract_exif": False,  # ours does not either
        **settings,
    }
    command = [sys.executable, "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]
    start = perf_counter()
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = measured(site, kept, perf_counter() - start)
    found = sum(json.loads(file.read_text())["successes"] for file in (folder / "out").glob("*_stats.json"))
    if done.returncode or not nearly_all(found, kept):
        raise SystemExit(f"img2dataset kept {found} of {kept}:\n{done.stdout}")
    return run


def check_pictures(folder: Path, pairs: Artifact, other: Path) -> None:
    """Stops unless the first shard of both holds the same images, up to what two JPEG decoders make of one file."""
    store = open_store(str(folder))
    shard = read_shards(store, pairs)[0]
    index = read_table(store, shard.blobs["index"]).to_pylist()
    pictures = read_images(store, [Place.of(row, shard.blobs["images"]) for row in index])
    with tarfile.open(other / "out/00000.tar") as tar:
        files = {m.name: tar.extractfile(m) for m in tar}
        by_url = {
            json.load(file)["url"]: files[name.replace(".json", ".jpg")].read()  # type: ignore[union-attr, arg-type]
            for name, file in files.items()
            if name.endswith(".json")
        }
    for row, data in zip(index, pictures, strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(d))).astype(float) for d in (data, by_url[row["url"]]))
        if a.shape != b.shape or (error := np.square(a - b).mean()) > 4:
            raise SystemExit(f"{row['url']}: ours is {a.shape}, img2dataset's {b.shape}, mean squared error {error}")


def compare(site: Site, rounds: int, shards: int, shard_rows: int) -> tuple[list[Run], list[Run]]:
    """Runs both, in turn."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            file, rows = site.write_list(Path(a, "list.csv"), shards * shard_rows), shards * shard_rows
            for case in (0, 1) if number % 2 else (1, 0):
                if case == 0:
                    run, pairs = ours(file, site, Path(a), rows, shard_rows, workers=2, threads=THREADS)
                else:
                    run = theirs(file, site, Path(b), rows, shard_rows, processes_count=2, thread_count=THREADS)
                runs[case].append(run)
            check_pictures(Path(a), pairs, Path(b))
    return runs


def compare_on_the_web(site: Site, rounds: int, rows: int, dead_s: float) -> tuple[list[Run], list[Run]]:
    """Runs both on a list with dead and slow hosts, in turn."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            file = site.write_web_list(Path(a, "list.csv"), rows)
            kept = sum(".jpg" in line and not re.search(r"//127\.[79]\.", line) for line in file.open())
            for case in (0, 1) if number % 2 else (1, 0):
                if case == 0:
                    run, _ = ours(file, site, Path(a), kept, 1000, workers=1, timeout_s=dead_s)
                else:
                    run = theirs(file, site, Path(b), kept, 10_000, processes_count=1, thread_count=256, timeout=dead_s)
                runs[case].append(run)
    return runs


def show(name: str, runs: list[Run]) -> None:
    """Prints the medians of runs."""
    rates = sorted(run.rate for run in runs)
    print(f"  {name:34} {median(rates):7.1f} images/s   ({rates[0]:.1f} to {rates[-1]:.1f}); ", end="")
    print(f"whole {median(r.seconds for r in runs):.1f} s; server {median(r.server for r in runs):.1%} of a core")


def main() -> None:
    """Runs the benchmark."""
    chosen = parser(__doc__).parse_args()
    begin(__doc__, chosen)
    faster = 10 if chosen.quick else 1
    shards, shard_rows = (4, 20) if chosen.quick else (8, 300)  # img2dataset starts a new process after 5 shards
    with tempfile.TemporaryDirectory() as folder:
        mixed, small = Path(folder, "mixed"), Path(folder, "small")
        for pictures, sizes in ((mixed, MIXED), (small, SMALL)):
            pictures.mkdir()
            make_pictures(pictures, sizes, 8 if chosen.quick else 32)
            sizes_kb = sorted(file.stat().st_size / 1000 for file in pictures.glob("*.jpg"))
            print(f"  {pictures.name} pictures: {sizes_kb[0]:.0f} to {sizes_kb[-1]:.0f} kB, {median(sizes_kb):.0f} kB")
        with serving(mixed, 0) as site:
            own, other = compare(site, chosen.rounds, shards, shard_rows)
        show("ours, 2 workers", own)
        show("img2dataset, 2 processes", other)
        grown: dict[int, list[Run]] = {1: [], 4: []}
        with serving(small, DELAY_S) as site:
            for number in range(min(chosen.rounds, 3)):
                for workers in (1, 4) if number % 2 else (4, 1):
                    rows = shards // 2 * workers * shard_rows
                    with tempfile.TemporaryDirectory() as store:
                        file, slow = site.write_list(Path(store, "list.csv"), rows), {"threads": THREADS}
                        run, _ = ours(file, site, Path(store), rows, shard_rows, workers=workers, **slow)
                        grown[workers].append(run)
        with serving(small, WEB_S / faster, WEB_SPREAD) as site:
            web, web_other = compare_on_the_web(
                site, min(chosen.rounds, 3), 800 if chosen.quick else 8000, DEAD_S / faster
            )
        for workers, runs in grown.items():
            show(f"ours, {workers} workers, {DELAY_S * 1e3:.0f} ms to wait", runs)
        show("ours, one worker, web", web)
        show("img2dataset, 256 threads, web", web_other)
    finish(
        {
            "ours_over_img2dataset": median(a.rate / b.rate for a, b in zip(own, other, strict=True)),
            "four_workers_over_one": median(a.rate / b.rate for a, b in zip(grown[4], grown[1], strict=True)),
            "web_over_img2dataset": median(a.rate / b.rate for a, b in zip(web, web_other, strict=True)),
            "web_images_a_second": median(run.rate for run in web),
        }
    )


if __name__ == "__main__":
    main()
