"""Keeps what was decided about a list after it was written: rows to be tried again, and rows to be forgotten.

It belongs to the list and so to the source's keys, but is kept in the store, where every machine sees it. Forgotten
references are kept as hashes only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict

from pipeline.data.fetch.references import comparable
from pipeline.data.source.imported import imported_url
from pipeline.errors import CorruptObject, UserError
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.names import Digest
from pipeline.store.records import Count, read_plain

FORGOTTEN = "forgotten:"
FOLDER = "locks/list-"  # begins the path of a journal


@dataclass(frozen=True)
class ListJournal:
    """Holds the decisions about one list.

    Attributes:
        retries: Blobs of marks of the references that are tried again, one for each time (see retry.py).
        forgotten: Marks of references that no segment may hold from now on, by ``reference_mark``.
        forgettings: Number of times that something was forgotten, which tells earlier runs from later ones whatever
            clocks say.
    """

    # What another version decided about rows must not be passed over.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    retries: tuple[Digest, ...] = ()
    forgotten: frozenset[str] = frozenset()
    forgettings: Count = 0


EMPTY = ListJournal()


def reference_mark(url: str) -> str:
    """Returns the name under which a reference is forgotten: sha256 of its comparable form.

    ``forgotten:MARK`` stands for a reference in a list that travels, and has the mark of that reference.
    """
    if url.startswith(FORGOTTEN):
        return url.removeprefix(FORGOTTEN)
    return hashlib.sha256(comparable(url).encode()).hexdigest()


def reference_marks(url: str) -> frozenset[str]:
    """Returns the mark of a reference, and of an imported embedding that of its image's URL too."""
    own = imported_url(url)
    return frozenset((reference_mark(url), reference_mark(own)) if own else (reference_mark(url),))


def journal_path(project: str) -> str:
    """Returns where the journal of a project lies."""
    return f"{FOLDER}{project}.json"


def read_journal(store: Store, project: str) -> ListJournal:
    """Returns the journal of a project, empty before the first entry."""
    return _read(store, project)[1]


def change_journal(store: Store, project: str, change: Callable[[ListJournal], ListJournal]) -> ListJournal:
    """Applies a change by compare-and-swap, again if another process came first; returns the new journal."""
    for _ in range(20):
        version, journal = _read(store, project)
        changed = change(journal)
        crash_point("journal.before_swap", journal_path(project))
        if changed == journal or store.swap(journal_path(project), version, _as_json(changed)):
            return changed
    raise UserError(f"others keep changing the list of {project}; try again")


def with_forgotten(journal: ListJournal, marks: Iterable[str]) -> ListJournal:
    """Returns the journal with these references forgotten too."""
    forgotten = journal.forgotten.union(marks)
    if forgotten == journal.forgotten:
        return journal
    return replace(journal, forgotten=forgotten, forgettings=journal.forgettings + 1)


def _read(store: Store, project: str) -> tuple[str | None, ListJournal]:
    path = journal_path(project)
    standing = store.stat(path)
    if standing is None:
        return None, EMPTY
    try:
        journal = read_plain(store, path, ListJournal)
    except CorruptObject as e:
        raise UserError(f"{store.url}/{path} {e.why}: restore it, or name another store to begin again") from None
    return (standing.version, journal) if journal else (None, EMPTY)  # it may be deleted meanwhile


def _as_json(journal: ListJournal) -> bytes:
    return json.dumps(asdict(journal) | {"forgotten": sorted(journal.forgotten)}).encode()
