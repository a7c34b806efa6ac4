"""What only a store of the clouds' library does; test_store.py runs on one, too."""

import pickle
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from pipeline.errors import Unreachable, UserError
from pipeline.store import Store, open_store
from tests.pipeline.data.bench import Page, Pages, serving
from tests.seaweed import Server

pytestmark = pytest.mark.integration
KEY = "c2VjcmV0"  # base64


@pytest.fixture
def store(s3: Server, tmp_path: Any) -> Store:
    from tests.pipeline.store.over_s3 import OverS3

    return OverS3(f"{s3.url}/cloud-{tmp_path.name}")


@pytest.mark.parametrize("mode", ["create", "swap"])
@pytest.mark.parametrize("written", [True, False])
def test_a_write_whose_answer_is_lost_is_sent_again(
    mode: str, written: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It meets its own first try, and has won; or the request was lost on its way, and is the first."""
    put, left = obstore.put, [True]

    def once_lost(*arguments: Any, **options: Any) -> Any:
        if not left:
            return put(*arguments, **options)
        left.clear()
        if written:
            put(*arguments, **options)
        raise GenericError("the answer is lost")

    old = None
    if mode == "swap":
        assert store.swap("locks/a", None, b"old")
        old = next(store.list("locks/a")).version
    monkeypatch.setattr(obstore, "put", once_lost)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert store.create("locks/a", b"new") if mode == "create" else store.swap("locks/a", old, b"new")
    assert not left
    assert store.read("locks/a") == b"new"
    assert not (store.create("locks/a", b"other") if mode == "create" else store.swap("locks/a", old, b"other"))


def test_a_write_that_lost_after_a_lost_answer_has_not_won(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put, left = obstore.put, [True]

    def beaten(*arguments: Any, **options: Any) -> Any:
        if not left:
            return put(*arguments, **options)
        left.clear()
        put(arguments[0], arguments[1], b"of somebody else")
        raise GenericError("the answer is lost")

    monkeypatch.setattr(obstore, "put", beaten)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert not store.create("locks/a", b"mine")
    assert store.read("locks/a") == b"of somebody else"


def test_it_is_pickled_without_its_connections(store: Store) -> None:
    store.create("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"
    assert store.fresh().read("a") == b"1"


class Everywhere(Pages):
    """Answers every path with the page of "/"."""

    def get(self, path: str, default: Any = None) -> Any:
        return super().get("/", default)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "grant it to them, or set AZURE_STORAGE"),
        (403, "these credentials may not read, write, list or delete there; grant it"),
        (404, "there is no such bucket; create it or correct the store's URL"),
        (500, "cannot be reached; check the network, and the credentials"),
    ],
)
def test_what_a_server_refuses_is_one_clear_line(status: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a server that answers as Azure's does."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(Everywhere({"/": Page(b"<Error><Code>AuthorizationFailure</Code></Error>", status)})) as address:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://{address}")
        monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        store = open_store("az://container/prefix")
        with pytest.raises(UserError, match=f"store az://container/prefix: .*{words}") as told:
            store.create("a", b"1")
        assert "\n" not in str(told.value)
        if status == 404:
            assert store.stat("a") is None
            with pytest.raises(FileNotFoundError):
                store.read("a")


def test_an_account_that_is_not_named_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(Unreachable, match=r"store az://container: .*set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container").read("a")
