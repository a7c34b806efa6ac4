"""Compares saving and restoring a checkpoint on S3 with one request a part, one part after another.

SeaweedFS on this machine answers through a proxy that waits 4 ms before each request and carries 50 MB/s on each
connection, as S3 does. The other side sends each part (weights, averaged weights, moments) as one object by boto3, and
reads it back as one, with the same checks. Then a training of one thread, whose saves take longer than their interval,
and the same training without saves: on a core to itself, while saving, proxy and server share another.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load, save
from torch import nn

from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from pipeline.store import open_store
from pipeline.training.checkpoints import Checkpoints, snapshot
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState, parts
from tests.fault_proxy import always, failing
from tests.seaweed import Server, serving

LATENCY_S = 0.004
BYTES_PER_S = 50e6
SIDE = 2048
CORES = os.sched_getaffinity(0)
INTERVAL_S = 0.5  # between two saves; one takes longer


def make_state(size: float) -> TrainState:
    """Returns a state whose weights, averaged weights and moments have this many bytes together."""
    layers = max(1, round(size / (16 * SIDE * SIDE)))
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {kind: torch.rand_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.ones(()), **moments}
    objective: Any = SimpleNamespace(model=model)
    return TrainState(objective, deepcopy(model), optimizer, samples=1)


class InTurn:
    """Saves and restores the parts of a state as one object each, one after another."""

    def __init__(self, url: str, state: TrainState):
        import boto3

        where = urlsplit(url)
        self.client, self.bucket, self.prefix = boto3.client("s3"), where.netloc, where.path.strip("/")
        self.state = state
        self.digests: dict[str, str] = {}

    def save(self) -> None:
        """Uploads each part under its SHA-256."""
        for part, tensors in parts(self.state).items():
            data = save({name: tensor.detach() for name, tensor in tensors.items()})
            self.digests[part] = hashlib.sha256(data).hexdigest()
            self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{part}", Body=data)

    def restore(self) -> None:
        """Downloads and checks each part."""
        for part, digest in self.digests.items():
            data = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{part}")["Body"].read()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{part} came back with other bytes")
            load(data)


def steps(seconds: float, state: TrainState, saver: Saver | None) -> float:
    """Returns the steps a second of a training of one thread that saves whenever the saver says so."""
    weights, rows = torch.rand(SIDE, SIDE), torch.rand(64, SIDE)
    if saver is not None:
        saver.save(state)  # in a thread that begins, and stays, on this thread's core
        saver.wait()
    os.sched_setaffinity(0, {min(CORES)})
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(rows, weights)
        done += 1
        if saver is not None and saver.free() and saver.late():
            state.samples += 1
            saver.save(state)
    rate = done / (time.perf_counter() - began)
    os.sched_setaffinity(0, {max(CORES)})
    return rate


def measure_saves(options: argparse.Namespace, server: Server) -> dict[str, list[float]]:
    """Returns the seconds of saving and restoring, ours and in turn."""
    store = open_store(f"{server.url}/checkpoints")
    state, other = make_state(options.gigabytes * 1e9), make_state(options.gigabytes * 1e9)
    ours, in_turn = Checkpoints(store, "ours", 1, keep=1), InTurn(f"{server.url}/in-turn", state)

    def save_ours() -> None:
        state.samples += 1
        with torch.no_grad():
            for parameter in state.model.parameters():  # other bytes, or nothing would be stored
                parameter[0] += 1
                state.optimizer.state[parameter]["exp_avg"][0] += 1
            for parameter in state.ema.parameters():
                parameter[0] += 1
        ours.publish(snapshot(state))

    saves = interleave({"save, ours": save_ours, "save, in turn": in_turn.save}, options.rounds)

    def restore() -> None:
        if not ours.restore(other, state.samples):
            raise RuntimeError("no checkpoint was found")

    return saves | interleave({"restore, ours": restore, "restore, in turn": in_turn.restore}, options.rounds)


def measure_training(options: argparse.Namespace, server: Server) -> dict[str, list[float]]:
    """Returns the steps a second of a training alone, and of one that saves."""
    store, state = open_store(f"{server.url}/checkpoints"), make_state(options.gigabytes * 1e8)
    trained: dict[str, list[float]] = {"alone": [], "saving": []}
    for number in range(max(1, options.rounds // 2)):
        trained["alone"].append(steps(options.seconds, state, None))
        course = Checkpoints(store, f"course-{number}", 1)
        with Saver(course, ProcessGroup(0, 1, torch.device("cpu")), INTERVAL_S) as saver:
            trained["saving"].append(steps(options.seconds, state, saver))
    return trained


@contextmanager
def slow_server() -> Iterator[Server]:
    """Starts the S3 server behind the proxy, and sets the environment that leads there."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server, failing(server.endpoint) as proxy:
        proxy.choose, proxy.pause_s, proxy.bytes_per_s = always("delay"), LATENCY_S, BYTES_PER_S
        os.environ |= server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
        yield server


def main() -> None:
    """Runs the benchmark."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--gigabytes", type=float, default=1.0, help="of the checkpoint (1)")
    options_parser.add_argument("--seconds", type=float, default=120.0, help="of each training (120)")
    options = options_parser.parse_args()
    begin(__doc__, options)
    if options.quick:
        options.gigabytes, options.seconds, options.rounds = 0.01, 1.0, 1
    with slow_server() as server:
        times = measure_saves(options, server)
        show(times, 1, "s")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(CORES)})  # and all that is started from here on, but for the trainings
    with slow_server() as server:
        trained = measure_training(options, server)
        show(trained, 1, "steps/s")
    finish(
        {
            "save_in_turn_over_ours": ratio(times, "save, in turn", "save, ours"),
            "restore_in_turn_over_ours": ratio(times, "restore, in turn", "restore, ours"),
            "rate_saving_over_alone": ratio(trained, "saving", "alone"),
        }
    )


if __name__ == "__main__":
    main()
