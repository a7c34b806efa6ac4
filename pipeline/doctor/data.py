"""Checks what a run would train on: the list, and a pretrained CLIP."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pipeline.config import Config
from pipeline.data.source.stage import Scan
from pipeline.doctor.clip_weights import find_weights, named_weights
from pipeline.doctor.finding import Finding
from pipeline.errors import UserError
from pipeline.held_out import short_splits
from pipeline.progress import counted


def check_list(scan: Scan, stages: Collection[str]) -> Iterator[Finding]:
    """Yields how many pairs a list has, and a warning for each split with too few for the evaluation among stages."""
    rows, held_out = sum(shard.ledger.kept for shard in scan.shards), scan.held_out
    splits = " and ".join(f"{held_out.get(split, 0):,} for {split}" for split in ("test", "validation"))
    yield Finding("ok", "list", f"{counted(rows, 'pair')}, of which {splits}")
    if "evaluation" in stages:
        for line in short_splits(held_out):
            yield Finding("warning", "list", line)


def check_clips(config: Config, stages: Collection[str]) -> Iterator[Finding]:
    """Yields where each CLIP is that these stages load, or that it is nowhere."""
    for setting, weights in named_weights(config, stages):
        try:
            yield Finding("ok", "clip", f"{setting} {weights}: {find_weights(setting, weights)}")
        except UserError as e:
            yield Finding("problem", "clip", str(e))
