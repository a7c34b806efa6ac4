"""How much a server is asked of: requests at once, pauses before another try, and waiting for as long as it says."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Condition

LONGEST_HOLD_S = 86_400.0  # a server that says more is asked again after a day
_BACKOFF_S = 0.5


def backoff(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Seconds until another try after ``attempt`` (from 0) failed: between half and the whole of 0.5 * 2**attempt.

    ``draw`` gives numbers in [0, 1). Drawn, so that clients that failed together do not come back together.
    """
    return _BACKOFF_S * 2**attempt * (0.5 + 0.5 * draw())


def retry_after(value: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks to wait (RFC 9110, 10.2.3: seconds, or a date), at most a day.

    ``now``: seconds since the epoch. 0 if there is none that can be read.
    """
    text = (value or "").strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:9]), LONGEST_HOLD_S)
    try:
        date = parsedate_to_datetime(text)
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.fromtimestamp(now, UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return min(max(seconds.total_seconds(), 0.0), LONGEST_HOLD_S)


class Hosts:
    """Who is asked now, and who wants to be left alone until when. Shared by the threads of a worker.

    ``per_host``: requests at once to one host. Memory: the hosts that are asked now and those that said Retry-After.
    """

    def __init__(self, per_host: int):
        self._per_host = per_host
        self._changed = Condition()
        self._inside: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}  # time.monotonic()
        self._prune_at = 1000

    @contextlib.contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Wait for a place among the requests to ``host`` and hold it. Never wait for one while holding another."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside[host] < self._per_host)
            self._inside[host] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[host] -= 1
                if not self._inside[host]:
                    del self._inside[host]
                self._changed.notify_all()

    def hold(self, host: str, seconds: float) -> None:
        """Leave ``host`` alone for so long."""
        now = time.monotonic()
        with self._changed:
            if len(self._not_before) >= self._prune_at:
                self._not_before = {name: until for name, until in self._not_before.items() if until > now}
                self._prune_at = 2 * len(self._not_before) + 1000
            self._not_before[host] = max(now + seconds, self._not_before.get(host, 0.0))

    def held(self, host: str) -> float:
        """Seconds for which ``host`` has still to be left alone."""
        with self._changed:
            return max(self._not_before.get(host, 0.0) - time.monotonic(), 0.0)
