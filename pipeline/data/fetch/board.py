"""Keeps what the workers of a run have found out about sites, for each other."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

WITNESSES = 2  # machines that a site did not answer, until others believe it: the network of one may be down
MOST_BYTES = 512 << 20  # of notes
NOTE_BYTES = 500  # of a note besides its text, in Python


class Note(NamedTuple):
    """Says what a worker found at a site.

    Attributes:
        found: Bytes of its robots.txt, or the reason why there are none.
        failed: The site is left alone, since its wishes are not known or it does not answer.
        seen: Time at which it was found, in seconds since the epoch.
        until: Time from which it is asked for again, in seconds since the epoch.
    """

    found: bytes | str
    failed: bool
    seen: float
    until: float


class Board:
    """Knows the newest note on each site, and drops those that nobody has asked for or written for longest.

    Args:
        most_bytes: Memory for all notes.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._most, self._size = most_bytes, 0
        self._notes: OrderedDict[str, tuple[Note, frozenset[str]]] = OrderedDict()

    def exchange(self, who: str, news: Mapping[str, Note], origins: Iterable[str]) -> dict[str, Note]:
        """Takes the notes of a worker on the machine ``who``, and returns those on these sites that hold now."""
        for origin, note in news.items():
            self._put(origin, note, who)
        return {origin: known for origin in origins if (known := self._get(origin, who)) is not None}

    def _put(self, origin: str, note: Note, who: str) -> None:
        before, witnesses = self._notes.pop(origin, (None, frozenset[str]()))
        if before is not None:
            self._size -= len(before.found) + NOTE_BYTES
        if not note.failed:
            witnesses = frozenset()
        elif before is not None and before.failed:
            witnesses |= {who}
        else:
            witnesses = frozenset({who})
        self._notes[origin] = note, witnesses
        self._size += len(note.found) + NOTE_BYTES
        while self._size > self._most:
            self._size -= len(self._notes.popitem(last=False)[1][0].found) + NOTE_BYTES

    def _get(self, origin: str, who: str) -> Note | None:
        if origin not in self._notes:
            return None
        self._notes.move_to_end(origin)
        note, witnesses = self._notes[origin]
        believed = not note.failed or who in witnesses or len(witnesses) >= WITNESSES
        return note if believed and note.until > time.time() else None
