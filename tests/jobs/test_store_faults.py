"""The data half of a chain on S3, through a proxy that fails now and then, is that of one that nothing disturbed."""

import secrets
from pathlib import Path

import pytest

from tests.chain import MICRO, done, keys, open_at, unclip, write_config, write_list
from tests.fault_proxy import at_random, failing
from tests.faults import FEW, RUN, artifact, assert_sound
from tests.seaweed import Server


# With a worker of Ray, the shards of pairs are written by another process than the rest.
@pytest.mark.parametrize(
    ("until", "workers"), [("pairs", 1), pytest.param("codec", 0, marks=pytest.mark.slow, id="slow")]
)
def test_faults_change_nothing(until: str, workers: int, s3: Server, pictures: str, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.csv", 30, 60)
    stores = str(tmp_path / "store"), f"{s3.url}/faults-{secrets.token_hex(4)}"
    with failing(s3.endpoint) as proxy:
        proxy.choose = at_random(seed=workers, chance=0.1)
        for store, count in zip(stores, (0, workers), strict=True):
            run = {**MICRO["run"], **RUN, "pairs": {"workers": count}}  # type: ignore[dict-item]
            (tmp_path / str(count)).mkdir(exist_ok=True)
            config = write_config(tmp_path / str(count), store, pictures, [listed], **FEW, run=run)
            done(unclip("run", config, "--until", until, env={"AWS_ENDPOINT_URL": proxy.endpoint}))
    assert len(proxy.faults()) > 3
    theirs, ours = map(open_at, stores)
    assert keys(ours) == keys(theirs)
    assert_sound(ours)
    for stage in keys(ours):
        one, other = artifact(ours, stage), artifact(theirs, stage)
        assert (one.blobs, one.shard_table, one.ledger) == (other.blobs, other.shard_table, other.ledger)
