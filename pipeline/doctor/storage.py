"""Checks that the store does what the pipeline depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.doctor.finding import Finding, brief
from pipeline.errors import UserError
from pipeline.store import Store, check_conditions, local_folder

PROBES = "locks"  # the folder that probes lie in


def check_store(store: Store) -> Iterator[Finding]:
    """Yields one finding: the store does everything that is needed, or what it does not do."""
    try:
        with leaving_nothing(store):
            check_conditions(store)
    except UserError as e:
        yield Finding("problem", "store", str(e).removeprefix("store "))
    except Exception as e:  # of a server or a file system that answers as none should
        yield Finding("problem", "store", f"{store.url}: {brief(e)}", "check its URL and the server's log")
    else:
        yield Finding("ok", "store", f"{store.url} supports conditional writes, reads, lists and deletes")


@contextmanager
def leaving_nothing(store: Store) -> Iterator[None]:
    """Removes the empty folders that probes have made, where the store is a folder."""
    folder = local_folder(store)
    paths = [folder / PROBES, folder, *folder.parents] if folder else []
    new = [path for path in paths if not Path(path).exists()]
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):  # somebody else has put something there meanwhile
                path.rmdir()
