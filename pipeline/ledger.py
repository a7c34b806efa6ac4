"""Every row ends kept, rejected or deferred, with a reason from a closed list. Counts balance in every record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import PlainSerializer, WrapValidator

REASONS = {
    # source
    "malformed_row": "a line of the list with a stray quotation mark, too few or many values, or over 1 MiB",
    "not_utf8": "a value of the list, or a file of captions, that is not UTF-8",
    "no_reference": "the row names no image",
    "no_caption": "no caption, or only white space",
    "duplicate_url": "an earlier row names the same image; in a list with many such rows, it has their captions",
    "budget_spent": "the rest of a list beyond its budget; or an image slower than its allowance, after its host or "
    "shard has spent its decoding time",
    "forgotten": "the row was forgotten (unclip data forget)",
    # fetch
    "unsupported_reference": "not an http, https, s3, file, tar or Parquet reference, or one over 8 KiB",
    "forbidden_reference": "a file or bucket that the list may not name (source.roots)",
    "missing_file": "no such file, or no such object on S3",
    "http_4xx": "the server answered with a 4xx status",
    "http_5xx": "the server answered with a 5xx status",
    "rate_limited": "the server asks for fewer requests (status 429, or Retry-After)",
    "timeout": "the server did not deliver in time",
    "unreachable": "no connection to the server, or its name does not resolve",
    "forbidden_address": "the host or a redirect leads to an address that is not public (pairs.allow)",
    "opted_out": "excluded by the site's robots.txt or X-Robots-Tag",
    "denied": "on a deny list of the configuration",
    "too_large": "more bytes than allowed",
    # decode
    "zero_bytes": "an empty body",
    "not_an_image": "the bytes are not an image in a supported format",
    "needs_heif": "a HEIC image, which needs the extra heif: pip install 'pillow-heif>=1,<2'",
    "too_many_pixels": "more pixels than allowed, by the header",
    "truncated": "the image ends early, or the tar of which it would be the next",
    "hash_mismatch": "the bytes do not match the list's hash",
    "decode_error": "the image cannot be decoded",
    "decode_timeout": "decoding took longer than an image of that size may take",
    "too_long": "the long side would be stored with more than 8 times pairs.image_size",
    "decoder_crashed": "decoding the image killed the decoder's process, twice",
    "not_an_embedding": "an imported embedding is zero, holds NaN or Inf, or has another length",
    # curation
    "too_small": "the short side is below the minimum",
    "bad_aspect": "an aspect ratio above the maximum",
    "caption_too_short": "fewer characters than the minimum",
    "caption_too_long": "more characters than the maximum",
    "low_similarity": "the similarity of image and caption is below the threshold",
    "low_score": "a head scores the image below its minimum",
    "high_score": "a head scores the image above its maximum",
    "near_duplicate": "an earlier row of its split has nearly the same image, large enough for the same models",
    "near_held_out": "a training row whose image nearly equals a held-out one",
    # recaption: of an image that is asked for a caption, and keeps its row
    "refused": "the model refuses to describe the image",
    "empty_answer": "the model's answer is empty",
    "not_text": "the answer has no letters, or has control characters",
    "answer_too_long": "the answer is longer than a caption may be, or was cut off",
    "malformed_answer": "the answer is not the JSON of a chat completion",
    # generation
    "prompt_too_long": "more than the 75 tokens that CLIP reads",
}

# These rows are deferred: the server may answer later, the package may be installed. All other reasons reject a row.
DEFERRED = frozenset({"http_5xx", "rate_limited", "timeout", "unreachable", "needs_heif"})


def status_of(reason: str | None) -> str:
    """Returns "kept" for no reason, else "rejected" or "deferred"."""
    return "kept" if reason is None else "deferred" if reason in DEFERRED else "rejected"


@dataclass(frozen=True)
class Ledger:
    """Counts of rows by how they ended. Raises ValueError for a reason outside REASONS or a negative count.

    Records hold it as a StoredLedger.
    """

    kept: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    deferred: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for reason, count in (("kept", self.kept), *self.rejected.items(), *self.deferred.items()):
            if reason not in REASONS and reason != "kept":
                raise ValueError(f"unknown reason {reason}: add it to pipeline.ledger.REASONS")
            if count < 0:
                raise ValueError(f"{reason}: {count} rows")

    @property
    def rows(self) -> int:
        return self.kept + sum(self.rejected.values()) + sum(self.deferred.values())

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            self.kept + other.kept,
            dict(Counter(self.rejected) + Counter(other.rejected)),
            dict(Counter(self.deferred) + Counter(other.deferred)),
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the counts, sorted, with their total, so that a reader can check the balance."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "deferred": dict(sorted(self.deferred.items())),
        }

    @property
    def lost(self) -> dict[str, int]:
        """Rows that were not kept, by reason."""
        return {**self.rejected, **self.deferred}

    @staticmethod
    def count(statuses: Iterable[str | None]) -> Ledger:
        """Returns the ledger of one value a row: None for kept, else a reason."""
        ended: dict[str, dict[str, int]] = {"kept": {}, "rejected": {}, "deferred": {}}
        for reason, count in Counter(statuses).items():
            ended[status_of(reason)][str(reason)] = count
        return Ledger(sum(ended["kept"].values()), ended["rejected"], ended["deferred"])


def _balanced(data: Any, parse: Callable[[Any], Ledger]) -> Ledger:
    """Returns the ledger of a record. Raises ValueError when its counts do not add up to its rows."""
    ledger = parse(data)
    if isinstance(data, dict) and ledger.rows != data.get("rows"):
        raise ValueError(f"ledger does not balance: {ledger.rows} rows counted, {data.get('rows')!r:.30} recorded")
    return ledger


StoredLedger = Annotated[Ledger, WrapValidator(_balanced), PlainSerializer(Ledger.as_json)]
"""A ledger as a record holds it: with the number of its rows, so that a reader can check the balance."""
