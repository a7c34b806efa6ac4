"""The id of a job is the key of what is asked, and a job tells no secret."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from cluster.job import job_id, make_job, number_of
from pipeline.config import make_config

KEYS = {"source": "a" * 64, "pairs": "b" * 64}


@example("My_Project.v2-with-a-long-name")
@example("絵文字")
@example("-".join("abcdefghijkl"))
@given(st.text(min_size=1))
def test_an_id_is_a_label_that_kubernetes_takes(project: str) -> None:
    id = job_id(project, "s3://b/p", KEYS)
    for number in ("", "-2", "-999"):
        assert re.fullmatch(r"unclip-[a-z0-9]([a-z0-9-]*[a-z0-9])?", id + number)
        assert "--" not in id
        assert len(id + number) <= 45


def test_an_id_moves_with_what_is_asked_and_with_nothing_else() -> None:
    asked = job_id("p", "s3://b/p", KEYS)
    assert job_id("p", "s3://b/p", dict(reversed(KEYS.items()))) == asked
    others = [
        job_id("q", "s3://b/p", KEYS),
        job_id("p", "s3://b/q", KEYS),
        job_id("p", "s3://b/p", KEYS | {"pairs": "c" * 64}),
        job_id("p", "s3://b/p", {"source": "a" * 64}),
    ]
    assert len({asked, *others}) == 5


def test_numbers_are_those_of_one_job() -> None:
    id = job_id("p", "s3://b/p", KEYS)
    assert [number_of(id, id + end) for end in ("", "-2", "-17", "-0", "-x", "5")] == [1, 2, 17, None, None, None]
    assert number_of(id, "raysubmit_1") is None


def test_a_job_tells_where_the_store_is_and_no_secret() -> None:
    config = make_config(
        {"project": "p", "store": "s3://b/p", "source": {"paths": ["drawings:nano"]}, "preset": "nano"}
    )
    environ = {
        "AWS_ENDPOINT_URL": "http://store:8333",
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "token",
        "AWS_PROFILE": "mine",
        "RAY_AUTH_TOKEN": "token",
        "HOME": "/home/me",
        "NCCL_DEBUG": "INFO",
        "FI_PROVIDER": "efa",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_SOCKET_IFNAME": "",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    job = make_job(config, "s3://b/p", KEYS, environ, until="pairs", yes=True)
    assert job.environment == {
        "AWS_ENDPOINT_URL": "http://store:8333",
        "AWS_REGION": "eu-central-1",
        "FI_PROVIDER": "efa",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "INFO",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    assert job.command == ("python", "-m", "jobs.cli", "run", "project.yaml", "--until=pairs", "--yes")
    again = make_job(config, "s3://b/p", KEYS, environ)
    assert again.id == job.id
    assert again.again(3).id == f"{job.id}-3"
    assert again.again(1) == again
