"""Workers that die, and those that have several shards under way."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.errors import UserError
from pipeline.graph.workers import Places, ShardTask, WorkerClock, WorkTimes, _counting_deaths


class Cluster:
    """Ray as a worker that counts deaths sees it: a store of keys, and nodes that live or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        import ray
        from ray.experimental import internal_kv

        self.kept: dict[str, str] = {}
        self.node, self.lost = "", set[str]()
        context = SimpleNamespace(get_job_id=lambda: "01", get_node_id=lambda: self.node)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray, "nodes", self.nodes)
        monkeypatch.setattr(internal_kv, "_internal_kv_get", self.kept.get)
        monkeypatch.setattr(
            internal_kv, "_internal_kv_put", lambda key, value, overwrite: self.kept.update({key: value})
        )
        monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda key: self.kept.pop(key, None))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": name not in self.lost} for name in ("a", "b", *self.lost)]

    def die(self, node: str) -> bool:
        """A worker on this node begins the shard, and does not end. Returns whether the shard had it for itself."""
        self.node, task, asked = node, ShardTask(7, "key-7", {}), []
        places = SimpleNamespace(take=lambda alone: nullcontext(asked.append(alone)))
        with _counting_deaths("pairs", task, places=cast(Places, places)):
            [(name, value)] = self.kept.items()
        self.kept[name] = value
        return asked.pop()


def test_a_node_that_was_taken_back_is_no_death_of_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    for node in ("spot 1", "a", "spot 2", "b", "spot 3"):
        cluster.die(node)
        cluster.lost |= {node} - {"a", "b"}
    cluster.die("a")
    with pytest.raises(UserError, match=r"^pairs: shard 7 \(0 rows, .*\) killed 6 workers;"):
        cluster.die("b")
    assert cluster.kept == {}  # the next run begins anew


@pytest.mark.parametrize(
    ("died_on", "alone"),
    [((), False), (("spot 1",), False), (("a",), True), (("spot 1", "a"), True), (("spot 1", "spot 2"), True)],
)
def test_a_shard_that_one_lost_node_had_in_hand_shares_its_worker(
    died_on: Sequence[str], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a death on a node that lives, or the second node, the shard is suspect."""
    cluster = Cluster(monkeypatch)
    for node in died_on:
        cluster.die(node)
        cluster.lost |= {node} - {"a"}
    assert cluster.die("b") == alone


def test_a_shard_that_takes_node_after_node_with_it_ends_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    for i in range(10):
        cluster.die(f"spot {i}")
        cluster.lost.add(f"spot {i}")
    with pytest.raises(UserError, match="killed 10 workers;"):
        cluster.die("a")


def test_a_shard_that_may_kill_is_made_alone() -> None:
    places, inside, most = Places(3), Counter[bool](), Counter[bool]()
    lock = Lock()

    def make(suspect: bool) -> None:
        with places.take(alone=suspect):
            with lock:
                inside[suspect] += 1
                most[suspect] = max(most[suspect], inside[suspect])
                assert not (inside[True] and inside[False])
            time.sleep(0.005)
            with lock:
                inside[suspect] -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(make, [i % 4 == 0 for i in range(60)]))
    assert most[True] == 1
    assert 1 < most[False] <= 3


def test_time_with_several_shards_under_way_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock, first, second = WorkerClock(), WorkTimes(), WorkTimes()
    now[0] = 1.0
    with clock.at_work(first):
        now[0] = 3.0
        one = clock.at_work(second)
        one.__enter__()
        now[0] = 10.0
    assert first == {"wait_seconds": 1.0, "busy_seconds": 9.0}
    now[0] = 12.0
    one.__exit__(None, None, None)
    assert second == {"wait_seconds": 0.0, "busy_seconds": 2.0}
