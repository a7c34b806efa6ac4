"""Captions that a vision model makes of the stored images, part by part of every shard.

They stand for the captions of the list: a row that got one has it first, before its own. A finished part is stored at
once, so what was paid for is not asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.data.recaption.recipe import PART, RecaptionRecipe, RecaptionSettings
from pipeline.data.source.rows import MADE, MADE_SHARE
from pipeline.data.source.stage import CAPTIONED
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, Shard, ShardRow, load_artifact, read_shards, read_table, shard_path
from pipeline.graph.runs import last_made
from pipeline.graph.shards import map_shards, run_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardTask
from pipeline.progress import counted
from pipeline.store import Store
from pipeline.store.records import digest

# For the plan, as nothing is known of a model's tokenizer: pixels on a side of a patch that is one token (Qwen2-VL),
# characters of a token, and tokens of a caption of 50 words.
PATCH, CHARACTERS, ANSWER_TOKENS = 28, 4, 70
EXAMPLES = 8  # images of the report
NO_CHANGE = ("coverage", "share")  # fields of the recipe that change no answer


def run_recaption(ctx: Context) -> Artifact:
    """Asks for the captions that are missing, then joins all with those of the list.

    Raises:
        UserError: The budget of the run is spent, or the endpoint answers nothing.
    """
    from pipeline.data.recaption.answers import Captioner, CaptionJoin

    plain = {name: getattr(RecaptionRecipe, name) for name in NO_CHANGE}
    asking = replace(ctx, recipe=replace(ctx.recipe, **plain))  # under whose keys answers are stored
    captions = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["captions"])}
    earlier = _earlier(ctx)
    there = {entry.path for entry in ctx.store.list(f"shards/{ctx.stage}/")}
    joins: list[ShardTask] = []
    parts: dict[tuple[int, int], ShardTask] = {}  # by shard and part
    images = 0.0
    for pairs in read_shards(ctx.store, ctx.inputs["pairs"]):
        number = pairs.number
        own = {"captions": captions[number], "pairs": pairs}
        count = -(-(pairs.kept + pairs.lost) // PART)
        chosen = [part for part in range(count) if _place(number, part) < ctx.recipe.coverage]
        key = shard_key(asking, {"parts": digest(chosen)} | {name: shard.key for name, shard in own.items()})
        if shard_path(ctx.stage, key) not in there:
            given = {"pairs": pairs, **({"earlier": earlier[number]} if number in earlier else {})}
            for part in chosen:
                inputs = {**given, "part": ShardRow(part, str(part), 0, 0, {}, {})}
                part_key = shard_key(asking, {"pairs": pairs.key, "part": str(part)})
                parts[number, part] = ShardTask(number, part_key, inputs)
            images += pairs.kept * len(chosen) / max(1, count)
            own["parts"] = ShardRow(len(chosen), digest(chosen), 0, 0, {}, {})
        joins.append(ShardTask(number, key, own))

    # In the order of a draw: what a spent budget has paid for is then a smaller coverage of the whole list.
    order = sorted(parts, key=lambda each: _place(*each))
    missing = [each for each in order if shard_path(ctx.stage, parts[each].key) not in there]
    left = missing[max(1, ctx.settings.budget // PART) :] if ctx.settings.budget else []
    put_off = set(left)
    tasks = [parts[each] for each in order if each not in put_off]
    make = partial(Captioner, ctx.store, ctx.recipe, ctx.settings)
    at_once = 1 + -(-ctx.settings.concurrency // PART)
    amount = round(images * len(tasks) / max(1, len(parts)))
    answered, _ = run_shards(ctx, tasks, make, "images", amount, f"{ctx.stage} answers", at_once)
    if left:
        raise _spent(ctx, round(images * len(left) / len(parts)), _place(*left[0]))

    by_key = {shard.key: ShardRow(shard.number, shard.key, 0, 0, shard.blobs, shard.counts) for shard in answered}
    joined: dict[int, dict[str, ShardRow]] = {}
    for (number, part), task in parts.items():
        joined.setdefault(number, {})[f"part {part}"] = by_key[task.key]
    joins = [replace(join, inputs={**join.inputs, **joined.get(join.number, {})}) for join in joins]
    rows = ctx.inputs["captions"].ledger.rows
    join = partial(CaptionJoin, ctx.store)
    return map_shards(ctx, joins, join, "rows", rows, measure=partial(_measure, ctx.recipe))


def _place(number: int, part: int) -> float:
    """Returns a part's place in a draw of all parts of all lists, in [0, 1), which other rows do not change."""
    return int(digest(["part", number, part])[:12], 16) / 16**12


def _earlier(ctx: Context) -> Mapping[int, ShardRow]:
    """Returns the shards that the last run with the same recipe made, by number; none where they are gone."""
    try:
        made = last_made(ctx, (), besides=NO_CHANGE)
        return {shard.number: shard for shard in read_shards(ctx.store, made[ctx.stage])} if made else {}
    except CorruptObject:
        return {}


def _spent(ctx: Context, left: int, place: float) -> UserError:
    coverage = math.floor(1000 * place) / 1000
    without = f"; recaption.coverage={coverage:g} continues without them" if coverage else ""
    budget = counted(ctx.settings.budget, "image")
    return UserError(
        f"{ctx.stage}: run.recaption.budget of {budget} is spent, and about {left:,} are left: the same command "
        f"requests more{without}"
    )


def _measure(recipe: RecaptionRecipe, shards: Sequence[Shard]) -> dict[str, Any]:
    """Returns how many captions were made and why others were not, tokens, and the share of draws."""
    names = {name for shard in shards for name in shard.counts} - {CAPTIONED}
    total = {name: sum(shard.counts.get(name, 0) for shard in shards) for name in sorted(names)}
    reasons = {name.removeprefix("no "): total.pop(name) for name in sorted(names) if name.startswith("no ")}
    return {**total, "reasons": reasons, MADE_SHARE: recipe.share}


def _warn(stage: Stage, found: Any) -> Iterator[str]:
    """Yields who is sent how many images, and what that costs at most, before it is."""
    recipe, settings = stage.recipe, stage.settings
    images = round(found.rows * recipe.coverage)
    asked = images * (len(recipe.prompt) / CHARACTERS + (recipe.image_size / PATCH) ** 2)
    answered = images * ANSWER_TOKENS
    cost = settings.cost(asked, answered)
    paid = f", some {cost:,.2f} {stage.given}" if cost else ""
    limit = f"; this run asks for {settings.budget:,} at most" if settings.budget else ""
    yield (
        f"{stage.name} sends up to {counted(images, 'image')} to {recipe.model}: roughly {_millions(asked)} tokens in "
        f"and {_millions(answered)} out{paid}{limit}"
    )


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.1f} million" if tokens >= 1e5 else f"{tokens:,.0f}"


def _show(store: Store, made: Artifact) -> dict[str, Any]:
    """Returns counts, tokens and reasons, and images with the list's caption and the made one."""
    metrics = made.metrics
    shown: dict[str, Any] = {"model": made.recipe["model"], "made captions": metrics.get(MADE, 0)}
    shown |= {f"images without one: {reason}": count for reason, count in metrics["reasons"].items()}
    shown |= {"requests": metrics.get("asked", 0), "tokens of requests": metrics.get("prompt_tokens", 0)}
    shown |= {"tokens of answers": metrics.get("answer_tokens", 0)}
    return shown | dict(_examples(store, made))


def _examples(store: Store, made: Artifact) -> Iterator[tuple[str, bytes]]:
    """Yields images, each under its two captions."""
    from pipeline.data.pairs.row_index import Place, read_images
    from pipeline.data.recaption.answers import pictured_rows, sent_jpeg

    pairs = load_artifact(store, "pairs", made.inputs["pairs"])
    index = {shard.number: shard for shard in read_shards(store, pairs)} if pairs else {}
    left = EXAMPLES
    for shard in read_shards(store, made):
        if not left or shard.number not in index:
            return
        table = read_table(store, shard.blobs["captions"]).to_pylist()
        texts = {row["key"]: row["captions"] for row in table if row[MADE]}
        rows = [row for row in pictured_rows(store, index[shard.number]) if row["key"] in texts][:left]
        places = [Place.of(row, index[shard.number].blobs.get("images")) for row in rows]
        for place, data in zip(places, read_images(store, places), strict=True):
            first, *listed = texts[place.key]
            yield f"the list: {listed[0] if listed else 'nothing'}; made: {first}", sent_jpeg(place, data, 512)
        left -= len(rows)


def _fits(stage: Stage, config: Any) -> None:
    most = config.curation.max_caption
    if stage.recipe.model and stage.recipe.max_characters > most:
        raise UserError(
            f"{stage.name}.max_characters: {stage.recipe.max_characters:,} is above curation.max_caption {most:,}, so "
            "rows with longer captions would be rejected afterwards; lower the former or raise the latter"
        )


RECAPTION = Stage(
    "recaption",
    version=1,
    recipe=RecaptionRecipe,
    inputs=("captions", "pairs"),
    run=run_recaption,
    settings=RecaptionSettings,
    stands_for=lambda recipe: "captions" if recipe.model else "",
    on_demand=True,
    fits=_fits,
    given=lambda config: config.run.prices.currency,
    warn=_warn,
    show=_show,
    row_seconds=lambda *_: 0.06,  # two seconds for an answer, 32 at once
    row_bytes=lambda *_: 400,  # a caption, twice
)
