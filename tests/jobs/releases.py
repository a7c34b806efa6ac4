"""A project whose artefacts are made up, for the tests of what is done with a release."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.cli import main
from jobs.project import open_project
from models.sampling_config import MODELS
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.keys import flatten
from pipeline.held_out import too_few
from pipeline.ledger import Ledger
from pipeline.release.pointer import Releases, read_releases
from pipeline.store import Store
from pipeline.store.records import put_blob

ROWS = 12
FEW = too_few(1, "test")
LATER, OTHER = ("--set", "decoder.weight_decay=0.02"), "decoder.weight_decay=0.02"
DATA = ("source", "captions", "pairs", "embeddings", "curation")


@dataclass(frozen=True)
class Made:
    """A project whose artefacts are made up under the keys that its plan has."""

    path: Path
    store: Store
    output: pytest.CaptureFixture[str]

    def make(self, gain: float, *overrides: str, holds: bool | None = True, version: int = 4) -> str:
        """Publish what a run would, whose decoder is ``gain`` better than at first; return the bundle's key."""
        project = open_project(str(self.path), overrides)
        verdicts = project.plan()
        keys = {verdict.stage: verdict.key for verdict in verdicts}
        values = np.random.default_rng(0).normal(0.5, 0.2, ROWS) + gain
        figure: dict[str, Any] = {"model": "decoder", "name": "top", "says": "top", "better": "above", "claim": "draws"}
        figure["text"] = "It draws."
        figure |= {"note": FEW if holds is None else "", "values": None if holds is None else list(values)}
        figure |= {"holds": holds, "groups": list(range(ROWS))}
        for stage in (project.graph[verdict.stage] for verdict in verdicts if verdict.state == "stale"):
            blobs = {}
            if stage.name == "evaluation":
                document = {
                    "version": version,
                    "recipe": flatten(stage.recipe),
                    "rows": {"decoder": {"split": "test", "keys": [str(i) for i in range(ROWS)], "captions": "c"}},
                    "figures": [figure],
                }
                blobs = {"evaluation.json": put_blob(self.store, json.dumps(document).encode())}
            if stage.name == "bundle":
                blobs = {f"{m}/model.safetensors": put_blob(self.store, f"{m} {gain}".encode()) for m in MODELS}
            kept, table = Ledger(), None
            if stage.name in DATA:
                kept = Ledger(kept=sum(s.ledger.kept for s in project.scan.shards))
                table = put_blob(self.store, b"not read")
            inputs = {name: keys[name] for name in stage.inputs}
            made = Artifact(stage.name, keys[stage.name], inputs, flatten(stage.recipe), kept, blobs, table)
            publish_artifact(self.store, made, 0.0)
        return keys["bundle"]

    def release(self, command: str, *words: str, code: int = 0) -> str:
        """Run the command, which must end so, and return what it printed."""
        self.output.readouterr()
        ended = main(["release", command, str(self.path), *words])
        printed, said = self.output.readouterr()
        assert ended == code, printed + said
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == (1 if code else 0)
        return printed + said

    def artifacts(self, *overrides: str) -> dict[str, Artifact]:
        """All that is made, by stage."""
        return open_project(str(self.path), overrides).finished()

    @property
    def releases(self) -> Releases:
        return read_releases(self.store, "p")

    @property
    def current(self) -> str:
        assert self.releases.current is not None
        return self.releases.current.bundle


def project_in(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Made:
    lines = [f"http://closed.test/{i}.png,picture {i}" for i in range(ROWS)]
    (tmp_path / "list.csv").write_text("\n".join(["url,caption", *lines]) + "\n")
    values = {"project": "p", "preset": "nano", "store": store.url, "source": {"paths": [str(tmp_path / "list.csv")]}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    return Made(tmp_path / "p.yaml", store, capsys)
