"""The release of a project: a pointer to a bundle, with the history of its moves.

No run can make it again, so it changes by compare-and-swap only, and a damaged pointer is reported and left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import CorruptObject, UserError
from pipeline.store import Store
from pipeline.store.names import Part
from pipeline.store.records import Record, Seconds, read_record, seal

FOLDER = "releases/"


@dataclass(frozen=True)
class Move:
    """Describes one move of the pointer.

    Attributes:
        action: Promotion, or rollback to the promotion before.
        bundle: Key of the bundle that it leads to.
        evaluation: Key of the evaluation that the bundle was judged by.
        at: Seconds since the epoch.
        reason: Reason why it was forced or rolled back.
        failed: Gates that did not hold.
        files: Digest of the bundle's files.
        signature: Signature in hexadecimal digits (see pipeline.release.signing), or "".
    """

    action: Literal["promote", "rollback"]
    bundle: Part
    evaluation: Part
    at: Seconds
    reason: str = ""
    failed: tuple[str, ...] = ()
    files: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Releases:
    """Holds all moves, oldest first, and the ``version`` of their object, None where there is none."""

    version: str | None = None
    moves: tuple[Move, ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """Returns the places in ``moves`` of the promotions that were not rolled back, the current one last."""
        return _places(self.moves)

    @property
    def active(self) -> tuple[Move, ...]:
        """Returns the promotions that were not rolled back, the current one last."""
        return tuple(self.moves[place] for place in self.places)

    @property
    def current(self) -> Move | None:
        """Returns the promotion that is the current release, if there is one."""
        return self.active[-1] if self.active else None

    @property
    def previous(self) -> Move | None:
        """Returns the promotion that a rollback makes the release, if there is one."""
        return self.active[-2] if len(self.active) > 1 else None


@dataclass(frozen=True)
class Pointer(Record):
    """Holds the moves of a project's release as they are stored."""

    project: Part
    moves: tuple[Move, ...]

    def check(self, path: str) -> None:
        if path != release_path(self.project):
            raise ValueError(f"it is the release of {self.project}")
        _places(self.moves)


def _places(moves: Sequence[Move]) -> tuple[int, ...]:
    """Returns the places of promotions not rolled back. Raises ValueError for more rollbacks than promotions."""
    stack: list[int] = []
    for place, move in enumerate(moves):
        if move.action == "promote":
            stack.append(place)
        elif stack:
            stack.pop()
        else:
            raise ValueError("moves: a rollback of nothing")
    return tuple(stack)


def release_path(project: str) -> str:
    """Returns the path of a project's pointer in the store."""
    return f"{FOLDER}{project}.json"


def released_projects(store: Store) -> Iterator[str]:
    """Yields the projects that have a release in a store."""
    for entry in store.list(FOLDER):
        yield entry.path.removeprefix(FOLDER).removesuffix(".json")


def read_releases(store: Store, project: str) -> Releases:
    """Returns the current pointer of a project. Raises UserError if it is damaged."""
    path = release_path(project)
    entry = store.stat(path)
    if entry is None:
        return Releases()
    try:
        pointer = read_record(store, path, Pointer)
    except CorruptObject as e:
        raise UserError(
            f"{store.url}/{path} {e.why}, and no run can make it again: restore it, or delete it and promote again"
        ) from None
    return Releases(entry.version, pointer.moves) if pointer else Releases()  # it may be deleted meanwhile


def move_release(store: Store, project: str, seen: Releases, move: Move) -> None:
    """Adds a move to the ``seen`` ones. Raises UserError, naming the other move, if another process was first."""
    path = release_path(project)
    if store.swap(path, seen.version, seal(Pointer(project, (*seen.moves, move)), path)):
        return
    won = read_releases(store, project).moves
    what = f"a {won[-1].action} to bundle {won[-1].bundle[:12]}" if won else "it is gone"
    raise UserError(
        f"{project}: another process has moved the release meanwhile ({what}); nothing was changed: look again with "
        "unclip release list"
    )
