"""The data card of an export: what its rows are, where they come from, on what terms, and what was left out.

The card of a model (pipeline.release.card) is written in the same form.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.source.lists import lists_there
from pipeline.graph.artifacts import Artifact
from pipeline.ledger import REASONS
from pipeline.progress import counted

CARD = "README.md"  # where hubs of data sets and of models look for a card
MOST_LICENCES = 1000  # names that are counted apart: a list may have another one for each of millions of rows
SHOWN_LICENCES = 20
SIZES = {1_000: "1K", 10_000: "10K", 100_000: "100K", 10**6: "1M", 10**7: "10M", 10**8: "100M", 10**9: "1B"}
FOLDERS = """\
| folder | holds | read with |
| --- | --- | --- |
| `pairs` | webdataset tars of images, captions and metadata | `load_dataset("webdataset", data_files="pairs/*.tar")` |
| `embeddings` | CLIP embeddings as Parquet | `load_dataset("parquet", data_files="embeddings/*.parquet")` |
| `clip-retrieval` | the same as NumPy matrices | clip-retrieval, embedding-reader |

Not every export has all three."""
LIMITS = """\
Nobody has reviewed every image and caption. They come from lists and were filtered by rules, so they include errors,
biases, people and trademarks of their sources. Licences are as the lists state them. Anyone who trains on this data is
responsible for having the right to, and for removing rows when their authors ask for it (`unclip data forget`)."""


class CardCounts:
    """Counts the rows of an export by what a card says of them.

    Attributes:
        rows: Rows by split.
        captions: Captions of all rows.
        licences: Rows by the licence that the list names; None where it names none.
    """

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.captions = 0
        self.licences: Counter[str | None] = Counter()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Counts further rows."""
        for row in rows:
            self.rows[row["split"]] += 1
            self.captions += len(row["captions"])
            count_licence(self.licences, row["license"])


def data_card(title: str, paths: Sequence[str], made: Mapping[str, Artifact], tally: CardCounts) -> str:
    """Returns the card as Markdown, with the metadata that a hub of data sets reads at its head.

    Args:
        title: Name of the project.
        paths: Lists of the source, of which only the names are shown.
        made: Artefacts of the stages that have judged the rows, by stage.
        tally: Rows that are exported.
    """
    count = tally.rows.total()
    lines = front_matter(
        pretty_name=title,
        task_categories=["text-to-image"],
        size_categories=[_size(count)],
        tags=["image-caption-pairs", "webdataset"],
    )
    lines += [
        f"# {title}",
        "",
        f"{counted(count, 'row')} with {counted(tally.captions, 'caption')}, curated by unclip-ray.",
        "",
    ]
    lines += markdown_table(("split", "rows"), sorted(tally.rows.items()))
    lines += [FOLDERS, "", "## Source data", "", *origin(paths), *licence_table(tally.licences)]
    lines += ["## Curation", "", *choice(made)]
    lines += markdown_table(("stage", "key"), [(stage, f"`{artifact.key}`") for stage, artifact in made.items()])
    return "\n".join([*lines, "## Limitations", "", LIMITS, ""])


def origin(paths: Sequence[str]) -> list[str]:
    """Returns the lines that name the lists, without their folders, and credit their authors; and an empty one."""
    lists = ", ".join(plain_cell(Path(path).name) for path in paths)
    credits = dict.fromkeys(found.credits for found in lists_there(paths) if found.credits)
    return [f"Lists: {lists or 'not named'}.", *credits, ""]


def choice(made: Mapping[str, Artifact]) -> list[str]:
    """Returns the lines of a table of the rows that stages left out, by reason, and an empty one."""
    ended = [
        (stage, artifact.ledger.kept, f"{many:,} {reason}: {REASONS[reason]}")
        for stage, artifact in made.items()
        for reason, many in sorted(artifact.ledger.lost.items())
    ]
    if not ended:
        return []
    return ["Rows of the whole list, in all splits:", "", *markdown_table(("stage", "kept", "left out"), ended)]


def count_licence(tally: Counter[str | None], licence: str | None, rows: int = 1) -> None:
    """Counts rows by their licence, None where the list names none; beyond MOST_LICENCES names as further ones."""
    full = len(tally) >= MOST_LICENCES and licence not in tally
    tally["further ones" if full else licence] += rows


def licence_table(tally: Counter[str | None]) -> list[str]:
    """Returns the lines of a table of the commonest licences, and an empty one."""
    named = [(plain_cell(name or "none named"), many) for name, many in tally.most_common(SHOWN_LICENCES)]
    others = tally.total() - sum(many for _, many in named)
    rows = [*named, *([("others", others)] if others else [])]
    return markdown_table(("licence, as stated by the lists", "rows"), rows)


def front_matter(**head: Any) -> list[str]:
    """Returns the lines of a card's metadata as YAML, and an empty one."""
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", ""]


def _size(count: int) -> str:
    """Returns the name that hubs have for a number of rows."""
    below = "n"
    for bound, name in SIZES.items():
        if count < bound:
            return f"{below}<{name}" if below == "n" else f"{below}<n<{name}"
        below = name
    return "n>1B"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a table and an empty one; nothing without rows."""
    if not rows:
        return []
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)] + [""]


def plain_cell(text: str) -> str:
    """Returns a text of a list as plain words of a table: neither markup nor a line of its own."""
    plain = "".join(each if each.isprintable() else " " for each in text)[:100]
    return "".join(f"\\{each}" if each in "\\`*_[]|#!" else each for each in html.escape(plain, quote=False))
