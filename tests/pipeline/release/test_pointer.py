"""The pointer of a project: who comes first has won, everything that moved it stays, damage is not healed away."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import UserError
from pipeline.release.pointer import (
    Move,
    Pointer,
    Releases,
    move_release,
    read_releases,
    release_path,
    released_projects,
)
from pipeline.store import Store
from pipeline.store.records import seal


def promote(bundle: str, at: float = 1.0) -> Move:
    return Move("promote", bundle, f"evaluation-of-{bundle}", at)


def rollback(bundle: str) -> Move:
    return Move("rollback", bundle, f"evaluation-of-{bundle}", 2.0, "it drew cats")


def test_moves_are_read_as_they_were_written(store: Store) -> None:
    assert read_releases(store, "p") == Releases()
    forced = Move("promote", "b", "e", 3.5, "we need it", ("decoder.background fails now", "another"))
    for move in (promote("a"), forced, rollback("a")):
        move_release(store, "p", read_releases(store, "p"), move)
    assert read_releases(store, "p").moves == (promote("a"), forced, rollback("a"))
    assert list(released_projects(store)) == ["p"]
    assert read_releases(store, "other").version is None


def test_rollbacks_go_back_through_what_was_promoted_and_not_rolled_back() -> None:
    a, b, c = promote("a"), promote("b"), promote("c")
    assert Releases(None, ()).current is None
    assert Releases(None, (a,)).previous is None
    after = Releases(None, (a, b, rollback("a"), c))
    assert (after.current, after.previous) == (c, a)
    assert Releases(None, (a, b, c, rollback("b"), rollback("a"))).active == (a,)


def test_of_many_at_once_one_moves_it_and_the_others_are_told_who(store: Store) -> None:
    move_release(store, "p", Releases(), promote("first"))
    seen = read_releases(store, "p")

    def attempt(number: int) -> str:
        try:
            move_release(store, "p", seen, promote(f"bundle-{number}"))
        except UserError as e:
            return str(e)
        return ""

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(attempt, range(6)))
    (won,) = (number for number, text in enumerate(said) if not text)
    assert [move.bundle for move in read_releases(store, "p").moves] == ["first", f"bundle-{won}"]
    assert all(f"a promote to bundle bundle-{won}" in text and "\n" not in text for text in said if text)


def test_the_first_promotion_is_a_race_too(store: Store) -> None:
    seen = read_releases(store, "p")
    move_release(store, "p", seen, promote("a"))
    with pytest.raises(UserError, match="another process has moved the release meanwhile"):
        move_release(store, "p", seen, promote("b"))
    assert read_releases(store, "p").current == promote("a")


SEALED = seal(Pointer("p", ()), release_path("p"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", SEALED.replace(b"moves", b"meows")])
def test_a_corrupt_pointer_is_reported_and_left_as_it_is(store: Store, damage: bytes) -> None:
    store.create(release_path("p"), damage)
    with pytest.raises(UserError, match=r"releases/p\.json is corrupt, and no run can make it again: restore it"):
        read_releases(store, "p")
    assert store.read(release_path("p")) == damage


def test_a_pointer_of_a_newer_version_is_refused(store: Store) -> None:
    store.create(release_path("p"), SEALED.replace(b'"format":3', b'"format":4'))
    with pytest.raises(UserError, match="newer version"):
        read_releases(store, "p")
