"""Signed releases: what was signed is read, and nothing else, whoever else may write to the store."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, Pointer, Releases, move_release, read_releases, release_path
from pipeline.release.signing import (
    Untrusted,
    check_signed,
    files_of,
    find_release,
    is_signed,
    public_line,
    read_private_key,
    signed,
)
from pipeline.store import Store
from pipeline.store.records import put_blob, seal
from serve.bundle import ServedBundle
from tests.pipeline.release.keys import make_key, public


class Team:
    """A store with three bundles, and the key of who may release them."""

    def __init__(self, store: Store, folder: Path):
        self.store, self.key = store, read_private_key(folder / "release.key")
        self.public = public(folder / "release.key")
        self.bundles = [self.bundle(name) for name in ("a" * 64, "b" * 64, "c" * 64)]

    def bundle(self, key: str, content: bytes = b"") -> Artifact:
        blobs = {"decoder/model.safetensors": put_blob(self.store, content or key.encode())}
        return publish_artifact(self.store, Artifact("bundle", key, {}, {}, Ledger(), blobs), 0.0)

    def move(self, action: str, bundle: Artifact, sign: bool = True) -> Move:
        seen = read_releases(self.store, "p")
        move = Move(action, bundle.key, "e" * 64, 1.0, files=files_of(bundle))
        move = signed("p", seen, move, self.key) if sign else move
        move_release(self.store, "p", seen, move)
        return move

    def write(self, *moves: Move, project: str = "p") -> None:
        """Writes the pointer as somebody does who may write to releases/, and has no key."""
        path = release_path(project)
        self.store.delete([path])
        assert self.store.create(path, seal(Pointer(project, moves), path))

    def find(self, project: str = "p") -> Artifact:
        return find_release(self.store, project, read_releases(self.store, project), [self.public])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two keys."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("release.key", "other.key"):
        make_key(folder, name)
    return folder


@pytest.fixture
def team(store: Store, keys: Path) -> Team:
    return Team(store, keys)


def test_what_was_signed_is_found_through_promotions_and_rollbacks(team: Team) -> None:
    first, second, third = team.bundles
    for bundle in (first, second):
        team.move("promote", bundle)
        assert team.find() == bundle
    team.move("rollback", first)
    assert team.find() == first
    team.move("promote", third)
    assert team.find() == third
    team.move("rollback", first)
    assert team.find() == first


def test_every_other_pointer_is_refused(team: Team, keys: Path) -> None:
    first, second, third = team.bundles
    for action, bundle in (("promote", first), ("promote", second), ("rollback", first)):
        team.move(action, bundle)
    a, b, back = read_releases(team.store, "p").moves
    other = read_private_key(keys / "other.key")
    evil = Move("promote", third.key, "e" * 64, 1.0, files=files_of(third))
    history = Releases(None, (a, b, back))
    forged = {
        "replayed: a signed promotion once more": (a, b, back, b),
        "replayed: without what was between": (a, back, b),
        "replayed: alone": (b,),
        "stripped": (a, b, replace(back, signature="")),
        "no hexadecimal": (a, b, replace(back, signature="signed")),
        "another bundle in a signed move": (a, replace(b, bundle=third.key), back),
        "other files in a signed move": (a, b, replace(back, files=files_of(third))),
        "another reason": (a, b, replace(back, reason="it drew cats")),
        "unsigned on top": (a, b, back, evil),
        "signed by somebody else": (a, b, back, signed("p", history, evil, other)),
        "signed for another place": (a, b, back, signed("p", Releases(None, (a,)), evil, team.key)),
        "signed for another project": (a, b, back, signed("q", history, evil, team.key)),
    }
    for what, moves in forged.items():
        team.write(*moves)
        with pytest.raises(Untrusted, match=r"is not signed by one of release\.keys") as refused:
            team.find()
        assert "\n" not in str(refused.value), what
    team.write(a, b, back)
    assert team.find() == first
    team.write(a, b, back, project="q")
    with pytest.raises(Untrusted):
        team.find("q")


def test_a_signature_for_something_else_is_none_of_a_release(team: Team) -> None:
    move = Move("promote", "a" * 64, "e" * 64, 1.0)
    bare = replace(move, signature=team.key.sign(b"").hex())
    assert not is_signed("p", (bare,), [team.public])
    assert is_signed("p", (signed("p", Releases(), move, team.key),), [team.public])


def test_a_promotion_from_before_the_signatures_is_no_release_again(team: Team) -> None:
    """Nobody signed it: a later signature, which covers it, does not make it one by a rollback."""
    first, second, _ = team.bundles
    team.move("promote", first, sign=False)
    team.move("promote", second)
    assert team.find() == second
    team.move("rollback", first)
    with pytest.raises(Untrusted, match="move 1, a promote to bundle aaaaaaaaaaaa"):
        team.find()


def test_without_keys_nothing_is_checked_and_with_several_one_is_enough(team: Team, keys: Path) -> None:
    first, *_ = team.bundles
    team.move("promote", first, sign=False)
    releases = read_releases(team.store, "p")
    assert find_release(team.store, "p", releases, []) == first
    other = public(keys / "other.key")
    team.write()
    team.move("promote", first)
    releases = read_releases(team.store, "p")
    assert find_release(team.store, "p", releases, [other, team.public]) == first
    with pytest.raises(Untrusted):
        find_release(team.store, "p", releases, [other])


def test_who_serves_goes_on_from_what_it_has_seen(team: Team) -> None:
    """An older state of the pointer is signed, too, so a new process would take it; one that runs does not."""
    first, second, _ = team.bundles
    team.move("promote", first)
    old = read_releases(team.store, "p").moves
    served = ServedBundle("p", store=team.store.url, project="p", keys=(team.public,))
    assert served.current() == first.key
    team.move("promote", second)
    assert served.current() == second.key
    team.write(*old)
    with pytest.raises(Untrusted, match="has 1 moves, and had 2 before: an older state was put back"):
        served.current()
    with pytest.raises(Untrusted, match="older state"):
        served.open(second.key, "cpu")
    assert ServedBundle("p", store=team.store.url, project="p", keys=(team.public,)).current() == first.key
    check_signed(team.store, "p", read_releases(team.store, "p"), [team.public])


def test_a_private_key_is_read_as_ssh_keygen_writes_it(tmp_path: Path) -> None:
    key = make_key(tmp_path, "fine")
    assert public(key).startswith(public_line(read_private_key(key)))
    for file, said in (
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path, "cannot be read"),
        (make_key(tmp_path, "locked", passphrase="secret words"), "has a passphrase; ssh-keygen -p"),
        (make_key(tmp_path, "rsa", "rsa"), "is not a private Ed25519 key; ssh-keygen"),
        (key.with_name("fine.pub"), "is not a private Ed25519 key"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            read_private_key(file)
        assert str(file) in str(refused.value)
        assert "\n" not in str(refused.value)
