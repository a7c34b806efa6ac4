"""A client of a running cluster, by Ray's Jobs SDK: lists, submits, follows and stops jobs.

A job goes on when the process that follows it ends.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from cluster.job import Job, number_of
from pipeline.errors import UserError

ANSWER_S = 15.0  # within which a head answers
AGENT_S = 90.0  # until a head that has just started takes jobs
LOST_S = 60.0  # after which a head that does not answer is given up
SILENT_S = 60.0  # without output: the connection may be dead, and is made again
POLL_S = 1.0
PORT = 8265
LIVE = ("PENDING", "RUNNING")
NOT_YET = ("No available agent", "head node agent", "Cannot connect to host")  # in errors of a head that still starts
SAY_TOKEN = "set RAY_AUTH_TOKEN to the cluster's, or write it into ~/.ray/auth_token"
SAY_ADDRESS = f"start it, or correct the address: that of its dashboard, whose port is {PORT} as a rule"


@dataclass(frozen=True)
class JobInfo:
    """A job as the cluster knows it, with the exit code of its driver once it has ended."""

    id: str
    status: str
    message: str
    code: int | None
    metadata: Mapping[str, str]

    @property
    def live(self) -> bool:
        return self.status in LIVE

    @property
    def exit_code(self) -> int:
        """Returns 0 for a success, the driver's own exit code, 128 plus the number of a signal, or 1."""
        if self.status == "SUCCEEDED":
            return 0
        # Ray gives the number of a signal as a negative code, and none where the driver did not begin.
        return 1 if not self.code else self.code if self.code > 0 else 128 - self.code


class Cluster:
    """A cluster, by the address of its dashboard such as http://HOST:8265.

    Raises UserError if none answers there, if its Ray is not of our minor version, or if it wants another token.
    """

    def __init__(self, address: str, token: str | None = None):
        self.address = dashboard_url(address)
        token = _handshake(self.address, token)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # or the SDK would take RAY_ADDRESS in place of ours
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._client: Any = self._ask(lambda: JobSubmissionClient(self.address, headers=headers))

    def jobs(self) -> list[JobInfo]:
        """Returns all jobs that were submitted to it, in any order."""
        return [_seen(found) for found in self._ask(self._client.list_jobs) if found.submission_id]

    def job(self, submission_id: str) -> JobInfo:
        return _seen(self._ask(lambda: self._client.get_job_info(submission_id)))

    def attempts(self, job: Job) -> list[JobInfo]:
        """Returns every submission of a job, in order."""
        found = {number: seen for seen in self.jobs() if (number := number_of(job.id, seen.id)) is not None}
        return [found[number] for number in sorted(found)]

    def submit(self, job: Job, package: Path, metadata: Mapping[str, str]) -> None:
        """Submits a job with its zipped package, unless a job of this id exists. Raises UserError."""
        environment = {"working_dir": str(package), "env_vars": dict(job.environment)}
        deadline = time.monotonic() + AGENT_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(job.command),
                    submission_id=job.id,
                    runtime_env=environment,
                    metadata=dict(metadata),
                )
                return
            except (RuntimeError, OSError) as e:  # OSErrors are those of connections that broke off
                with suppress(UserError):
                    # Submitted by another process, or by an attempt whose answer was lost.
                    if any(seen.id == job.id for seen in self.jobs()):
                        return
                early = isinstance(e, OSError) or any(word in str(e) for word in NOT_YET)
                if not early or time.monotonic() > deadline:
                    raise UserError(f"{self.address} refused the job: {_last_line(e)}") from e
                time.sleep(POLL_S)

    def stop(self, submission_id: str) -> JobInfo:
        """Stops a job and waits for its end."""
        self._ask(lambda: self._client.stop_job(submission_id))
        while (seen := self.job(submission_id)).live:
            time.sleep(POLL_S)
        return seen

    def follow(self, submission_id: str, write: Callable[[str], object]) -> JobInfo:
        """Writes the job's output from its beginning as it comes, and returns its end.

        A connection that breaks off is made again. Raises UserError if the cluster does not answer for LOST_S seconds.
        """
        written = 0
        heard = time.monotonic()
        while True:
            try:
                passed = 0  # what was written before the connection broke off comes again
                for text in self._tail(submission_id):
                    new = text[max(0, written - passed) :]
                    passed += len(text)
                    written = max(written, passed)
                    heard = time.monotonic()
                    write(new)
                heard = time.monotonic()  # also of a job that is silent
                seen = self.job(submission_id)
                if not seen.live:
                    return seen
            except BrokenPipeError:  # the reader of what is written has gone
                raise
            except (UserError, ConnectionError) as e:
                if time.monotonic() - heard > LOST_S:
                    raise UserError(
                        f"{self.address} has not answered for {LOST_S:.0f} s ({_last_line(e)}); the job may go on: "
                        "run the same command again to attach"
                    ) from e
            time.sleep(POLL_S)

    def _tail(self, submission_id: str) -> Iterator[str]:
        """Yields the job's output from its beginning, until it ends or is silent. Raises ConnectionError.

        The event loop has a thread of its own, so that Ctrl-C, which is raised in the main thread, never finds it half
        built.
        """
        found: SimpleQueue[str | Exception | None] = SimpleQueue()

        async def tail() -> None:
            async with aclosing(self._client.tail_job_logs(submission_id)) as texts:
                with suppress(StopAsyncIteration, TimeoutError):
                    while True:
                        found.put(await asyncio.wait_for(anext(texts), SILENT_S))

        def work() -> None:
            try:
                asyncio.run(tail())
                found.put(None)
            except Exception as e:  # of Ray, aiohttp and requests, which do not agree on a type
                found.put(e)

        threading.Thread(target=work, daemon=True).start()
        while (text := found.get()) is not None:
            if isinstance(text, Exception):
                raise ConnectionError(_last_line(text)) from text
            yield text

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Returns the answer of the SDK. Raises UserError in one line for its errors."""
        try:
            return call()
        except OSError as e:  # those of requests are
            raise UserError(f"{self.address} no longer answers: {_last_line(e)}") from e
        except RuntimeError as e:  # AuthenticationError too
            raise UserError(f"{self.address}: {_last_line(e)}") from e


def _seen(found: Any) -> JobInfo:
    status = str(found.status.value if hasattr(found.status, "value") else found.status)
    return JobInfo(found.submission_id, status, found.message or "", found.driver_exit_code, found.metadata or {})


def dashboard_url(address: str) -> str:
    """Returns http://HOST:PORT. Raises UserError for an address of another kind."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        named = parts.scheme in ("http", "https") and bool(parts.hostname)
        host = parts.netloc if parts.port or parts.scheme == "https" else f"{parts.netloc}:{PORT}"
    except ValueError:  # a bracket without an end, or a port above 65,535
        named = False
    if not named:
        raise UserError(f"{address} is not the address of a dashboard; write http://HOST:{PORT}, local or kuberay")
    return f"{parts.scheme}://{host}"


def check_answers(address: str) -> None:
    """Raises UserError unless a cluster answers at this address that takes our jobs."""
    _handshake(dashboard_url(address), None)


def _handshake(address: str, token: str | None) -> str | None:
    """Returns the token that the cluster wants, after a look at its version; it is sent only when it is asked for.

    This comes before the import of Ray, which waits for minutes for a host that is silent. Raises UserError.
    """
    _no_proxy(urlsplit(address).hostname or "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/version", headers=headers), timeout=ANSWER_S
        ) as answer:
            theirs = str(json.loads(answer.read())["ray_version"])
    except urllib.error.HTTPError as e:
        if e.code == 401 and not token and (own := _own_token()):
            return _handshake(address, own)
        if e.code in (401, 403):
            raise UserError(f"{address} requires {'another' if token else 'a'} token: {SAY_TOKEN}") from e
        raise UserError(f"no Ray cluster answers at {address} (HTTP {e.code}); {SAY_ADDRESS}") from e
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"no Ray cluster answers at {address} ({getattr(e, 'reason', None) or e}); {SAY_ADDRESS}"
        ) from e
    ours = version("ray")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise UserError(
            f"{address} runs Ray {theirs}, and this machine has Ray {ours}: "
            f"install ray=={ours} on the cluster, or submit from a machine that has ray=={theirs}"
        )
    return token


def _no_proxy(host: str) -> None:
    """Keeps this process's requests to a host of loopback from its HTTP proxy, which would have the token, too."""
    with suppress(ValueError):  # of other names
        if host == "localhost" or ip_address(host).is_loopback:
            for name in ("no_proxy", "NO_PROXY"):
                os.environ[name] = ",".join(dict.fromkeys([*filter(None, [os.environ.get(name)]), host]))


def _own_token() -> str | None:
    """Returns the token of this user, from the places where Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return (
            Path(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")).read_text().strip()
        )
    except OSError:
        return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
