"""The data half of a chain on S3, through a proxy that fails now and then, is that of one that nothing disturbed."""

import secrets
from pathlib import Path

import pytest

from tests.chain import done, here, keys, open_at, unclip
from tests.fault_proxy import at_random, failing
from tests.faults import Undisturbed, artifact, assert_sound
from tests.seaweed import Server


# With a worker of Ray, the shards of pairs are written by another process than the rest.
@pytest.mark.parametrize(
    ("until", "workers"),
    [("pairs", 0), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("pairs", 1), ("codec", 0)))],
)
def test_faults_change_nothing(until: str, workers: int, s3: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    url = f"{s3.url}/faults-{secrets.token_hex(4)}"
    config = undisturbed.config(tmp_path, url, pairs={"workers": workers})
    with failing(s3.endpoint) as proxy:
        proxy.choose = at_random(seed=workers, chance=0.1)
        run = unclip if workers else here
        done(run("run", config, "--until", until, env={"AWS_ENDPOINT_URL": proxy.endpoint}))
    assert len(proxy.faults()) > 3
    ours, theirs = open_at(url), undisturbed.data
    assert_sound(ours)
    assert until in keys(ours)
    for stage, found in keys(ours).items():
        assert found == keys(theirs)[stage]
        one, other = artifact(ours, stage), artifact(theirs, stage)
        assert (one.blobs, one.shard_table, one.ledger) == (other.blobs, other.shard_table, other.ledger)
