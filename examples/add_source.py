"""Adds a kind of list: image references and captions in a table of an SQLite database.

    source: {paths: ["sqlite:/data/pairs.db?pairs"]}

Every command finds it once it is installed as a package, by these lines of its pyproject.toml:

    [project.entry-points."unclip.sources"]
    sqlite = "add_source:Sqlite"

docs/extend.md explains each part.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from unclip.sources import ListReader, ListRow, Source, SourceRecipe, UserError


class Sqlite(Source):
    """A table of an SQLite database, as ``sqlite:FILE?TABLE``."""

    prefixes = ("sqlite:",)

    @property
    def place(self) -> tuple[Path, str]:
        """Returns the file and the table."""
        file, _, table = self.path.removeprefix("sqlite:").partition("?")
        if not (table and Path(file).is_file()):
            raise UserError(f"source {self.path}: no such file, or no table; write sqlite:FILE?TABLE")
        return Path(file).absolute(), table

    @property
    def own(self) -> str:
        """Returns the folder of the database: rows may name its files, also by relative paths."""
        return str(self.place[0].parent)

    def fingerprint(self) -> Any:
        """Returns path, size and time of the file, and of its write-ahead log."""
        file, table = self.place
        log = file.with_name(f"{file.name}-wal")
        return [table, *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in (file, log) if f.exists())]

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the rows in the order in which they were inserted."""
        file, table = self.place
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            there = [name for _, name, *_ in database.execute("SELECT * FROM pragma_table_info(?)", (table,))]
            for column in (recipe.image_column, recipe.caption_column):
                if column not in there:
                    raise UserError(f"source {self.path}: no column {column}; it has {', '.join(there) or 'none'}")
            wanted = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column]
            names = ", ".join(_quoted(name) if name in there else "''" for name in wanted)
            for values in database.execute(f"SELECT {names} FROM {_quoted(table)} ORDER BY rowid"):
                url, caption, group, split = ("" if value is None else str(value) for value in values)
                yield ListRow(url, (caption,), group, split)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
