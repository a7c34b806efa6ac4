"""The pairs of a project as an iterable, a webdataset and a Ray Dataset."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from models.view import view
from pipeline.data.curation.reading import FACTS, VECTORS, Pair, PairReader
from pipeline.data.export import SUFFIXES
from pipeline.graph.ray import start_ray
from pipeline.progress import counted
from pipeline.settings import RaySettings

COLUMNS = pa.schema(
    [(name, pa.int64() if name in ("width", "height") else pa.string()) for name in FACTS]
    + [("captions", pa.list_(pa.string())), ("data", pa.binary())]
    + [(name, pa.list_(pa.float16())) for name in VECTORS]
)


@dataclass(frozen=True)
class Pairs:
    """Reads pairs where they lie; ``len`` is their number. Iterating yields a Pair with its image, in order."""

    reader: PairReader
    settings: RaySettings

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[Pair]:
        for position in range(self.reader.shards):
            for pairs in self.reader.read(position):
                yield from pairs

    def tensors(self, side: int = 0) -> dict[str, Any]:
        """Returns all pairs in memory, as ``unclip.train`` takes them.

        They are "captions", "image_embedding" and "text_embedding" fp32 [n, d] where embeddings are read, and with a
        ``side`` "image", the square centre of each, uint8 [n, 3, side, side].
        """
        import torch

        columns: dict[str, list[Any]] = defaultdict(list)
        for pair in self:
            columns["captions"].append(pair.caption)
            for name in VECTORS if self.reader.embedded else ():
                columns[name].append(torch.tensor(getattr(pair, name)).float())
            if side:
                columns["image"].append(torch.tensor(view(pair.image, side)).permute(2, 0, 1))
        return {name: each if name == "captions" else torch.stack(each) for name, each in columns.items()}

    def webdataset(self) -> Any:
        """Returns a webdataset: samples of ``__key__``, "jpg" (or "png", "webp"), "txt" and "json", all bytes.

        It has webdataset's methods: ``.shuffle(1000).decode("pil").to_tuple("jpg", "txt")``. Shards are divided among
        the workers of a DataLoader and of torch.distributed.
        """
        import webdataset
        from webdataset.compat import FluidWrapper

        shards = FluidWrapper(list(range(self.reader.shards)))
        return shards.compose(webdataset.split_by_node, webdataset.split_by_worker, self._samples)

    def _samples(self, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
        for position in shards:
            for pairs in self.reader.read(position):
                for pair in pairs:
                    sample = {"__key__": pair.key, "__url__": f"shard {position}", "txt": pair.caption.encode()}
                    if pair.data is not None:
                        sample[SUFFIXES[pair.data[:2]]] = pair.data
                    facts = {name: getattr(pair, name) for name in (*FACTS, "captions")}
                    yield sample | {"json": json.dumps(facts).encode()}

    def ray(self) -> Any:
        """Returns a Ray Dataset: a row a pair, with the fields of Pair; "data" holds the image file's bytes.

        It joins the cluster that RAY_ADDRESS names, or starts a Ray on this machine.
        """
        start_ray(self.settings)
        import ray.data

        # A block and a batch hold one shard, so that as many are read at once as the cluster has cores.
        shards = ray.data.range(self.reader.shards, override_num_blocks=max(1, self.reader.shards))
        return shards.map_batches(_Rows(self.reader), batch_size=1)

    def __repr__(self) -> str:
        split = self.reader.split or "all splits"
        return f"unclip.Pairs, {counted(len(self), 'pair')} of {split} in {counted(self.reader.shards, 'shard')}"


@dataclass(frozen=True)
class _Rows:
    """Reads the shards of a batch as tables, in a worker of Ray."""

    reader: PairReader

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        schema = pa.schema([field for field in COLUMNS if field.name not in VECTORS or self.reader.embedded])
        for position in batch["id"].tolist():
            for pairs in self.reader.read(position):
                columns = {name: [getattr(pair, name) for pair in pairs] for name in schema.names}
                yield pa.table(columns, schema)
