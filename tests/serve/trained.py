"""A store with a bundle of random weights, and the rows that it was trained on, as far as a server can tell."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from jobs.bundles import remember_bundle
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.store.records import digest, put_blob
from serve.api import make_api
from serve.bundle import ServedBundle
from serve.gateway import Gateway, ResultCache
from serve.queue import Event, RequestQueue, RequestRefused
from serve.settings import ServeSettings
from serve.work import Work
from tests.models.small_models import make
from tests.pipeline.data.bench import Bench, picture

LICENSES = ("CC-BY 4.0", "unknown", "CC-BY 4.0", "CC0")


def make_trained(folder: Path) -> Bench:
    """Four images with licences, of which the last is held out; the bundle that the output folder ``out`` names."""
    rows = ["url,caption,split,license,attribution"]
    for i, license in enumerate(LICENSES):
        (folder / f"{i}.png").write_bytes(picture(i))
        rows.append(f"file://{folder}/{i}.png,image {i},{'test' if i == 3 else 'train'},{license},By {i}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    unclip = make()
    unclip.clip.save(folder / "clip")
    weights = f"local-dir:{folder / 'clip'}"
    bench = Bench(folder / "store", [str(folder / "list.csv")], clip={"weights": weights})
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation", "index")
    unclip.save(folder / "bundle")
    files = (file for file in sorted((folder / "bundle").rglob("*")) if file.is_file())
    blobs = {str(file.relative_to(folder / "bundle")): put_blob(bench.store, file) for file in files}
    publish(bench, "decoder", {name: bench.made[name].key for name in ("captions", "curation", "embeddings", "pairs")})
    bundle = publish(bench, "bundle", {name: bench.made[name].key for name in ("clip", "decoder")}, blobs)
    remember_bundle(folder / "out", bench.store.url, bundle.key)
    return bench


def publish(bench: Bench, stage: str, inputs: dict[str, str], blobs: dict[str, str] | None = None) -> Artifact:
    """Publishes an artefact that no stage has made."""
    artifact = Artifact(stage, digest(inputs), inputs, {}, Ledger(), blobs or {})
    bench.made[stage] = publish_artifact(bench.store, artifact, 0.0)
    return bench.made[stage]


def api_of(bench: Bench, settings: ServeSettings, store: str, tokens: Mapping[str, str]) -> FastAPI:
    """The API of a server that knows its bundle, and draws nothing."""

    async def ask() -> dict[str, Any]:
        about = {
            "priors": ["diffusion"],
            "sampling": {"prior": "diffusion", "decoder_steps": 4},
            "timesteps": 8,
            "context": 77,
            "device": "cpu",
        }
        return {"bundle": bench.made["bundle"].key, "sides": [64, 256], **about}

    async def draw(work: Work) -> AsyncGenerator[Event]:
        raise RequestRefused(
            " ".join(
                [
                    "nothing is drawn here,",
                    work.kind,
                    "least of all",
                    *([] if work.recipe.before is None else [work.recipe.before]),
                ]
            )
        )
        yield

    def observe(name: str, value: float = 1, **labels: str) -> None:
        pass

    served = ServedBundle("bench", store=store, key=bench.made["bundle"].key)
    queue = RequestQueue(draw, replace(settings, replicas=1), observe)
    return make_api(Gateway(served, settings, queue, ResultCache(0), ask, observe), tokens, bytes)
