"""What the report says to do about models whose claims do not hold."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.project import remember_config
from pipeline.config import load_config, resolved_values
from pipeline.graph.artifacts import Artifact
from pipeline.report.document import document
from pipeline.report.inputs import ReportInput
from pipeline.report.longer import train_longer
from pipeline.report.page import render
from pipeline.store import FolderStore
from pipeline.store.records import put_blob
from tests.chain import write_config
from tests.pipeline.data.bench import picture, write_listed
from tests.pipeline.report.made_up import config, figure, graph, judged

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
COMMAND = "unclip run out/shapes/run.yaml decoder.samples=4000"


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
    found = train_longer(given, "out/shapes")
    assert len(found) == len(says)
    assert all(line.startswith(said) for line, said in zip(found, says, strict=True))


def test_the_command_can_be_pasted_and_trains_as_much_longer_as_it_says(
    store: FolderStore, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever overrides the run had: ``scale`` counted for the samples that they name."""
    monkeypatch.chdir(tmp_path)
    file = write_config(
        tmp_path, "store", "127.0.0.1:1", [Path(write_listed(tmp_path, [picture(i) for i in range(6)]))]
    )
    words = ["scale=0.5", "decoder.samples=2000", "decoder.decay=200", "clip.seed=5", "run.budget_hours=7"]
    config = load_config(file, [*words, "run.output=out/my shapes"])
    assert (config.decoder.samples, config.decoder.decay) == (1000, 100)
    remember_config(config)
    given = ReportInput(store, with_losses(store, made, (1.0, 0.8, 0.5, 0.45), decay=100))
    (said,) = train_longer(given, config.run.output)
    command = re.search("train it longer: (.*), about 5 min 00 s more", said)
    assert command
    unclip, run, *asked = shlex.split(command[1])
    assert (unclip, run) == ("unclip", "run")
    assert main(["plan", *asked]) == 0
    longer = load_config(asked[0], asked[1:])
    assert (longer.decoder.samples, longer.decoder.decay) == (4000, 400)
    assert resolved_values(longer) | {"decoder": {}} == resolved_values(config) | {"decoder": {}}
    assert longer.run == replace(config.run, output=str(tmp_path / "out/my shapes"))


def test_page_and_twin_say_it_and_survive_a_journal_that_is_gone(store: FolderStore, made: Made) -> None:
    failing = with_losses(store, made, (1.0, 0.8, 0.5, 0.45))
    given = ReportInput(store, failing)
    assert COMMAND in render(given, config(), graph())
    assert COMMAND in json.loads(document(given, config(), graph()))["train_longer"][0]
    assert train_longer(ReportInput(store, {}), "out/shapes") == []
    lost = replace(failing["decoder"], blobs={"metrics.jsonl": "0" * 64})
    page = render(ReportInput(store, failing | {"decoder": lost}), config(), graph())
    assert "What to train longer cannot be shown" in page
    assert "claims hold on held-out rows" in page
