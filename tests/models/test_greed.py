"""Configurations of networks far larger than the weights beside them: refused before anything is built."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.clip import Clip
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.folder import save_model
from models.image_configs import DecoderConfig
from models.interchange import export_prior
from models.prior_configs import DiffusionPriorConfig
from tests.models import karlo
from tests.models.clip_folders import VIT

DECODER = DecoderConfig(
    image_size=16, channels=32, depth=1, multipliers=(1, 2), head_channels=32, attention_resolutions=(8,),
    text_context=4, text_width=32, text_depth=1, text_heads=1,
)  # fmt: skip
LARGER = "describes a larger model: fetch both again"
OTHER = f"{LARGER}|does not fit: .* are unknown"  # of diffusers' folders, whose weights are named by the configuration


def clip(**changes: Any) -> dict[str, Any]:
    return {"open_clip_config.json": {"model_cfg": changes}}


def parts(changes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {f"{name}/config.json": changes for name in names}


BOTH = ("super_res_first", "super_res_last")
GREEDY: list[tuple[str, str, dict[str, Any], str]] = [  # how and from where it is loaded, what files say, the refusal
    ("clip", "clip", clip(vision_cfg={"width": 8192, "layers": 48}), LARGER),
    ("clip", "clip", clip(vision_cfg={"layers": 10**7}), LARGER),
    ("clip", "clip", clip(vision_cfg={"image_size": 2048, "patch_size": 1, "width": 8192}), LARGER),
    ("clip", "clip", clip(text_cfg={"width": 8192, "layers": 48}), LARGER),
    ("clip", "clip", clip(text_cfg={"layers": 10**7}), LARGER),
    ("clip", "clip", clip(embed_dim=10**7), LARGER),
    ("model", "decoder", {"config.json": {"config": {"depth": 10**7}}}, LARGER),
    ("model", "decoder", {"config.json": {"config": {"channels": 2**20}}}, LARGER),
    ("model", "decoder", {"config.json": {"config": {"text_depth": 10**7}}}, LARGER),
    ("import_decoder", "karlo", parts({"layers_per_block": 10**7}, "decoder"), OTHER),
    ("import_decoder", "karlo", parts({"block_out_channels": [2**17, 2**18]}, "decoder")
     | parts({"time_embed_dim": 2**19}, "text_proj"), OTHER),
    ("import_decoder", "karlo", parts({"block_out_channels": [2**60, 2**61]}, "decoder")
     | parts({"time_embed_dim": 2**62}, "text_proj"), OTHER),
    ("import_decoder", "karlo", parts({"num_hidden_layers": 10**7}, "text_encoder"), OTHER),
    ("import_decoder", "karlo", parts({"vocab_size": 2**40}, "text_encoder"), OTHER),
    ("import_prior", "karlo", parts({"num_layers": 10**7}, "prior"), OTHER),
    ("import_prior", "karlo", parts({"num_attention_heads": 2**20}, "prior"), OTHER),
    ("import_prior", "karlo", parts({"num_hidden_layers": 10**7}, "text_encoder"), OTHER),
    ("import_prior", "karlo", parts({"vocab_size": 2**26}, "text_encoder"), OTHER),
    ("import_upsampler", "karlo", parts({"layers_per_block": 10**7}, *BOTH), OTHER),
    ("import_upsampler", "karlo", parts({"block_out_channels": [2**17, 2**18]}, *BOTH), OTHER),
    # A prior's own table of tokens: no other file says how large that is.
    ("import_prior", "exported", parts({"config": {"vocabulary": 2**26}}, "ours/prior"), OTHER),
]  # fmt: skip
LOAD = """
import json, sys
from benchmarks.timing import memory_of
from models import interchange
from models.clip import Clip
from models.folder import load_model

loads = vars(interchange) | {"clip": Clip.from_folder, "model": load_model}
seen = set()
for name, small, folder in json.load(sys.stdin):
    if (name, small) not in seen:
        loads[name](small)  # what libraries take
        seen.add((name, small))

    def refused():
        try:
            loads[name](folder)
        except ValueError as error:
            said.append(str(error))

    said = []
    print(json.dumps([memory_of(refused), *said]))
"""


def merged(document: Any, change: Any) -> Any:
    """A document of JSON in which some fields say something else."""
    if not isinstance(change, dict):
        return change
    return document | {name: merged(document.get(name), value) for name, value in change.items()}


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_configuration_takes_no_more_than_the_weights_beside_it(karlo_folder: Path, tmp_path: Path) -> None:
    """A folder of 13 MB could take 38 GB, or time without end. A fresh process knows what it takes, and an old one has
    room that is not counted."""
    Clip.build(VIT, seed=0).save(tmp_path / "clip")
    save_model(tmp_path / "decoder", Decoder(DECODER, embed_dim=32))
    shutil.copytree(karlo_folder, tmp_path / "karlo")
    export_prior(DiffusionPrior(DiffusionPriorConfig(width=32, depth=1, heads=2), karlo.DIM), tmp_path / "exported")
    asked = []
    for number, (load, small, changes, _) in enumerate(GREEDY):
        folder = Path(shutil.copytree(tmp_path / small, tmp_path / str(number), copy_function=os.link))
        for file, change in changes.items():
            document = json.loads((folder / file).read_text())
            (folder / file).unlink()  # the link, and not what it shares with the other folders
            (folder / file).write_text(json.dumps(merged(document, change)))
        asked.append((load, str(tmp_path / small), str(folder)))
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=json.dumps(asked), capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (load, _, changes, refusal), line in zip(GREEDY, done.stdout.splitlines(), strict=True):
        taken, said = json.loads(line)
        assert re.search(refusal, said), (load, changes)
        assert "\n" not in said
        assert taken < 100 << 20, (load, changes)
