"""``release.keys`` and ``--key``: every command that uses a release refuses one that nobody trusted has signed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.bundles import find_bundle
from jobs.cli import main
from jobs.serve import find_served
from pipeline.errors import UserError
from pipeline.graph.artifacts import artifact_path, load_artifact, publish_artifact
from pipeline.store.records import put_blob
from tests.jobs.releases import LATER, OTHER, Made
from tests.pipeline.release.keys import make_key, public


@pytest.fixture
def signing(made: Made, tmp_path: Path) -> Made:
    """A project that trusts one key. On S3: tests/pipeline/release/test_signing.py."""
    key = make_key(tmp_path)
    more = {"release": {"keys": [public(key)]}, "run": {"output": str(tmp_path / "out")}}
    values = yaml.safe_load(made.path.read_text()) | more
    made.path.write_text(yaml.safe_dump(values))
    return made


def users(made: Made, folder: Path) -> dict[str, Callable[[], object]]:
    """Every way to use a release."""
    return {
        "take": lambda: main_ok("release", "take", str(made.path), str(folder / "taken")),
        "weights": lambda: main_ok("release", "weights", str(made.path)),
        "--from release:": lambda: find_bundle(f"release:{made.path}").folder,
        "serve": lambda: find_served(f"release:{made.path}"),
    }


def main_ok(*words: str) -> None:
    if main(list(words)) != 0:
        raise UserError("ended with an error")


def refused(made: Made, folder: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, use in users(made, folder).items():
        with pytest.raises(UserError) as e:
            use()
        assert said in capsys.readouterr().err + str(e.value), name


def test_a_release_is_signed_and_used(signing: Made, tmp_path: Path) -> None:
    first, key = signing.make(0.0), str(tmp_path / "release.key")
    assert "release.keys asks for a signature; name a private key with --key FILE" in signing.release("promote", code=2)
    other = str(make_key(tmp_path, "other.key"))
    assert "other.key: is not among release.keys; add its line" in signing.release("promote", "--key", other, code=2)
    assert signing.releases.moves == ()
    signing.release("promote", "--key", key)
    assert "is the release already" in signing.release("promote", "--key", key)
    better = signing.make(0.1, OTHER)
    signing.release("promote", *LATER, "--key", key)
    assert "asks for a signature" in signing.release("rollback", code=2)
    for use in users(signing, tmp_path).values():
        use()
    assert find_bundle(f"release:{signing.path}").key == find_bundle(str(tmp_path / "taken")).key == better
    signing.release("rollback", "--key", key)
    assert find_bundle(f"release:{signing.path}").key == first
    assert find_served(f"release:{signing.path}").current() == first
    assert "not signed" not in signing.release("list")
    assert all(move["signature"] for move in json.loads(signing.release("list", "--json"))["moves"])


def test_one_that_nobody_trusted_has_signed_is_refused_everywhere_and_promoted_again(
    signing: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, key = signing.make(0.0), str(tmp_path / "release.key")
    trusting = signing.path.read_text()
    signing.path.write_text(yaml.safe_dump(yaml.safe_load(trusting) | {"release": {}}))
    signing.release("promote")
    signing.path.write_text(trusting)
    refused(signing, tmp_path, "is not signed by one of release.keys", capsys)
    assert "not signed by one of release.keys" in signing.release("list")
    signing.release("promote", "--key", key)
    assert find_bundle(f"release:{signing.path}").key == first
    better = signing.make(0.1, OTHER)
    signing.release("promote", *LATER, "--key", key)
    signing.release("rollback", "--key", key)
    again = signing.release("rollback", "--key", key, code=2)  # to the promotion that nobody signed
    assert f"{first[:12]} was promoted without a signature of release.keys" in again
    assert better != signing.current


def test_other_files_than_those_that_were_signed_are_refused_everywhere(
    signing: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, key = signing.make(0.0), str(tmp_path / "release.key")
    signing.release("promote", "--key", key)
    main_ok("release", "take", str(signing.path), str(tmp_path / "taken"))
    folder = find_bundle(f"release:{signing.path}").folder
    bundle = load_artifact(signing.store, "bundle", first)
    assert bundle is not None
    name, *_ = bundle.blobs

    forged = {**bundle.blobs, name: put_blob(signing.store, b"other weights")}
    signing.store.delete([artifact_path("bundle", first)])
    publish_artifact(signing.store, replace(bundle, blobs=forged), 0.0)
    refused(signing, tmp_path, "has other files than those that were signed", capsys)
    with pytest.raises(UserError, match="has other files than those that were signed; take it again"):
        find_bundle(str(tmp_path / "taken"))
    assert (folder / name).read_bytes() != b"other weights"


def test_what_lies_in_the_output_folder_is_not_taken_for_what_was_signed(signing: Made, tmp_path: Path) -> None:
    """Files that were copied under this key before, from a forged record, stay there and are not drawn with."""
    first, key = signing.make(0.0), str(tmp_path / "release.key")
    bundle = load_artifact(signing.store, "bundle", first)
    assert bundle is not None
    name, *_ = bundle.blobs
    signing.release("promote", "--key", key)
    before = find_bundle(str(signing.path)).folder / name
    before.write_bytes(b"other weights")
    assert (find_bundle(f"release:{signing.path}").folder / name).read_bytes() != b"other weights"


def test_without_keys_a_signature_is_told_how_it_would_be_checked(made: Made, tmp_path: Path) -> None:
    key = make_key(tmp_path)
    made.make(0.0)
    said = made.release("promote", "--key", str(key))
    line = public(key).rpartition(" ")[0]
    assert f'write release: {{keys: ["{line}"]}}' in said
    assert len(made.releases.moves[0].signature) == 128


@pytest.mark.parametrize("key", ["", "ssh-rsa AAAA", "-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-ed25519 AAAA"])
def test_a_key_that_is_none_is_refused_and_not_repeated(made: Made, key: str) -> None:
    made.path.write_text(yaml.safe_dump(yaml.safe_load(made.path.read_text()) | {"release": {"keys": [key]}}))
    said = made.release("list", code=2)
    assert "keys: number 1 is not a public Ed25519 key; write the line of release.key.pub" in said
    assert not key or key not in said.replace("ssh-ed25519 -f", "")
