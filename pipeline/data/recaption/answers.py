"""Workers that ask for the captions of a part of a shard, and that join the answers with the list's captions."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.data.pairs.decoding import read_pair_pixels
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.recaption.endpoint import FAULTS, CaptionAnswer, Endpoint
from pipeline.data.recaption.recipe import PART, RecaptionRecipe, RecaptionSettings
from pipeline.data.source.cutter import has_caption
from pipeline.data.source.rows import MADE, read_captions
from pipeline.data.source.stage import CAPTIONED
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import ShardRow, read_table, write_table
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.progress import Steps
from pipeline.store import Store

QUALITY = 90  # of the JPEG that is sent
SENT = ("prompt_tokens", "answer_tokens")
ANSWERS = pa.schema({name: pa.string() for name in ("key", "sha256", "caption", "reason")}.items())
log = logging.getLogger("unclip")


def pictured_rows(store: Store, pairs: ShardRow, part: int | None = None) -> list[dict[str, Any]]:
    """Returns the index rows of kept images of a shard of pairs, or of one part of its rows, in order."""
    index = read_table(store, pairs.blobs["index"])
    if part is not None:
        index = index.slice(part * PART, PART)
    return [row for row in index.to_pylist() if row["status"] == "kept" and row["size"] is not None]


def sent_jpeg(place: Place, data: bytes, side: int) -> bytes:
    """Returns the stored image of a row as it is sent: a JPEG whose longest side is at most ``side`` pixels."""
    image = Image.fromarray(read_pair_pixels(place.key, data, None, in_place=place.in_place))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


class Captioner:
    """Asks for the captions of the images of one part, as many at once as the settings say, over all parts.

    The first request shows that the endpoint answers at all. Raises UserError where it does not.

    Args:
        store: Store of the images.
        recipe: Recipe of the captions.
        settings: Endpoint and pace.
    """

    def __init__(self, store: Store, recipe: RecaptionRecipe, settings: RecaptionSettings):
        self._store, self._recipe = store, recipe
        self._endpoint = Endpoint(recipe, settings)
        out = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(out, "JPEG")
        self._endpoint.check(out.getvalue())
        self._threads = ThreadPoolExecutor(settings.concurrency, "ask")

    def __call__(self, task: ShardTask) -> ShardOutput:
        """Makes the "answers" of a part: key, sha256 of the stored image, caption, and the reason where it is null.

        Answers of an "earlier" shard for the same images are taken over, unless the server was at fault.
        """
        steps = Steps()
        with steps("read"):
            pairs = task.inputs["pairs"]
            rows = pictured_rows(self._store, pairs, task.inputs["part"].number)
            known = self._known(task.inputs.get("earlier"))
            unknown = [row for row in rows if (row["key"], row["sha256"]) not in known]
            places = [Place.of(row, pairs.blobs.get("images")) for row in unknown]
            images = read_images(self._store, places)
        with steps("ask"):
            asked = list(self._threads.map(self._ask, places, images))
        found = known | {(place.key, place.sha256): answer for place, answer in zip(places, asked, strict=True)}
        answers = [found[row["key"], row["sha256"]] for row in rows]
        columns = [
            {"key": row["key"], "sha256": row["sha256"], "caption": answer.caption, "reason": answer.reason}
            for row, answer in zip(rows, answers, strict=True)
        ]
        counts = {"asked": len(asked), **{name: sum(getattr(answer, name) for answer in asked) for name in SENT}}
        ledger = Ledger.count(answer.reason for answer in answers)
        blobs = {"answers": write_table(pa.Table.from_pylist(columns, ANSWERS))}
        return ShardOutput(ledger, blobs, counts, steps.seconds)

    def _ask(self, place: Place, data: bytes) -> CaptionAnswer:
        return self._endpoint.ask(sent_jpeg(place, data, self._recipe.image_size))

    def _known(self, earlier: ShardRow | None) -> dict[tuple[str, str], CaptionAnswer]:
        if earlier is None:
            return {}
        try:
            rows = read_table(self._store, earlier.blobs["answers"]).to_pylist()
        except CorruptObject as e:
            log.warning(
                "recaption: captions of shard %08d are requested again, because the earlier run's are damaged: %s",
                earlier.number,
                e,
            )
            return {}
        kept = (row for row in rows if row["reason"] not in FAULTS)
        return {(row["key"], row["sha256"]): CaptionAnswer(row["caption"], row["reason"]) for row in kept}


@dataclass(frozen=True)
class CaptionJoin:
    """Puts the made caption of each row of a shard before those of the list."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        """Makes the "captions" of a shard, as the list's: key and captions, and whether the first one was made.

        The "answers" of all its parts are kept beside them, for later runs.
        """
        if "parts" not in task.inputs:
            raise UserError(f"recaption: shard {task.number} disappeared from the store during the run; run again")
        parts = [shard for name, shard in task.inputs.items() if name.startswith("part ")]
        tables = [read_table(self.store, part.blobs["answers"]) for part in parts]
        answers = pa.concat_tables([ANSWERS.empty_table(), *tables])
        made = {row["key"]: row["caption"] for row in answers.to_pylist() if row["caption"] is not None}
        listed = read_captions(self.store, task.inputs["captions"])
        captions = {key: [*([made[key]] if key in made else []), *own] for key, own in listed.items()}
        columns = {
            "key": pa.array(captions, pa.string()),
            "captions": pa.array(captions.values(), pa.list_(pa.string())),
            MADE: pa.array([key in made for key in captions], pa.bool_()),
        }
        counts = {CAPTIONED: sum(map(has_caption, captions.values())), MADE: len(made)}
        counts |= sums(part.counts for part in parts)
        counts |= {f"no {reason}": n for reason, n in Counter(filter(None, answers["reason"].to_pylist())).items()}
        blobs = {"captions": write_table(columns), "answers": write_table(answers)}
        return ShardOutput(Ledger(kept=len(captions)), blobs, counts)


def sums(counts: Sequence[Mapping[str, int]] | Any) -> dict[str, int]:
    """Returns the sums of counts by name."""
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(total)
