"""The curl commands of the page, as they stand."""

import re
import subprocess
from pathlib import Path

from PIL import Image

from tests.chain import ROOT


def test_the_commands_of_the_page_run_as_they_stand(served: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/serve.md").read_text()
    (script,) = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    script = "set -euo pipefail\n" + script.replace("http://127.0.0.1:8000", served)
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    made = {file.name: Image.open(file).size for file in tmp_path.glob("*.png") if file.name != "mask.png"}
    assert made == {"heart.png": (64, 64), "other.png": (64, 64), "edited.png": (64, 64)}
    assert ended.stdout.count("event: image_generation.partial_image") == 1
    assert ended.stdout.count("event: image_generation.completed") == 1
