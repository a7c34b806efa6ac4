"""The pairs of a project as an iterable, a webdataset and a Ray Dataset."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

from pipeline.data.curation.reading import FACTS, VECTORS, Pair, PairReader
from pipeline.data.export import SUFFIXES
from pipeline.errors import UserError
from pipeline.graph.ray import start_ray
from pipeline.progress import counted
from pipeline.settings import RaySettings

if TYPE_CHECKING:
    from unclip.torch_pairs import TorchPairs

COLUMNS = pa.schema(
    [(name, pa.int64() if name in ("width", "height") else pa.string()) for name in FACTS]
    + [("captions", pa.list_(pa.string())), ("data", pa.binary())]
    + [(name, pa.list_(pa.float16())) for name in VECTORS]
)


@dataclass(frozen=True)
class Pairs:
    """Reads pairs from the store: a sequence of Pair in the list's order, so also a dataset for torch's DataLoader.

    ``pairs[5]`` is one of them, ``pairs[:8]`` a list.

    Examples:
        >>> sizes = [(pair.width, pair.height) for pair in pairs[:4]]
    """

    reader: PairReader
    settings: RaySettings

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[Pair]:
        for position in range(self.reader.shards):
            for pairs in self.reader.read(position):
                yield from pairs

    @overload
    def __getitem__(self, place: int) -> Pair: ...

    @overload
    def __getitem__(self, place: slice) -> list[Pair]: ...

    def __getitem__(self, place: int | slice) -> Pair | list[Pair]:
        if isinstance(place, slice):
            return self.__getitems__(range(len(self))[place])
        try:
            return self.__getitems__([range(len(self))[place]])[0]
        except IndexError:
            raise IndexError(f"pair {place}: there are {len(self):,}") from None

    def __getitems__(self, places: Sequence[int]) -> list[Pair]:
        """Returns the pairs at these places. torch's DataLoader asks for a batch so: each shard is read once for it."""
        ends = self.reader.ends
        shards: dict[int, list[int]] = defaultdict(list)
        for place in places:
            shards[int(np.searchsorted(ends, place, "right"))].append(place)
        found: dict[int, Pair] = {}
        for position, wanted in shards.items():
            first = int(ends[position - 1]) if position else 0
            read = self.reader.read(position, [place - first for place in wanted])
            found |= zip(wanted, chain.from_iterable(read), strict=True)
        return [found[place] for place in places]

    def to_hf(self) -> Any:
        """Returns a Hugging Face datasets.Dataset, which copies all pairs into its own cache.

        Its rows have the fields of Pair, with "image" in place of "data". Raises UserError without the library.

        Examples:
            >>> captions = pairs.to_hf()["captions"]
        """
        try:
            import datasets
        except ImportError:
            raise UserError("the package datasets is not installed: pip install datasets") from None
        text, number = datasets.Value("string"), datasets.Value("int32")
        features = {name: number if name in ("width", "height") else text for name in FACTS}
        features |= {"captions": datasets.List(text), "image": datasets.Image()}
        if self.reader.embedded:
            features |= dict.fromkeys(VECTORS, datasets.List(datasets.Value("float16")))
        return datasets.Dataset.from_generator(self._dicts, datasets.Features(features))

    def _dicts(self) -> Iterator[dict[str, Any]]:
        for pair in self:
            image = None if pair.data is None else {"bytes": pair.data, "path": None}
            row = {name: getattr(pair, name) for name in (*FACTS, "captions")} | {"image": image}
            yield row | {name: getattr(pair, name) for name in VECTORS if self.reader.embedded}

    def tensors(self, side: int = 0) -> dict[str, Any]:
        """Returns all pairs in memory, as ``unclip.train`` takes them.

        They are "captions", with embeddings also "image_embedding" and "text_embedding" fp32 [n, d], and with a
        ``side`` "image", centre crops uint8 [n, 3, side, side].

        Examples:
            >>> tuple(pairs.tensors(side=64)["image"].shape[1:])
            (3, 64, 64)
        """
        import torch

        from unclip.torch_pairs import as_row

        columns: dict[str, list[Any]] = defaultdict(list)
        for pair in self:
            for name, value in as_row(pair, side).items():
                columns["captions" if name == "caption" else name].append(value)
        return {name: each if name == "captions" else torch.stack(each) for name, each in columns.items()}

    def to_torch(self, side: int) -> TorchPairs:
        """Returns a torch.utils.data.Dataset, read row by row, whose rows a DataLoader stacks to batches.

        A row has "caption", "image", a centre crop as uint8 [3, side, side], and with embeddings "image_embedding" and
        "text_embedding", fp32 [d]. A ``side`` of 0 leaves the image out.

        Examples:
            >>> tuple(pairs.to_torch(64)[0]["image"].shape)
            (3, 64, 64)
        """
        from unclip.torch_pairs import TorchPairs

        return TorchPairs(self, side)

    def webdataset(self) -> Any:
        """Returns a webdataset: samples of ``__key__``, "jpg" (or "png", "webp"), "txt" and "json", all bytes.

        It has webdataset's methods. Shards are divided among the workers of a DataLoader and of torch.distributed.

        Examples:
            >>> samples = pairs.webdataset().shuffle(1000).decode("pil").to_tuple("jpg", "txt")
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
        """Returns a Ray Dataset with a row per pair and the fields of Pair; "data" has the image file's bytes.

        It connects to the cluster at RAY_ADDRESS, or starts a local Ray: ``pairs.ray().map_batches(...)``.
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
