"""Submitting twice runs once, and nothing is submitted where nothing is to do or nobody could do it."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.client import JobInfo
from cluster.job import Job, make_job, number_of
from cluster.package import Package
from cluster.submission import attach_or_submit
from jobs.plan import plan_run
from jobs.project import Project, open_project
from jobs.submit import follow
from pipeline.errors import UserError
from tests.chain import done, here, refused, write_config, write_list
from tests.seaweed import Server


class FakeCluster:
    """Keeps what it is given, as far as that decides what to submit."""

    address = "http://head:8265"

    def __init__(self, *seen: JobInfo) -> None:
        self.seen = list(seen)

    def jobs(self) -> list[JobInfo]:
        return self.seen

    def follow(self, submission_id: str, write: Callable[[str], object]) -> JobInfo:
        write("what it said\n")
        if self.seen[-1].live:
            raise KeyboardInterrupt
        return self.seen[-1]

    def stop(self, submission_id: str) -> JobInfo:
        self.end("STOPPED")
        return self.seen[-1]

    def attempts(self, job: Job) -> list[JobInfo]:
        return [seen for seen in self.seen if number_of(job.id, seen.id) is not None]

    def submit(self, job: Job, package: Path, metadata: Mapping[str, str]) -> None:
        assert package.stat().st_size
        self.seen.append(JobInfo(job.id, "PENDING", "", None, metadata))

    def end(self, status: str) -> None:
        self.seen[-1] = dataclasses.replace(self.seen[-1], status=status)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    rows = write_list(tmp_path / "list.csv", 0, 3)
    return open_project(str(write_config(tmp_path, str(tmp_path / "store"), "http://127.0.0.1:9", [rows])), [])


def _job(project: Project) -> Job:
    asked = plan_run(project, until="pairs")
    return make_job(project.config, project.store.url, asked.keys, {}, until="pairs")


def _submit(cluster: FakeCluster, project: Project, package: Package) -> str:
    return attach_or_submit(cluster, project.store, _job(project), package, {}, print)


def test_twice_is_once_until_it_has_ended(
    project: Project, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cluster, package = FakeCluster(), Package({"a": b"1"})
    first = _submit(cluster, project, package)
    assert _submit(cluster, project, package) == first
    assert "runs already" in capsys.readouterr().out
    assert len(cluster.seen) == 1
    assert _submit(cluster, project, Package({"a": b"2"})) == first
    assert "its code or run settings differ from yours" in caplog.text
    assert "runs already" in capsys.readouterr().out
    ids = []
    for status in ("FAILED", "STOPPED", "FAILED"):
        cluster.end(status)
        ids.append(_submit(cluster, project, package))
        assert f"has ended ({status.lower()})" in capsys.readouterr().out
    assert ids == [f"{first}-2", f"{first}-3", f"{first}-4"]


def test_a_budget_is_not_judged_by_a_machine_that_is_not_the_clusters(project: Project) -> None:
    poor = dataclasses.replace(project.config, run=dataclasses.replace(project.config.run, budget_hours=1e-9))
    project = dataclasses.replace(project, config=poor)
    here, there = (plan_run(project, until="pairs", **known) for known in ({}, {"machine_of": lambda _: None}))
    assert "in all" in str(here)
    with pytest.raises(UserError, match=r"above run\.budget_hours"):
        here.check()
    assert "pairs" in there.stale
    assert "in all" not in str(there)
    there.check()


def test_mistakes_cost_one_line_and_leave_nothing(tmp_path: Path, s3: Server) -> None:
    rows = write_list(tmp_path / "list.csv", 0, 3)
    nowhere = "http://127.0.0.1:9"
    config = write_config(tmp_path, f"{s3.url}/mistakes-{os.getpid()}", nowhere, [rows])
    elsewhere, keyless = "http://head.example:8265", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    for said in (
        refused("submit", config, "--to", elsewhere, says="AWS_ENDPOINT_URL is http://127.0.0.1:"),
        refused("submit", config, "--to", "local", says="no AWS credentials; set AWS_ACCESS_KEY_ID", env=keyless),
        refused("submit", config, "--to", "local", "--until", "pear", says="unknown stage pear"),
    ):
        assert " stale " not in said.stdout  # no plan is made before
    config = write_config(tmp_path, "s3://no-such-bucket/here", nowhere, [rows])
    refused("submit", config, "--to", "local", says="NoSuchBucket: create the bucket")
    assert not (tmp_path / "out").exists()


def test_what_is_fresh_is_not_submitted(tmp_path: Path) -> None:
    rows = write_list(tmp_path / "list.csv", 0, 3)
    config = write_config(tmp_path, str(tmp_path / "store"), "http://127.0.0.1:9", [rows])
    done(here("run", config, "--until", "captions"))
    submitted = done(here("submit", config, "--to", "http://127.0.0.1:9", "--until", "captions"))
    assert "nothing to do" in submitted


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, "job failed (exit code 2); submit it again to resume it\n"),
        ("FAILED", -9, 137, "job failed (exit code 137); submit it again to resume it\n"),
        ("FAILED", None, 1, "job failed (no node); submit it again to resume it\n"),
        ("STOPPED", None, 1, "job was stopped; submit it again to resume it\n"),
        ("RUNNING", None, 130, "\njob keeps running: the same command attaches to it, --stop stops it\n"),
    ],
)
def test_how_a_job_ends_is_said_with_what_to_do(
    status: str, code: int | None, exit_code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that runs is left by Ctrl-C."""
    assert follow(FakeCluster(JobInfo("job", status, "no node", code, {})), "job") == exit_code
    assert capsys.readouterr() == ("what it said\n", said)


def test_only_jobs_of_the_project_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, str(tmp_path / "store"), "http://127.0.0.1:9", [tmp_path / "no-list.csv"])
    about = {"project": "micro", "store": str(tmp_path / "store")}
    cluster = FakeCluster(JobInfo("other", "RUNNING", "", None, {"project": "other"}))
    monkeypatch.setattr("jobs.submit.running", lambda to, folder: nullcontext(cluster))
    words = ("submit", config, "--to", cluster.address, "--stop")
    assert "no job of micro runs there" in done(here(*words))
    cluster.seen.append(JobInfo("mine", "RUNNING", "", None, about))
    assert done(here(*words)) == "mine was stopped (stopped); its results are kept\n"
    monkeypatch.undo()
    assert "no job of micro runs there" in done(here("submit", config, "--to", "local", "--stop"))
