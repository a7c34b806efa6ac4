"""The model card of a bundle: what it was trained on, on what terms, which claims held, and what to know before use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial

from pipeline.data.card import (
    CARD,
    choice,
    count_licence,
    front_matter,
    licence_table,
    markdown_table,
    origin,
    plain_cell,
)
from pipeline.errors import CorruptObject
from pipeline.evaluate.figure import Json, by_claim, count, holds, short
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table
from pipeline.progress import Progress
from pipeline.release.compare import evaluations
from pipeline.release.diff import stages_behind
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import read_blob

THREADS = 4
ON_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
HELD = {True: "holds", False: "does not hold", None: "not measured"}
USE = """\
## How to use it

    unclip sample "a caption" --from FOLDER

```python
import unclip

unclip.load("FOLDER").generate("a caption").save("image.png")
```

It knows the words and objects of its training captions; `sampling.json` holds its sampling defaults.
"""
LIMITS = """\
## Limitations

Nobody has reviewed every training image. Errors, biases, people and trademarks in the sources can appear in generated
images, and a generated image may closely resemble a training image. Curation filters content only by the scores that
its recipe bounds (`min_score`, `max_score`). Nothing beyond the claims above has been evaluated. The publisher of the
weights chooses their licence, subject to the licences above: replace `unknown` with it.
"""


def model_card(store: Store, bundle: Artifact) -> str:
    """Returns the card as Markdown, with the metadata that a hub of models reads at its head.

    It begins with the card in the bundle, which is older than any evaluation of it. Rows that the store no longer has
    are not counted.
    """
    behind = stages_behind(store, bundle)
    paths = behind["source"].recipe.get("paths", []) if "source" in behind else []
    datasets = dict.fromkeys(found[1] for path in paths if (found := ON_HUB.match(path)))
    lines = front_matter(
        license="unknown",
        pipeline_tag="text-to-image",
        tags=["unclip", "unclip-ray", "text-to-image"],
        **({"datasets": list(datasets)} if datasets else {}),
    )
    if CARD in bundle.blobs:
        lines += [read_blob(store, bundle.blobs[CARD]).decode(errors="replace")]
    judging = {name: made for name, made in reversed(behind.items()) if made.ledger.lost}  # from the source on
    lines += [USE, "## Training data", "", *origin(paths), *_data(store, behind), *choice(judging)]
    lines += [*_claims(store, bundle), LIMITS]
    return "\n".join(lines)


def _data(store: Store, behind: Mapping[str, Artifact]) -> list[str]:
    """Returns lines about the rows behind the models, and about models that were there before them."""
    splits, licences = Counter[str](), Counter[str | None]()
    try:
        shards = read_shards(store, behind["curation"]) if "curation" in behind else []
        with Progress("model card", sum(shard.kept for shard in shards), "rows") as progress:
            for rows in ordered_map(partial(_rights, store), shards, THREADS):
                for (split, licence), many in rows.items():
                    splits[split] += many
                    if split == "train":
                        count_licence(licences, licence, many)
                progress.advance(rows.total())
    except CorruptObject:  # such as rows that were collected since
        splits.clear()
    if splits:
        lines = ["Rows kept by curation; the models were trained only on the split `train`:", ""]
        lines += [
            *markdown_table(("split", "rows"), sorted(splits.items())),
            "Licences of the training rows:",
            "",
            *licence_table(licences),
        ]
    else:
        lines = ["The store that it was exported from no longer has its row counts.", ""]
    weights = behind["clip"].recipe.get("weights", "train") if "clip" in behind else "train"
    if weights != "train":
        name = plain_cell(weights.rpartition("/")[2].removeprefix("local-dir:"))
        lines += [f"Its CLIP is {name}, which was trained on other data.", ""]
    if begun := [name for name, made in behind.items() if made.recipe.get("init_from")]:
        lines += [f"Fine-tuned from another model's weights: {', '.join(sorted(begun))}.", ""]
    return lines


def _rights(store: Store, shard: ShardRow) -> Counter[tuple[str, str | None]]:
    """Returns the rows of a shard by split and licence. Raises CorruptObject."""
    table = read_table(store, shard.blobs["index"], ["split", "license"])
    return Counter(zip(table["split"].to_pylist(), table["license"].to_pylist(), strict=True))


def _claims(store: Store, bundle: Artifact) -> list[str]:
    """Returns lines about the newest evaluation."""
    found = evaluations(store, bundle.key)
    if not found:
        return ["## Evaluation", "", "Not evaluated yet: `unclip run` ends with an evaluation.", ""]
    figures = found[0].document["figures"]
    rows = [(plain_cell(each[0]["text"]), HELD[holds(each)], _numbers(each)) for each in by_claim(figures)]
    heads = ("claim", "outcome", "value (baseline)")
    return ["## Evaluation", "", f"{count(figures)}.", "", *markdown_table(heads, rows)]


def _numbers(claim: list[Json]) -> str:
    known = [each for each in claim if each["holds"] is not None]
    said = [f"{plain_cell(each['says'])} {short(each['value'])} ({short(each['baseline'])})" for each in known]
    return "; ".join(said or dict.fromkeys(plain_cell(each["note"]) for each in claim))
