"""The model card is one that hubs read, counts what models were trained on, and says what was measured."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from pipeline.graph.artifacts import Artifact, Shard, publish_artifact, write_shard_table, write_table
from pipeline.ledger import Ledger
from pipeline.release.card import model_card
from pipeline.store import Store
from pipeline.store.records import blob_path, put_blob
from tests.pipeline.report.made_up import chain

PATHS = ["/home/ana/secret/pairs.csv", "hf://datasets/ana/cats@0123/data", "hf://datasets/ana/cats"]
SPLITS = ["train", "train", "test", "train", "validation", "train"]
LICENCES = ["CC0-1.0", "<b>|\n# x", "held out", "CC0-1.0", "held out", None]


@pytest.fixture
def made(store: Store) -> dict[str, Artifact]:
    """Artefacts of which a bundle is made, in a store, with an evaluation of it."""
    made = chain(store)
    shards = []
    for number in range(2):
        rows = {"split": SPLITS[number::2], "license": LICENCES[number::2]}
        shards.append(Shard(number, f"shard{number}", Ledger(3), {"index": put_blob(store, write_table(rows))}))
    table, ledger = write_shard_table(store, shards)
    made["curation"] = replace(made["curation"], key="a" * 64, shard_table=table, ledger=ledger)
    made["source"] = replace(made["source"], key="s" * 64, recipe={"paths": PATHS})
    made["clip"] = replace(made["clip"], key="c" * 64, recipe={"weights": "local-dir:/home/ana/clip-b32"})
    made["decoder"] = replace(made["decoder"], key="d" * 64, recipe={"init_from": "e" * 64})
    inputs = {name: made[name].key for name in ("source", "clip", "curation", "decoder")}
    blobs = {"README.md": put_blob(store, b"# shapes\n\nAn unCLIP text-to-image model.\n")}
    made["bundle"] = Artifact("bundle", "b" * 64, inputs, {}, Ledger(), blobs)
    made["evaluation"] = replace(made["evaluation"], key="f" * 64, inputs={"bundle": "b" * 64})
    for name in ("source", "clip", "curation", "decoder", "bundle", "evaluation"):
        made[name] = publish_artifact(store, replace(made[name], times={}), 0.0)
    return made


def test_a_hub_reads_it(store: Store, made: dict[str, Artifact]) -> None:
    card = ModelCard(model_card(store, made["bundle"]))
    assert card.data.to_dict() == {
        "license": "unknown",
        "pipeline_tag": "text-to-image",
        "tags": ["unclip", "unclip-ray", "text-to-image"],
        "datasets": ["ana/cats"],
    }
    assert card.text.strip().startswith("# shapes\n\nAn unCLIP text-to-image model.\n")


def test_it_counts_training_rows_by_licence(store: Store, made: dict[str, Artifact]) -> None:
    card = model_card(store, made["bundle"])
    assert "| test | 1 |\n| train | 4 |\n| validation | 1 |\n" in card
    assert "| CC0-1.0 | 2 |\n| &lt;b&gt;\\| \\# x | 1 |\n| none named | 1 |\n" in card
    assert "held out" not in card
    assert "Its CLIP is clip-b32, which was trained on other data." in card
    assert "Fine-tuned from another model's weights: decoder." in card
    assert "/home" not in card


def test_it_names_lists_and_what_was_left_out_as_a_data_card_does(store: Store, made: dict[str, Artifact]) -> None:
    lost = replace(made["curation"], key="9" * 64, ledger=Ledger(6, {"low_similarity": 2, "near_duplicate": 1}))
    lost = publish_artifact(store, replace(lost, times={}), 0.0)
    inputs = {**made["bundle"].inputs, "curation": lost.key}
    card = model_card(
        store, publish_artifact(store, replace(made["bundle"], key="8" * 64, inputs=inputs, times={}), 0.0)
    )
    assert "\nLists: pairs.csv, data, cats.\n" in card
    assert "| curation | 6 | 2 low_similarity: " in card
    assert "| curation | 6 | 1 near_duplicate: " in card


def test_it_says_which_claims_held(store: Store, made: dict[str, Artifact]) -> None:
    card = model_card(store, made["bundle"])
    assert "\n1 of 2 claims hold on held-out rows, 1 not measured.\n" in card
    assert "| It draws. | does not hold | top 0.82 (0.12); pot 0.4 (0.2) |\n" in card
    assert "| It listens. | holds | decoder 0.52 (0.5) |\n| It enlarges. | not measured | too few rows |\n" in card
    other = publish_artifact(store, replace(made["bundle"], key="0" * 64, times={}), 0.0)
    assert "Not evaluated yet: `unclip run` ends with an evaluation." in model_card(store, other)


def test_rows_that_the_store_has_no_longer_are_not_counted(store: Store, made: dict[str, Artifact]) -> None:
    assert made["curation"].shard_table
    store.delete([blob_path(made["curation"].shard_table)])
    card = model_card(store, made["bundle"])
    assert "no longer has its row counts" in card
    assert "| train |" not in card
    assert "| It listens. | holds |" in card
