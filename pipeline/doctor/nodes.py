"""Checks that Ray starts or the cluster answers, and that all its nodes have the same code and see the same store."""

from __future__ import annotations

import hashlib
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.doctor.finding import Finding, brief
from pipeline.doctor.storage import PROBES, leaving_nothing
from pipeline.errors import UserError
from pipeline.graph.ray import ClusterNode, ask_every_node, start_ray
from pipeline.settings import RaySettings
from pipeline.store import Store, local_folder

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "pillow")  # what workers hand each other, and what makes bytes
WAIT_S = 120.0  # for the answer of a node that may be busy, and has to import everything first


@dataclass(frozen=True)
class Answer:
    """What one node says: its versions, and what kept it from reading the probe ("": nothing did)."""

    versions: Mapping[str, str]
    unseen: str = ""


@dataclass(frozen=True)
class Question:
    """Called on a node. With a store, it reads the probe there."""

    store: Store | None
    probe: str

    def __call__(self) -> Answer:
        if self.store is None:
            return Answer(versions())
        try:
            seen = self.store.read(self.probe) == self.probe.encode()
            return Answer(versions(), "" if seen else "other bytes than were written")
        except FileNotFoundError:
            return Answer(versions(), "it is not there")
        except Exception as e:  # exceptions of libraries do not all survive the journey
            return Answer(versions(), str(e) if isinstance(e, UserError) else brief(e))


def versions() -> dict[str, str]:
    """Returns the versions that must be equal on every node, and a digest of this project's code.

    The local part of a version, such as +cpu, is left out: it depends on a node's GPUs.
    """
    code = hashlib.sha256()
    for folder in ("models", "pipeline"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            code.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    found = {"Python": platform.python_version(), "code": code.hexdigest()[:8]}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def check_nodes(settings: RaySettings, store: Store | None) -> Iterator[Finding]:
    """Starts Ray, or joins the cluster of RAY_ADDRESS, asks every node, and leaves. ``store`` passed its own check."""
    began = time.monotonic()
    try:
        ray = start_ray(settings)
        try:
            answers = ask_nodes(ray, store)
        finally:
            ray.shutdown()
    except UserError as e:
        yield Finding("problem", "ray", str(e))
    except Exception as e:  # Ray's own, of many types
        yield Finding("problem", "ray", f"does not answer ({brief(e)})", "run doctor again, or look at ray status")
    else:
        cpus, gpus = (sum(getattr(node, kind) for node, _ in answers) for kind in ("cpus", "gpus"))
        count = f"{len(answers)} node{'s' if len(answers) > 1 else ''}, {cpus:g} CPUs, {gpus:g} GPUs"
        yield Finding("ok", "ray", f"{count}, answered after {time.monotonic() - began:.0f} s")
        yield from judge(answers, versions(), store)


def ask_nodes(ray: Any, store: Store | None) -> list[tuple[ClusterNode, Answer | Exception]]:
    """Returns every node's answer, or its error; each node reads what this process has written to the store."""
    probe = f"{PROBES}/probe-{secrets.token_hex(8)}"
    with leaving_nothing(store) if store else nullcontext():
        try:
            if store:
                store.create(probe, probe.encode())
            return ask_every_node(ray, Question(store, probe), WAIT_S)
        finally:
            if store:
                store.delete([probe])


def judge(
    answers: Sequence[tuple[ClusterNode, Answer | Exception]], ours: Mapping[str, str], store: Store | None
) -> Iterator[Finding]:
    """Findings about nodes: each that differs from this process or cannot reach the store, or one for all."""
    faults = [fault for node, answer in answers for fault in _faults(node.host, answer, ours, store)]
    yield from faults
    if not faults:
        same = ", ".join(f"{name} {version}" for name, version in ours.items())
        yield Finding("ok", "nodes", f"all have {same}{' and see the store' if store else ''}")


def _faults(host: str, answer: Answer | Exception, ours: Mapping[str, str], store: Store | None) -> Iterator[Finding]:
    if isinstance(answer, Exception):
        yield Finding(
            "problem", "nodes", f"{host} does not answer ({brief(answer)})",
            "look at this node with ray status, and install this project on it",
        )  # fmt: skip
        return
    differing = [
        f"{name} {answer.versions[name]} (here {ours[name]})" for name in ours if answer.versions[name] != ours[name]
    ]
    if differing:
        yield Finding("problem", "nodes", f"{host} has {', '.join(differing)}", "install the same on every node")
    if answer.unseen and store:
        advice = "give every node the same AWS settings"
        if local_folder(store):
            advice = "use s3://BUCKET/PREFIX, or a folder that every machine mounts at the same place"
        yield Finding("problem", "nodes", f"{host} cannot reach the store {store.url} ({answer.unseen})", advice)
