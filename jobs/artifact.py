"""A stage's result: metrics, tables, files and model."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from pipeline.data.pairs.row_index import read_opt_outs
from pipeline.errors import UserError
from pipeline.graph import artifacts as stored
from pipeline.progress import counted
from pipeline.store import Store
from pipeline.store.records import materialise, read_blob

JOURNAL = "metrics.jsonl"
TABLES = ("index", "refs")  # besides the one that is named as its stage


class Artifact:
    """An artefact: the immutable result of a stage.

    Attributes:
        record: Record in the store: stage, key, recipe, inputs, metrics, ledger, times, environment.
    """

    def __init__(self, store: Store, record: stored.Artifact):
        self._store, self.record = store, record

    @property
    def stage(self) -> str:
        """Returns the name of its stage."""
        return self.record.stage

    @property
    def key(self) -> str:
        """Returns its key, 64 hexadecimal digits."""
        return self.record.key

    @property
    def metrics(self) -> dict[str, Any]:
        """Returns its metrics."""
        return dict(self.record.metrics)

    @property
    def files(self) -> list[str]:
        """Returns the names of its files; a stage with rows has tables instead."""
        return sorted(self.record.blobs)

    def read(self, file: str) -> bytes:
        """Returns the bytes of one of ``files``. Raises UserError for an unknown name.

        Examples:
            >>> config = project.artifact("clip").read("open_clip_config.json")
        """
        if file not in self.record.blobs:
            raise UserError(f"{self.stage} has no file {file}; it has {', '.join(self.files) or 'none'}")
        return read_blob(self._store, self.record.blobs[file])

    def save(self, folder: str | Path) -> Path:
        """Writes its files into a folder, except existing ones, and returns the folder.

        Examples:
            >>> folder = project.artifact("clip").save("my-clip")
        """
        materialise(self._store, self.record.blobs, folder)
        return Path(folder)

    def tables(self, name: str | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yields the rows as a table per shard, in order.

        Args:
            name: Name of one of a shard's tables; by default the one with all rows. Curation also has "rejected".
            columns: Columns to read; by default all.

        Raises:
            UserError: For a stage without rows, and for an unknown table.

        Examples:
            >>> rows = sum(len(table) for table in embeddings.tables(columns=["key"]))
        """
        if self.record.shard_table is None:
            raise UserError(f"{self.stage} has no rows; it has the files {', '.join(self.files)}")
        for shard in stored.ShardList(self._store, self.record).rows():
            found = name or next((each for each in (self.stage, *TABLES) if each in shard.blobs), "")
            if found not in shard.blobs:
                raise UserError(f"{self.stage} has no table {found}; it has {', '.join(sorted(shard.blobs))}")
            try:
                yield stored.read_table(self._store, shard.blobs[found], list(columns) if columns else None)
            except pa.ArrowInvalid:
                raise UserError(f"{self.stage}: {found} is not a table; use pairs() for images") from None

    def table(self, name: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns all rows in one table, in memory, or the journal of a training; see ``tables``.

        Examples:
            >>> rejected = project.artifact("curation").table("rejected")
        """
        if JOURNAL in self.record.blobs:
            journal = pa.json.read_json(io.BytesIO(self.read(JOURNAL)))
            return journal.select(list(columns)) if columns else journal
        return pa.concat_tables(self.tables(name, columns))

    def opt_outs(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of pairs that a deny list or their owner excludes: key, url, reason, evidence, seen.

        Raises UserError for another stage.

        Examples:
            >>> excluded = [row["url"] for row in project.artifact("pairs").opt_outs()]
        """
        if self.stage != "pairs":
            raise UserError(f"{self.stage} has no opt_outs; pairs has")
        return read_opt_outs(self._store, stored.read_shards(self._store, self.record))

    def model(self) -> Any:
        """Returns the network of a training, on the CPU in evaluation mode, or the codec.

        Raises UserError for a stage without one.

        Examples:
            >>> clip = project.artifact("clip").model()
        """
        from models.clip import CONFIG_FILE, Clip
        from models.folder import load_codec, load_model

        if not any(name.endswith("model.safetensors") for name in self.files) or "decoder/config.json" in self.files:
            raise UserError(f"{self.stage} is not a model; a bundle is opened with unclip.load")
        with tempfile.TemporaryDirectory() as folder:
            load = Clip.from_folder if CONFIG_FILE in self.files else load_model
            return (load_codec if self.stage == "codec" else load)(self.save(folder))

    def __repr__(self) -> str:
        record = self.record
        holds = counted(record.ledger.kept, "row") if record.shard_table else ", ".join(self.files[:4])
        return f"unclip.Artifact {self.stage} {self.key[:12]}: {holds}{', ...' if len(self.files) > 4 else ''}"
