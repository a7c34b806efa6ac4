"""The parts of a stage of your own; examples/add_stage.py is a whole one."""

from pipeline.data.pairs.decoding import read_pair_pixels
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.graph.artifacts import Artifact, read_shards, read_table, write_table
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.schema import schema
from pipeline.settings import ShardSettings
from pipeline.store import Store

__all__ = [
    "Artifact",
    "Context",
    "Ledger",
    "Place",
    "ShardOutput",
    "ShardSettings",
    "ShardTask",
    "Stage",
    "Store",
    "map_shards",
    "read_images",
    "read_pair_pixels",
    "read_shards",
    "read_table",
    "schema",
    "shard_key",
    "write_table",
]
