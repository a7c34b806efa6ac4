import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorruptObject, UserError
from pipeline.ledger import Ledger, StoredLedger
from pipeline.store import Store, open_store
from pipeline.store.records import (
    FORMAT,
    Count,
    Record,
    blob_path,
    create_record,
    digest,
    parse_object,
    peek_record,
    put_blob,
    read_blob,
    read_record,
)


@dataclass(frozen=True)
class Number(Record):
    x: Count


def test_blobs_are_named_by_content_and_damage_is_noticed(store: Store) -> None:
    name = put_blob(store, b"hello")
    assert name == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert put_blob(store, b"hello") == name
    assert read_blob(store, name) == b"hello"
    store.delete([blob_path(name)])
    with pytest.raises(CorruptObject, match="missing"):
        read_blob(store, name)
    store.create(blob_path(name), b"hellp")
    with pytest.raises(CorruptObject, match="other bytes"):
        read_blob(store, name)


def test_the_first_record_stands(store: Store) -> None:
    assert create_record(store, "artifacts/a.json", Number(1)) == Number(1)
    assert create_record(store, "artifacts/a.json", Number(2)) == Number(1)
    assert read_record(store, "artifacts/a.json", Number) == Number(1)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"x":1}', b"[]", b'{"x":2,"format":3,"checksum":"0"}'])
def test_a_corrupt_record_is_an_error_and_stays(damage: bytes, tmp_path: Path) -> None:
    """Also where another one is to be created in its place."""
    store = open_store(str(tmp_path))
    store.create("artifacts/a.json", damage)
    meetings: tuple[tuple[Callable[..., object], Any], ...] = ((read_record, Number), (create_record, Number(1)))
    for meet, what in meetings:
        with pytest.raises(CorruptObject, match=r"^artifacts/a.json: is corrupt$"):
            meet(store, "artifacts/a.json", what)
    assert peek_record(store, "artifacts/a.json", Number) is None
    assert store.read("artifacts/a.json") == damage


@pytest.mark.parametrize(("format_", "said"), [(99, "a newer"), (FORMAT - 1, "an older")])
def test_another_format_is_refused_and_kept(store: Store, format_: int, said: str) -> None:
    body = {"format": format_}
    store.create("artifacts/a.json", json.dumps({**body, "checksum": digest(body)}).encode())
    with pytest.raises(UserError, match=f"{said} version"):
        read_record(store, "artifacts/a.json", Number)
    assert len(list(store.list("artifacts/"))) == 1


def test_ledger_balances() -> None:
    a = Ledger.count([None, "timeout", None, "http_4xx", "timeout"])
    assert a == Ledger(2, {"http_4xx": 1}, {"timeout": 2})
    assert a.rows == 5
    b = a + Ledger(3, {"timeout": 1}, {"unreachable": 4})
    assert b.rows == 13
    assert parse_object(json.dumps(b.as_json()).encode(), StoredLedger) == b
    with pytest.raises(ValueError, match="balance"):
        parse_object(json.dumps(b.as_json() | {"rows": 12}).encode(), StoredLedger)
    with pytest.raises(ValueError, match="unknown reason"):
        Ledger(0, {"because": 1})
