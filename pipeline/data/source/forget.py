"""Finds the references of a list behind what a person asks to be forgotten: keys, references, hashes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.data.source.journal import reference_mark, reference_marks
from pipeline.data.source.segments import SourceShard, row_key, shard_of
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table
from pipeline.store import Store
from pipeline.store.parallel import ordered_map

MOST_NAMED = 20  # rows, at most, that are told one by one


@dataclass(frozen=True)
class Request:
    """Holds what is to be forgotten.

    Attributes:
        keys: Keys of rows, 12 digits.
        hashes: SHA-256 of stored images, 64 hexadecimal digits.
        references: References of images, which is everything else.
    """

    keys: frozenset[str]
    hashes: frozenset[str]
    references: frozenset[str]

    @staticmethod
    def read(words: Iterable[str]) -> Request:
        """Sorts words by their form; empty words and lines that begin with # are passed over."""
        said = {word.strip() for word in words if word.strip() and not word.strip().startswith("#")}
        keys = frozenset(word for word in said if re.fullmatch(r"\d{12}", word))
        hashes = frozenset(word.lower() for word in said if re.fullmatch(r"[0-9a-fA-F]{64}", word))
        return Request(keys, hashes, frozenset(w for w in said if w not in keys and w.lower() not in hashes))


@dataclass(frozen=True)
class Matches:
    """Holds what a request is about.

    Attributes:
        marks: Marks of the references to forget.
        rows: Number of rows that have them.
        named: Keys and references of the first MOST_NAMED of these rows.
        unseen: References of the request that no row has yet.
    """

    marks: set[str]
    rows: int
    named: list[tuple[str, str]]
    unseen: list[str]


def find(store: Store, source: Sequence[SourceShard], pairs: Artifact | None, request: Request) -> Matches:
    """Returns what a request is about.

    A URL or a whole path that no row has is forgotten for lists to come.

    Args:
        store: Store of the list.
        source: The stored shards of the list.
        pairs: Artefact made from ``source``; needed for hashes.
        request: Request to look up.

    Raises:
        UserError: for a key or a hash that no row has, and for any other word.
    """
    marks = {reference_mark(url) for url in request.references}
    marks |= _of_keys(store, source, request.keys)
    if request.hashes:
        marks |= _of_hashes(store, read_shards(store, pairs) if pairs else [], request.hashes)
    held: set[str] = set()
    rows = 0
    named: list[tuple[str, str]] = []
    for shard, found in zip(source, ordered_map(lambda shard: _rows_in(store, shard, marks), source), strict=True):
        held |= {mark for _, url in found for mark in reference_marks(url)}
        rows += len(found)
        named += [(row_key(shard.number, place), url) for place, url in found][: MOST_NAMED - len(named)]
    unseen = sorted(url for url in request.references if reference_mark(url) not in held)
    for word in unseen:
        if not (os.path.isabs(word) or re.match(r"[A-Za-z][\w+.-]*:", word)):
            raise UserError(
                f"{word}: no row of the list has this reference; nothing is forgotten: give a key, a URL, a file's "
                "whole path, or the sha256 of a stored image"
            )
    return Matches(marks, rows, named, unseen)


def _rows_in(store: Store, shard: SourceShard, marks: set[str]) -> list[tuple[int, str]]:
    """Returns places in the shard, and references."""
    urls = read_table(store, shard.refs, ["url"])["url"].to_pylist()
    return [(place, url) for place, url in enumerate(urls) if not marks.isdisjoint(reference_marks(url))]


def _of_keys(store: Store, source: Sequence[SourceShard], keys: frozenset[str]) -> set[str]:
    shards = {shard.number: shard for shard in source}
    marks = set()
    for number in sorted({shard_of(key) for key in keys}):
        wanted = {key for key in keys if shard_of(key) == number}
        urls = read_table(store, shards[number].refs, ["url"])["url"].to_pylist() if number in shards else []
        found = {key: url for i, url in enumerate(urls) if (key := row_key(number, i)) in wanted and url}
        if missing := sorted(wanted - found.keys()):
            raise UserError(f"{missing[0]}: no row of the list has this key; nothing is forgotten")
        marks |= {mark for url in found.values() for mark in reference_marks(url)}
    return marks


def _of_hashes(store: Store, pairs: list[ShardRow], hashes: frozenset[str]) -> set[str]:
    found: dict[str, set[str]] = {}

    def look(shard: ShardRow) -> list[tuple[str, str]]:
        table = read_table(store, shard.blobs["index"], ["url", "sha256"]).to_pylist()
        return [(row["sha256"], reference_mark(row["url"])) for row in table if row["sha256"] in hashes]

    for hits in ordered_map(look, pairs):
        for sha256, mark in hits:
            found.setdefault(sha256, set()).add(mark)
    if missing := sorted(hashes - found.keys()):
        raise UserError(f"{missing[0]}: no stored image has this sha256; nothing is forgotten")
    return {mark for marks in found.values() for mark in marks}
