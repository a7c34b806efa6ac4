"""Reads captions in detail: how long they are in CLIP's tokens, in which script they are written, what they share."""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pipeline.config import PRESETS, preset_config
from pipeline.data.pairs.preview import framed_rows
from pipeline.data.source.source import ListRow

# Of a process's time: a caption of one endless word takes a thousand times as long as others.
COUNTING_S = 20.0
FREQUENT = 5  # captions that are named
# What unicodedata calls the letters of one script.
KINDS = {
    "HIRAGANA": "Japanese kana",
    "KATAKANA": "Japanese kana",
    "CJK": "Chinese characters",
    "HANGUL": "Korean",
    "FULLWIDTH": "Latin",
}
NO_LETTERS = "no letters"


@dataclass(frozen=True)
class CaptionLook:
    """Holds what the captions of some rows, drawn from the whole list, are like.

    Attributes:
        rows: Rows whose captions were read, of each the first 16 at most.
        captions: Captions of these rows.
        tokens: Captions by their number of CLIP's BPE tokens, start and end not counted.
        reads: Tokens that the CLIP of each preset reads, by preset.
        cut: Captions with more tokens than that, by preset: what is behind is cut.
        scripts: Captions by the script of most of their letters.
        frequent: The most frequent first captions that several rows have, with their number of rows.
        framed: Rows of which every caption begins or ends with words that many captions share.
        frame: The most frequent of these words.
    """

    rows: int
    captions: int
    tokens: Mapping[int, int]
    reads: Mapping[str, int]
    cut: Mapping[str, int]
    scripts: Mapping[str, int]
    frequent: Sequence[tuple[str, int]]
    framed: int
    frame: str

    def quantile(self, share: float) -> int:
        """Returns the number of tokens that this share of the captions has at most; 0 without captions."""
        lengths = sorted(Counter(self.tokens).elements())
        return lengths[min(int(share * len(lengths)), len(lengths) - 1)] if lengths else 0


def look_at_captions(rows: Sequence[ListRow]) -> CaptionLook:
    """Returns what the captions of rows are like, of as many rows as COUNTING_S allows."""
    from models.tokens import caption_lengths  # loads torch

    began, read, tokens, scripts = time.process_time(), 0, Counter[int](), Counter[str]()
    for row in rows:
        if time.process_time() - began > COUNTING_S:
            break
        read += 1
        tokens.update(caption_lengths(row.captions))
        scripts.update(map(script_of, row.captions))
    first = Counter(row.captions[0] for row in rows[:read] if row.captions)
    framed = framed_rows([row.captions for row in rows[:read]])
    frequent = [(caption, count) for caption, count in first.most_common(FREQUENT) if count > 1]
    reads = {name: preset_config(name).clip.model.text_context - 2 for name in PRESETS}
    return CaptionLook(
        read,
        tokens.total(),
        dict(sorted(tokens.items())),
        reads,
        {name: count_above(tokens, most) for name, most in reads.items()},
        dict(scripts.most_common()),
        frequent,
        *framed,
    )


def count_above(counts: Mapping[int, int], most: int) -> int:
    """Returns how many of the numbers that are counted are above ``most``."""
    return sum(count for number, count in counts.items() if number > most)


def script_of(caption: str) -> str:
    """Returns the script of most of a caption's letters by their names in Unicode, such as "Latin" or "Cyrillic"."""
    found = Counter(script for letter in caption if (script := _script(letter)))
    return found.most_common(1)[0][0] if found else NO_LETTERS


@cache
def _script(letter: str) -> str:
    if not letter.isalpha():
        return ""
    kind = unicodedata.name(letter, "UNNAMED").partition(" ")[0]
    return KINDS.get(kind, kind.capitalize())
