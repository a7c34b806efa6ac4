"""What the report says to do about models whose claims do not hold."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.report.document import document
from pipeline.report.inputs import ReportInput
from pipeline.report.longer import train_longer
from pipeline.report.page import render
from pipeline.store import FolderStore
from pipeline.store.records import put_blob
from tests.pipeline.report.made_up import config, graph
from tests.pipeline.report.test_summary import figure, judged

Made = dict[str, Artifact]
STEPS = (250, 500, 750, 1000)  # samples


def with_losses(store: FolderStore, made: Made, losses: Sequence[float], decay: int = 0, pace: float = 10.0) -> Made:
    """The chain with these validation losses of a decoder that failed, after equal numbers of samples."""
    lines = [json.dumps({"samples": n, "validation_loss": loss}) for n, loss in zip(STEPS, losses, strict=False)]
    blob = put_blob(store, "\n".join(lines).encode())
    times = {"samples_per_second": pace} if pace else {}
    recipe = {"samples": 1000, "decay": decay}
    decoder = made["decoder"]
    changed = replace(decoder, blobs={**decoder.blobs, "metrics.jsonl": blob}, recipe=recipe, times=times)
    return judged(made, figure(False), figure(True, model="clip")) | {"decoder": changed}


FELL = "decoder: its validation loss still fell, by 10% over the last quarter; train it longer: "
COMMAND = "unclip run shapes.yaml decoder.samples=4000"


@pytest.mark.parametrize(
    ("losses", "decay", "pace", "says"),
    [
        ((1.0, 0.8, 0.5, 0.45), 0, 10.0, [f"{FELL}{COMMAND}, about 5 min 00 s more."]),
        ((1.0, 0.8, 0.5, 0.45), 0, 0.0, [f"{FELL}{COMMAND}."]),
        ((1.0, 0.8, 0.5, 0.5), 0, 10.0, ["decoder: its validation loss has levelled off; more pairs or a larger"]),
        # What it falls while the rate falls says nothing of further samples.
        ((1.0, 0.5, 0.502, 0.1), 250, 10.0, ["decoder: its validation loss has levelled off; more pairs or a larger"]),
        ((1.0, 0.8, 0.5, 0.6), 0, 10.0, ["decoder: its validation loss rises; more pairs or dropout help"]),
        ((1.0, 0.8), 0, 10.0, []),
        ((1.0, 0.8, 0.0, 0.1), 0, 10.0, []),
    ],
)
def test_a_model_that_fails_is_told_whether_to_train_longer(
    store: FolderStore, made: Made, losses: Sequence[float], decay: int, pace: float, says: list[str]
) -> None:
    given = ReportInput(store, with_losses(store, made, losses, decay, pace))
    found = train_longer(given, "shapes")
    assert len(found) == len(says)
    assert all(line.startswith(said) for line, said in zip(found, says, strict=True))


def test_page_and_twin_say_it_and_survive_a_journal_that_is_gone(store: FolderStore, made: Made) -> None:
    failing = with_losses(store, made, (1.0, 0.8, 0.5, 0.45))
    given = ReportInput(store, failing)
    assert COMMAND in render(given, config(), graph())
    assert COMMAND in json.loads(document(given, config(), graph()))["train_longer"][0]
    assert train_longer(ReportInput(store, {}), "shapes") == []
    lost = replace(failing["decoder"], blobs={"metrics.jsonl": "0" * 64})
    page = render(ReportInput(store, failing | {"decoder": lost}), config(), graph())
    assert "What to train longer cannot be shown" in page
    assert "claims hold on held-out rows" in page
