"""A writer of a shared folder who means harm."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event


@contextmanager
def exchanging(inside: Path, outside: Path) -> Iterator[None]:
    """Puts a link to a folder in the place of another one, and back, as fast as renames go."""
    aside, link, stop, numbers = inside.with_name("aside"), inside.with_name("link"), Event(), itertools.count()
    link.symlink_to(outside)

    def move(source: Path, target: Path) -> None:
        while True:
            try:
                source.rename(target)
                return
            except OSError:  # somebody has made the folder meanwhile
                target.rename(outside.with_name(f"made meanwhile {next(numbers)}"))

    def exchange() -> int:
        exchanges = 0
        while not stop.is_set():
            inside.rename(aside)
            move(link, inside)
            inside.rename(link)
            move(aside, inside)
            exchanges += 1
        return exchanges

    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(exchange)
        try:
            yield
        finally:
            stop.set()
        assert thread.result() > 100
