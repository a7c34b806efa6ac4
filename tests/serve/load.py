"""Clients of a server, honest and hostile, for the tests of load and faults."""

import asyncio
import base64
import io
import json
import random
import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from PIL import Image

GOES = "goes"  # before it is answered
PATHS = ("/../../etc/passwd", "/v1/images/files/../../secrets.png", "/%2e%2e/%2e%2e/etc/passwd", "/v1/\0")
NAMES = ("fox", "house", "sea", "tree", "heart", "cat")


@dataclass
class Seen:
    """What the clients saw: how many answers of each status, the bundles that drew, and what was wrong."""

    statuses: Counter[int] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    bundles: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0


def bomb() -> bytes:
    """A PNG of a few kilobytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


async def honest(url: str, seen: Seen, until: float, client: random.Random, steps: int = 8) -> None:
    """Asks again and again, and checks that every image is the one that was asked for."""
    async with httpx.AsyncClient(timeout=300) as http:
        while time.monotonic() < until:
            prompt, seed = f"a {client.choice(NAMES)} {client.random():.9f}", client.randrange(2**40)
            asked = {"prompt": prompt, "seed": seed, "size": "64x64", "response_format": "b64_json", "steps": steps}
            began = time.monotonic()
            answer = await http.post(f"{url}/v1/images/generations", json=asked)
            seen.statuses[answer.status_code] += 1
            if answer.status_code in (429, 503):
                await asyncio.sleep(min(2, int(answer.headers.get("retry-after", 1))))
                continue
            if answer.status_code != 200:
                seen.wrong.append(f"{answer.status_code} {answer.text[:200]}")
                continue
            seen.slowest = max(seen.slowest, time.monotonic() - began)
            info = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).info
            if (info["caption"], info["seed"]) != (prompt, str(seed)):
                seen.wrong.append(f"asked for {prompt!r} {seed}, got {info['caption']!r} {info['seed']}")
            seen.bundles.append(json.loads(info["made"])["bundle"])


def hostile_requests(client: random.Random) -> dict[str, bytes]:
    """What nobody should send, by what it is."""

    def post(
        body: bytes, path: str = "/v1/images/generations", kind: str = "application/json", length: int = 0
    ) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body

    def variation(image: bytes) -> bytes:
        part = (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + image + b"\r\n--x--\r\n"
        )
        return post(part, "/v1/images/variations", "multipart/form-data; boundary=x")

    return {
        "prompt of 1 MB": post(json.dumps({"prompt": "x" * 1_000_000}).encode()),
        "nested JSON": post(b'{"prompt": ' + b"[" * 30000),
        "path": post(b"{}", client.choice(PATHS)),
        "bomb": variation(bomb()),
        "cut image": variation(bomb()[:200]),
        "huge body": post(bytes(1 << 20), length=1 << 40),
        "slow body": post(b"{}", length=100),
        GOES: post(json.dumps({"prompt": f"a tree {client.random()}", "steps": 30, "stream": True}).encode()),
        "nonsense": b"\x00\x01 nonsense\r\n\r\n",
    }


async def hostile(url: str, seen: Seen, until: float, client: random.Random) -> None:
    """Sends what nobody should, and counts how it was answered; "closed" means that no answer came."""
    while time.monotonic() < until:
        kind, data = client.choice([*hostile_requests(client).items()])
        status = "closed"
        with suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
            with closing(writer):
                writer.write(data)
                await writer.drain()
                if kind == GOES:
                    await asyncio.sleep(client.random())
                elif found := re.match(rb"HTTP/1.1 (\d+)", await asyncio.wait_for(reader.read(64), 60)):
                    status = found[1].decode()
        seen.hostile[f"{kind}:{status}"] += 1
        await asyncio.sleep(0.05)


def load(url: str, seconds: float, clients: int, hostiles: int, steps: int = 8, seed: int = 0) -> Seen:
    """Puts a server under load for some seconds and returns when every request is answered."""
    seen, until = Seen(), time.monotonic() + seconds

    async def run() -> None:
        good = (honest(url, seen, until, random.Random(f"{seed} {i}"), steps) for i in range(clients))
        bad = (hostile(url, seen, until, random.Random(f"{seed} bad {i}")) for i in range(hostiles))
        await asyncio.gather(*good, *bad)

    asyncio.run(run())
    return seen


def until(event: Callable[[], object], timeout: float = 300) -> None:
    """Waits until something is the case."""
    deadline = time.monotonic() + timeout
    while not event():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def figure(url: str, name: str) -> float:
    """Returns a figure of a server, with its labels; it is 0 before these labels are counted."""
    text = httpx.get(f"{url}/metrics").text
    assert f"# TYPE unclip_{name.partition('{')[0]} " in text
    found = re.search(rf"^unclip_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def processes_below(pid: int) -> dict[int, str]:
    """Returns the processes below one, with their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            parents[int(entry.name)] = int(fields[1])
        except OSError:
            continue

    def below(one: int) -> bool:
        while one > 1:
            one = parents.get(one, 0)
            if one == pid:
                return True
        return False

    return {one: name for one, name in names.items() if below(one)}


def memory(pids: dict[int, str], name: str) -> int:
    """Returns the resident bytes of the processes whose command lines have a name."""
    found = [pid for pid, command in pids.items() if name in command]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in found)
