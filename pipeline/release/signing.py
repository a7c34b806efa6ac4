"""Signs the moves of a release with an Ed25519 key, and checks that a trusted key signed them.

A signature covers every move up to its own, so none of them can be changed, left out or repeated, and each move names
the files of its bundle by their sha256. It does not name the store: a copy of a store keeps its release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.local import read_local
from pipeline.release.diff import find_bundle
from pipeline.release.pointer import Move, Releases
from pipeline.store import Store
from pipeline.store.records import canonical, digest

PURPOSE = "unclip release 1"  # in every signed message: a signature by the same key for another use does not count
KEY_BYTES = 1 << 16
MAKE = "ssh-keygen -t ed25519 -N '' -f release.key makes one"


class Untrusted(UserError):
    """Raised for a release without a signature of a trusted key, or that differs from the signed one."""


def read_private_key(path: str | Path) -> Ed25519PrivateKey:
    """Returns the private key in a file of ssh-keygen. Raises UserError."""
    try:
        key = load_ssh_private_key(read_local(path, KEY_BYTES), password=None)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); name a private key: {MAKE}") from None
    except TypeError:  # the library's error for a key with a passphrase
        raise UserError(f"{path}: has a passphrase; ssh-keygen -p -f {path} removes it from a copy") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path}: is not a private Ed25519 key; {MAKE}")
    return key


def public_line(key: Ed25519PrivateKey) -> str:
    """Returns the public half of a key as ``release.keys`` names it: ``ssh-ed25519 AAAA...``."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def files_of(bundle: Artifact) -> str:
    """Returns the sha256 of the names of a bundle's files with the sha256 of each."""
    return digest(dict(bundle.blobs))


def signed(project: str, seen: Releases, move: Move, key: Ed25519PrivateKey) -> Move:
    """Returns the move with a signature that is valid after the ``seen`` moves alone."""
    return replace(move, signature=key.sign(_message(project, (*seen.moves, move))).hex())


def is_signed(project: str, moves: Sequence[Move], keys: Sequence[str]) -> bool:
    """Returns whether one of the public ``keys`` signed the last of some moves, all that led to it included."""
    try:
        signature, message = bytes.fromhex(moves[-1].signature), _message(project, moves)
    except ValueError:
        return False
    return any(_verifies(key, signature, message) for key in keys)


def check_signed(store: Store, project: str, releases: Releases, keys: Sequence[str], seen: int = 0) -> None:
    """Raises Untrusted unless trusted keys signed the newest move and the promotion that is the current release.

    Args:
        store: The store of the release, for the message.
        project: The project of the release.
        releases: All moves.
        keys: The trusted public keys; without any nothing is checked.
        seen: Number of moves seen before: fewer are an older state that was put back.
    """
    if not keys or not releases.places:
        return
    moves, where = releases.moves, f"{project}: the release in {store.url}"
    if len(moves) < seen:
        raise Untrusted(
            f"{where} has {len(moves)} moves, and had {seen} before: an older state was put back; if that was meant, "
            "start again"
        )
    # The newest signature covers all moves before it, but not who made them: an unsigned promotion may be among them.
    for place in (len(moves) - 1, releases.places[-1]):
        if not is_signed(project, moves[: place + 1], keys):
            move = moves[place]
            raise Untrusted(
                f"{where} is not signed by one of release.keys (move {place + 1}, a {move.action} to bundle "
                f"{move.bundle[:12]}); unclip release list shows who moved what, and promote --key FILE signs it"
            )


def find_release(store: Store, project: str, releases: Releases, keys: Sequence[str], seen: int = 0) -> Artifact:
    """Returns the bundle of the current release, whose files are those that were signed where ``keys`` are given.

    Raises UserError where there is none, and Untrusted as ``check_signed`` does.
    """
    check_signed(store, project, releases, keys, seen)
    bundle = find_bundle(store, releases, "current")
    if keys and releases.current is not None and releases.current.files != files_of(bundle):
        raise Untrusted(
            f"{project}: bundle {bundle.key[:12]} in {store.url} has other files than those that were signed; delete "
            f"its record, run its configuration again, and promote the new bundle with --key FILE"
        )
    return bundle


def _message(project: str, moves: Sequence[Move]) -> bytes:
    *before, last = map(asdict, moves)
    del last["signature"]
    return canonical({"purpose": PURPOSE, "project": project, "moves": [*before, last]})


def _verifies(key: str, signature: bytes, message: bytes) -> bool:
    public = load_ssh_public_key(key.encode())
    assert isinstance(public, Ed25519PublicKey)  # as ReleaseGates has checked
    try:
        public.verify(signature, message)
    except InvalidSignature:
        return False
    return True
