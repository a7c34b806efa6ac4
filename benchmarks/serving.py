"""Compares ``unclip serve`` with the bare models: one client, eight clients, and time to the first image.

The bundle of a run, by default the newest under out/. Requests go over HTTP to a server of its own; the bare models
draw batches of the same size in this process before the server starts, so that both have the whole machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser

import httpx

from jobs.bundles import find_bundle
from pipeline.sampling.drawing import open_bundle, png_with_text

CAPTION = "a red heart on a pale green background"
CLIENTS = 8


def bare(source: str | None, batch: int, images: int, side: int) -> float:
    """Returns images a second of the models alone, with their PNG files."""
    unclip = open_bundle(find_bundle(source).folder)
    unclip.generate([CAPTION] * batch, range(batch), size=side, decoder_steps=2)
    began = time.monotonic()
    for start in range(0, images, batch):
        made = unclip.generate([CAPTION] * batch, range(start, start + batch), size=side)
        for pixels in made.image.numpy():
            png_with_text(pixels, {})
    return images / (time.monotonic() - began)


async def ask(url: str, seed: int, side: int) -> dict[str, float]:
    """Returns the seconds until each size of one streamed image has come."""
    asked = {"prompt": CAPTION, "seed": seed, "size": f"{side}x{side}", "stream": True, "partial_images": 3}
    came, began = {}, time.monotonic()
    async with (
        httpx.AsyncClient(timeout=600) as http,
        http.stream("POST", f"{url}/v1/images/generations", json=asked) as answer,
    ):
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "b64_json" in event:
                    came[event["size"]] = time.monotonic() - began
    if asked["size"] not in came:
        raise RuntimeError(f"{url} drew no image of seed {seed}")
    return came


async def clients(url: str, count: int, each: int, side: int, seed: int) -> float:
    """Returns images a second of ``count`` clients that ask ``each`` times, one request after the other."""

    async def client(number: int) -> None:
        for i in range(each):
            await ask(url, seed + number * each + i, side)

    began = time.monotonic()
    await asyncio.gather(*(client(number) for number in range(count)))
    return count * each / (time.monotonic() - began)


def main() -> int:
    """Prints the figures; the last line is JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="a bundle; by default the newest under out/")
    parser.add_argument("--batch", type=int, default=4, help="images drawn at once (4)")
    parser.add_argument("--size", type=int, default=256, choices=(64, 256, 1024), help="of the throughput (256)")
    parser.add_argument("--quick", action="store_true", help="few images, to see that it runs")
    arguments = parser.parse_args()
    side, batch, each = arguments.size, arguments.batch, 1 if arguments.quick else 10
    found: dict[str, object] = {"bare": bare(arguments.source, batch, batch * each, side)}
    words = [sys.executable, "-m", "jobs.cli", "serve", *([arguments.source] if arguments.source else []), "port=0"]
    server = subprocess.Popen([*words, f"batch={batch}"], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert server.stdout is not None
    try:
        url = next(line for line in server.stdout if " at http" in line).partition(" at ")[2].split("/,")[0]
        largest = httpx.get(f"{url}/v1/models").json()["data"][0]["unclip"]["sides"][-1]
        found["first"] = asyncio.run(ask(url, 10**6, largest))
        found["one client"] = asyncio.run(clients(url, 1, each, side, 0))
        found["eight clients"] = asyncio.run(clients(url, CLIENTS, each, side, 10**4))
    finally:
        server.terminate()
        server.wait(120)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
