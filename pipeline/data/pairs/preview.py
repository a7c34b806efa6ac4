"""Looks at the first rows of a list: how many, what captions say, how large images are. Writes and fetches nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from pipeline.data.fetch.opener import Guard
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.image import MAX_BYTES, MAX_PIXELS
from pipeline.data.pairs.lost import host_of_reference
from pipeline.data.source.cells import read_cells
from pipeline.data.source.lists import no_rows, path_policy, read_rows, source_at, unread
from pipeline.data.source.recipe import SourceRecipe, hash_share
from pipeline.data.source.source import ListRow
from pipeline.data.source.tars import tar_place
from pipeline.errors import UserError
from pipeline.local import PathPolicy, is_cell, is_embedding, is_member, local_path, on_web, read_local, reason_of

MOST_ROWS = 10_000  # looked at, at most, so that a look at a list of millions takes seconds
# Of the rows behind those: what a configuration says of more does not depend on their number.
MOST_COUNTED = 1_000_000
FORBIDDEN = "forbidden_reference"
MEASURED = 100  # measured, at most
MOST_ENDED = 5  # tars that are named

FRAME_WORDS = 3  # at the beginning or the end of a caption, which has more
COMMON = 0.1  # of the different captions have such words, and at least COMMON_LEAST captions
COMMON_LEAST = 10


class Framed(NamedTuple):
    """Holds how many rows have only captions that begin or end as many do, and the most frequent of these words."""

    rows: int = 0
    words: str = ""


@dataclass(frozen=True)
class ListPreview:
    """Holds what the first rows of a list are like.

    Attributes:
        rows: Rows with a reference that were read.
        more: Rows are left in the list beyond those that were read.
        captions: The first caption of each row that has one.
        sides: Short sides, in pixels, of the first images that lie on this machine, or else those that tables state.
        unopened: Images among these that cannot be opened, each with the reason, of pipeline.ledger.
        splits: Rows whose split the list names, by split.
        shares: Hash shares of all other rows.
        forbidden: References that the list may not name; counted nowhere else.
        private: References, of those that count, to hosts that are not public by their names.
        left_out: Other rows without a reference that can be read, by reason; counted nowhere else.
        flaws: Faults of rows that cannot be read; counted nowhere else.
        framed: Rows of which every caption begins or ends as many captions do.
        behind: Rows with a reference and a caption behind those that were read, of at most ``MOST_COUNTED``.
        unread: Messages about what of a list is not read: files of a folder, how many and of what kinds, in one for
            each list with such files, and the first tars that end early.
        stated: Sides are those that tables state, because no image could be opened here.
    """

    rows: int
    more: bool
    captions: tuple[str, ...]
    sides: tuple[int, ...]
    unopened: tuple[tuple[str, str], ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    forbidden: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    flaws: tuple[str, ...] = ()
    framed: Framed = field(default_factory=Framed)
    behind: int = 0
    unread: tuple[str, ...] = ()
    stated: bool = False

    @property
    def pairs(self) -> int:
        """Returns the rows with a caption that were read or counted."""
        return len(self.captions) + self.behind

    def reaching(self, side: int) -> int:
        """Returns how many of the measured images have a short side of at least this."""
        return sum(short >= side for short in self.sides)


def preview(recipe: SourceRecipe) -> ListPreview:
    """Reads the first rows, and at least one of every list, and counts the others.

    Raises:
        UserError: for a list that ``scan`` would refuse, as far as it is read.
    """
    found: list[ListRow] = []
    counted = behind = 0
    ended: list[str] = []
    for path in recipe.paths:
        rows = read_rows(path, recipe)
        first = list(islice(rows, max(1, MOST_ROWS - len(found))))
        if not first:
            raise no_rows(path, recipe)
        found += first
        for row in islice(rows, MOST_COUNTED - counted):
            counted += 1
            ended += [row.flaw] if row.reject == "truncated" else []
            behind += bool(row.url and row.captions and not row.reject)
    ended = [*(row.flaw for row in found if row.reject == "truncated"), *ended]
    flaws = tuple(row.flaw for row in found if row.flaw and row.reject != "truncated")
    forbidden = tuple(row.url for row in found if row.reject == FORBIDDEN)
    others = (row for row in found if not (row.flaw or row.reject == FORBIDDEN or (row.url and not row.reject)))
    left_out = Counter(row.reject or "no_reference" for row in others)
    found = [row for row in found if row.url and not row.reject]
    captions = tuple(row.captions[0] for row in found if row.captions)
    guard = Guard({}, ())
    private = tuple(row.url for row in found if guard.forbids(host_of_reference(row.url)))
    measured = list(_measured(found, path_policy(recipe, *recipe.paths)))
    different = {
        row.url: row for row in reversed(found)
    }.values()  # the first of each reference: the others are rejected
    splits = Counter(row.split for row in different if row.split)
    shares = tuple(hash_share(row.group or row.url) for row in different if not row.split)
    opened = tuple(min(size) for _, size in measured if not isinstance(size, str))
    unopened = tuple((shown(url), size) for url, size in measured if isinstance(size, str))
    left = tuple(filter(None, (*ended[:MOST_ENDED], *(unread(path, recipe) for path in recipe.paths))))
    framed = framed_rows([row.captions for row in found])
    listed = () if opened else chain.from_iterable(source_at(path).stated_sides(recipe) for path in recipe.paths)
    sides = opened or tuple(islice(listed, MOST_ROWS))
    more, stated = counted > 0, not opened
    return ListPreview(
        len(found),
        more,
        captions,
        sides,
        unopened,
        splits,
        shares,
        forbidden,
        private,
        left_out,
        flaws,
        framed,
        behind,
        left,
        stated,
    )


def behind_embeddings(folder: Path, recipe: SourceRecipe) -> tuple[str, str]:
    """Returns where the images lie of which a folder of embeddings was made, as far as its first metadata say it.

    Returns:
        The folder of metadata, a list, if they name URLs; else the folder of an image here. "" for what there is not.
    """
    metadata = os.path.abspath(folder / "metadata")
    found = ""
    try:
        for row in islice(read_rows(metadata, recipe), MEASURED):
            if on_web(row.url):
                return str(folder / "metadata"), ""
            path = local_path(row.url) or ""
            # clip-retrieval writes paths as it was given them: relative ones count from where it ran.
            here = next(filter(os.path.isfile, (path, path.removeprefix(f"{metadata}/"))), "")
            found = found or os.path.dirname(here)
    except (UserError, ValueError):  # metadata that cannot be read are named as those of embeddings
        pass
    return "", found


def framed_rows(rows: Sequence[Sequence[str]]) -> Framed:
    """Counts the rows of which every caption begins or ends with FRAME_WORDS words that are common among captions.

    Words are common if COMMON of the different captions, and COMMON_LEAST of them, begin (or end) with them and go on
    (or begin) otherwise. ``rows`` are the captions of each; one without any does not count.
    """
    different = list(dict.fromkeys(chain.from_iterable(rows)))
    least = max(COMMON_LEAST, COMMON * len(different))
    counts = Counter(frame for caption in different for frame in _frames(caption))
    common = {frame for frame, count in counts.items() if count >= least}
    framed = [row for row in rows if row and all(common.intersection(_frames(caption)) for caption in row)]
    if not framed:
        return Framed()
    _, words = max(common, key=lambda frame: counts[frame])
    return Framed(len(framed), words)


def _frames(caption: str) -> list[tuple[bool, str]]:
    """Returns the first and the last words of a caption that has more, each with whether they are the first."""
    first, last = caption.split(maxsplit=FRAME_WORDS), caption.rsplit(maxsplit=FRAME_WORDS)
    if len(first) <= FRAME_WORDS:
        return []
    return [(True, " ".join(first[:-1])), (False, " ".join(last[1:]))]


def _measured(rows: list[ListRow], may: PathPolicy) -> Iterator[tuple[str, tuple[int, int] | str]]:
    """Yields references of the first images that lie here, each with width and height, or why it cannot be opened."""
    urls = list(islice((row.url for row in rows if not (on_web(row.url) or is_embedding(row.url))), MEASURED))
    cells = read_cells([url for url in urls if is_cell(url)], MAX_BYTES, may)
    for url in urls:
        try:
            data = next(cells) if is_cell(url) else _read(url, may)
            yield url, data if isinstance(data, str) else shared_decoder().measure(data, MAX_PIXELS)
        except OSError as e:
            yield url, reason_of(e)
        except ValueError:  # not a URL, or a place in a tar that is none
            yield url, "unsupported_reference"


def _read(url: str, may: PathPolicy) -> bytes:
    """Returns the bytes of an image in a file or in a tar. Raises OSError or ValueError."""
    if is_member(url):
        if (place := tar_place(url)) is None:
            raise ValueError("not a member of a tar")
        return read_local(place["tar"], MAX_BYTES, may, place["offset"], place["size"])
    if (path := local_path(url)) is None:
        raise ValueError("not a file")
    return read_local(path, MAX_BYTES, may)
