"""Makes up a chain in a store: every artefact that a report can show, with real images, without running a stage."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.build import build
from pipeline.config import Run, load_config
from pipeline.data.curation.rejected import Rejected, rejected_table
from pipeline.data.pairs.row_index import index_table
from pipeline.data.source.segments import row_key
from pipeline.evaluate.figure import Figure, without_values
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    publish_artifact,
    publish_shard,
    read_shards,
    read_table,
    write_shard_table,
    write_table,
)
from pipeline.graph.stages import Graph
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import digest, put_blob

ROOT = Path(__file__).parents[3]
COLOURS = ("crimson", "coral", "gold", "seagreen", "teal", "royalblue", "purple", "grey")
SHAPES = ("circle", "square", "triangle")
SHARDS, ROWS = 3, 30
WITH_TIMESTEPS = ("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")


def config() -> Any:
    """Returns as much of a configuration as the report looks at."""
    return SimpleNamespace(project="shapes", run=Run(output="out/shapes"))


@cache
def graph(*overrides: str) -> Graph:
    """Returns the stages of the quick start's configuration, with these overrides."""
    return build(load_config(ROOT / "configs/nano.yaml", overrides))


def drawn(side: int, colour: str, shape: str, blur: float = 0.0, seed: int = 0) -> Image.Image:
    """Draws a shape on white; ``blur`` from 0 (as drawn) to 1 (noise)."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    a, b = side * 0.2, side * 0.8
    if shape == "circle":
        draw.ellipse((a, a, b, b), fill=colour)
    elif shape == "square":
        draw.rectangle((a, a, b, b), fill=colour)
    else:
        draw.polygon(((side / 2, a), (a, b), (b, b)), fill=colour)
    noise = Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))
    return Image.blend(image, noise, blur)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind, compress_level=1)
    return out.getvalue()


def chain(store: Store, caption: str | None = None) -> dict[str, Artifact]:
    """Publishes all artefacts, by stage; ``caption`` replaces every caption, and the attribution."""
    return {
        **_data(store, caption),
        "index": _publish(store, "index", ledger=Ledger(kept=50)),
        "codec": _publish(store, "codec", ledger=Ledger(kept=50), recipe={"components": 319}, metrics=_codec_metrics()),
        **{stage: _trained(store, stage) for stage in ("clip", "ar_prior", "diffusion_prior", "decoder")},
        **{stage: _trained(store, stage) for stage in ("upsampler_256", "upsampler_1024")},
        "bundle": _publish(store, "bundle", ledger=Ledger(), recipe={"candidates": 2}),
        "samples": _samples(store, caption),
        "evaluation": _evaluation(store, caption),
    }


def culled(store: Store, made: dict[str, Artifact], lost: Sequence[Rejected]) -> dict[str, Artifact]:
    """Returns the chain with these rows rejected by curation, besides its others."""
    gone = {row.key for row in lost}
    shards = []
    for shard in read_shards(store, made["curation"]):
        before = [Rejected(**row) for row in read_table(store, shard.blobs["rejected"]).to_pylist()]
        rejected = before + [row for row in lost if int(row.key[:-4]) == shard.number]
        kept = [r for r in read_table(store, shard.blobs["index"]).to_pylist() if r["key"] not in gone]
        blobs = {"index": put_blob(store, write_table(index_table(kept)))}
        blobs["rejected"] = put_blob(store, rejected_table(rejected))
        ledger = Ledger(len(kept), dict(Counter(row.reason for row in rejected)))
        shards.append(Shard(shard.number, f"{shard.key}-culled", ledger, blobs))
    table, ledger = write_shard_table(store, shards)
    return made | {"curation": replace(made["curation"], shard_table=table, ledger=ledger)}


def alike(store: Store, made: dict[str, Artifact]) -> list[Rejected]:
    """Returns every row that curation keeps and that has the same image as an earlier one."""
    first: dict[str, str] = {}
    lost = []
    for shard in read_shards(store, made["curation"]):
        for row in read_table(store, shard.blobs["index"]).to_pylist():
            near = first.setdefault(row["sha256"], row["key"])
            if near != row["key"]:
                lost.append(Rejected(row["key"], "near_duplicate", near))
    return lost


def _publish(store: Store, stage: str, seconds: float = 12.5, **fields: Any) -> Artifact:
    fields = {"inputs": {}, "recipe": {}, **fields}
    return publish_artifact(store, Artifact(stage=stage, key=digest(stage), **fields), seconds)


def _data(store: Store, caption: str | None) -> dict[str, Artifact]:
    names = ("source", "captions", "pairs", "filter", "embeddings", "curation")
    shards: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(SHARDS):
        rows, captions, images = _rows(number, caption)
        sources = Ledger.count("duplicate_url" if row["reason"] == "duplicate_url" else None for row in rows)
        kept = [row for row in rows if row["status"] == "kept"]
        chosen = kept[:-1]
        keys = pa.array([row["key"] for row in rows])
        rng = random.Random(number)
        scores = pa.array([rng.gauss(0.31, 0.06) for _ in kept], pa.float32())
        made = {
            "source": (sources, {"refs": b"refs"}),
            "captions": (sources, {"captions": write_table({"key": keys, "captions": pa.array(captions)})}),
            "pairs": (
                Ledger.count(row["reason"] for row in rows),
                {"index": write_table(index_table(rows)), "images": images},
            ),
            "filter": (Ledger(len(kept)), {"index": write_table(index_table(kept))}),
            "embeddings": (
                Ledger(len(kept)),
                {"embeddings": write_table({"key": pa.array([row["key"] for row in kept]), "similarity": scores})},
            ),
            "curation": (
                Ledger(len(chosen), {"low_similarity": 1}),
                {
                    "index": write_table(index_table(chosen)),
                    "rejected": write_table(
                        {"key": pa.array([kept[-1]["key"]]), "reason": pa.array(["low_similarity"])}
                    ),
                },
            ),
        }
        for stage, (ledger, blobs) in made.items():
            shards[stage].append(publish_shard(store, stage, number, digest([stage, number]), ledger, blobs, {}))
    result = {}
    for stage, of_stage in shards.items():
        table, ledger = write_shard_table(store, of_stage)
        result[stage] = _publish(store, stage, shard_table=table, ledger=ledger, recipe={"shard_rows": ROWS})
    return result


def _rows(number: int, caption: str | None) -> tuple[list[dict[str, Any]], list[list[str]], bytes]:
    """Returns index rows, their captions, and the bytes that hold their images."""
    rows, captions, images = [], [], b""
    reasons = {3: "duplicate_url", 9: "http_4xx", 10: "timeout", 17: "truncated"}
    for i in range(ROWS):
        colour, shape = COLOURS[(i + number) % len(COLOURS)], SHAPES[i % len(SHAPES)]
        captions.append([caption or f"a {colour} {shape} on white"])
        row: dict[str, Any] = {
            "key": row_key(number, i),
            "url": f"https://example.com/{number}/{i}.png",
            "split": "train",
        }
        row |= {"license": "CC-BY-4.0", "attribution": caption or "Shapes, drawn by nobody in particular"}
        if i in reasons:
            rows.append({**row, "status": "rejected", "reason": reasons[i]})
            continue
        data = encoded(drawn(96, colour, shape))
        row |= {"width": 96, "height": 96, "offset": len(images)}
        row |= {"sha256": hashlib.sha256(data).hexdigest()}
        rows.append({**row, "size": len(data), "status": "kept", "reason": None})
        images += data
    return rows, captions, images


def _codec_metrics() -> dict[str, Any]:
    ratios = [math.exp(-i / 12) for i in range(95)]
    return {
        "requested": 319,
        "components": 95,
        "explained_variance_ratio": [ratio / sum(ratios) for ratio in ratios],
        "explained": 0.991,
        "reconstruction_error": 0.0091,
        "round_trip_error": 0.0093,
        "warnings": ["319 components asked for, 95 kept: the embeddings have no more"],
    }


def _trained(store: Store, stage: str) -> Artifact:
    rng = random.Random(stage)
    lines: list[dict[str, Any]] = []
    for step in range(400):
        loss = 0.03 + math.exp(-step / 60) * 0.9
        lines.append({"samples": step * 128, "loss": loss * rng.uniform(0.8, 1.2), "grad_norm": 1.0})
        if step % 80 == 79:
            quarters = {f"validation_loss_quarter_{i}": loss * 4 / i for i in range(1, 5) if stage in WITH_TIMESTEPS}
            lines.append({"samples": step * 128, "validation_loss": loss * 1.1, "validation_rows": 40} | quarters)
    blobs = {"metrics.jsonl": put_blob(store, "\n".join(map(json.dumps, lines)).encode())}
    if stage in ("decoder", "upsampler_256", "upsampler_1024"):
        side = {"decoder": 64, "upsampler_256": 96, "upsampler_1024": 128}[stage]
        for samples, blur in ((0, 1.0), (12_800, 0.6), (25_600, 0.25), (51_200, 0.05)):
            blobs[f"previews/{samples:012d}.png"] = blobs["preview.png"] = put_blob(store, _grid(side, blur))
    metrics = {"loss": 0.0312, "validation_loss": 0.0345, "gradient_norm": 0.41, "samples_seen": 51_200}
    times = {"samples_per_second": 243.2, "share_wait": 0.02, "share_forward": 0.98, "utilisation": 0.41}
    recipe = {"samples": 51_200, "batch": 128, "precision": "bf16"}
    environment = {"device": "cpu", "precision": "fp32" if stage == "clip" else "bf16"}
    return _publish(
        store,
        stage,
        seconds=210.0,
        ledger=Ledger(kept=75),
        blobs=blobs,
        metrics=metrics,
        times=times,
        recipe=recipe,
        environment=environment,
    )


def _grid(side: int, blur: float) -> bytes:
    grid = Image.new("RGB", (4 * side, 2 * side))
    for i, colour in enumerate(COLOURS):
        grid.paste(drawn(side, colour, SHAPES[i % 3], blur, i), (i % 4 * side, i // 4 * side))
    return encoded(grid)


def _samples(store: Store, caption: str | None) -> Artifact:
    blobs = {}
    for i in range(6):
        final = drawn(512, COLOURS[i], SHAPES[i % 3], 0.02, i)
        blobs[f"{i:04d}.png"] = put_blob(store, encoded(final))
        blobs[f"{i:04d}-64.png"] = put_blob(store, encoded(final.resize((64, 64))))
    captions = [caption or f"a {COLOURS[i]} {SHAPES[i % 3]} on white" for i in range(6)]
    metrics = {"captions": captions, "seeds": list(range(6)), "settings": {"prior": "diffusion_prior", "guidance": 1.0}}
    return _publish(store, "samples", 31.0, ledger=Ledger(kept=6), blobs=blobs, metrics=metrics, recipe={"seed": 0})


def _evaluation(store: Store, caption: str | None) -> Artifact:
    common: dict[str, Any] = {"rows": 8, "split": "test"}
    figures = [
        Figure("draws", "It draws.", "ar_prior", "top", "top", 0.82, 0.12, (0.5, 0.9), True, trained=0.9, **common),
        Figure("draws", "It draws.", "ar_prior", "pot", "pot", 0.4, 0.2, (-0.1, 0.3), False, trained=0.5, **common),
        Figure("listens", "It listens.", "decoder", "condition", "decoder", 0.52, 0.5, (0.01, 0.03), True, **common),
        Figure("enlarges", "It enlarges.", "upsampler_256", "psnr", "PSNR in dB", note=caption or "too few rows"),
    ]
    found = [figure.as_json() for figure in figures]
    captions = [caption or f"a {colour} circle on white" for colour in COLOURS]
    blobs = {"held-out.png": put_blob(store, _grid(64, 0.1))}
    blobs["evaluation.json"] = put_blob(store, json.dumps({"figures": found}).encode())
    shown = {"captions": captions, "licenses": ["CC-BY-4.0"] * 4 + [None] * 4, "models": ["ar_prior", "decoder"]}
    metrics = {"figures": without_values(found), "shown": shown}
    return _publish(store, "evaluation", 9.0, ledger=Ledger(kept=8), blobs=blobs, metrics=metrics, recipe={"rows": 8})


JUDGED = 16


def bundle_of(store: Store, made: dict[str, Artifact], name: str, gain: float, better: str) -> dict[str, Artifact]:
    """Publishes a bundle, its samples and its evaluation, whose one figure with values is ``gain`` higher."""
    decoder = publish_artifact(
        store, replace(made["decoder"], key=digest(f"{name} decoder"), recipe={"gain": gain}), 1.0
    )
    publish_artifact(store, made["clip"], 1.0)
    inputs = {"clip": made["clip"].key, "decoder": decoder.key}
    bundle = publish_artifact(store, replace(made["bundle"], key=digest(name), inputs=inputs), 1.0)
    values = tuple(np.random.default_rng(0).normal(0.5, 0.2, JUDGED) + gain)
    figure = Figure(
        "draws", "It draws.", "decoder", "top", "top", better=better, values=values, groups=tuple(range(JUDGED))
    ).as_json()
    measured: dict[str, Any] = {"version": 1, "recipe": {}, "rows": {}, "figures": [figure]}
    blobs = {**made["evaluation"].blobs, "evaluation.json": put_blob(store, json.dumps(measured).encode())}
    of = {"bundle": bundle.key}
    evaluation = replace(made["evaluation"], key=digest(f"{name} evaluation"), inputs=of, blobs=blobs)
    samples = replace(made["samples"], key=digest(f"{name} samples"), inputs=of)
    found = {"decoder": decoder, "bundle": bundle, "samples": publish_artifact(store, samples, 1.0)}
    return made | found | {"evaluation": publish_artifact(store, evaluation, 1.0)}


def figure(holds: bool | None, text: str = "It draws.", **more: Any) -> dict[str, Any]:
    known = {"model": "decoder", "name": "x", "says": "x"} | more
    values = {"value": 0.5, "baseline": 0.4, "rows": 8} if holds is not None else {}
    return Figure(text, text, **known | values, holds=holds).as_json()


def judged(made: dict[str, Artifact], *figures: dict[str, Any]) -> dict[str, Artifact]:
    metrics = {**made["evaluation"].metrics, "figures": list(figures)}
    return made | {"evaluation": replace(made["evaluation"], metrics=metrics)}
