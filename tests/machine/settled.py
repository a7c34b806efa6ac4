"""What must be true of a store in peace, when all commands have ended well and nothing is damaged."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.source.journal import read_journal, reference_mark
from pipeline.graph.artifacts import read_shards
from pipeline.store import Store
from tests.machine.house import House


def ledger_balances(house: House, store: Store, project: str) -> None:
    """No row of a project's list is lost or counted twice."""
    opened = house.project(store, project)
    made = opened.finished()
    for stage, artifact in made.items():
        if artifact.shard_table is not None:
            shards = read_shards(store, artifact)
            counted = (sum(shard.kept for shard in shards), sum(shard.lost for shard in shards))
            ledger = artifact.ledger
            assert counted == (ledger.kept, ledger.rows - ledger.kept), f"{project}: {stage}: {counted} {ledger}"
    listed = sum(shard.ledger.rows for shard in opened.scan.shards)
    assert len(house.lists[project].rows) <= listed
    assert made["source"].ledger.rows == made["pairs"].ledger.rows == listed, f"{project}: rows are lost"


def forgotten_is_gone(house: House, store: Store, asked: Mapping[str, set[str]], objects: Mapping[str, bytes]) -> None:
    """What each project was ``asked`` to forget is forgotten, and no object has it that another list does not name."""
    forgotten = {}
    for project, urls in asked.items():
        marks = read_journal(store, project).forgotten
        lost = {url for url in urls if reference_mark(url) not in marks}
        assert not lost, f"{project}: {lost} were forgotten, and are not any longer"
        forgotten[project] = {url for url in house.lists[project].rows if reference_mark(url) in marks}
    listed = {url for name in asked for url in house.lists[name].rows if url not in forgotten[name]}
    gone = set().union(*forgotten.values()) - listed
    for path, data in objects.items():
        if path.startswith(("blobs/", "damaged/")):
            held = [url for url in gone if url.encode() in data]
            assert not held, f"{path} still has {held}, which was forgotten"
