"""``unclip init``: models for which images are too small are left out, by what is measured or by what the list says."""

from pathlib import Path

import pytest

from models.sampling_config import MODELS as ALL_MODELS
from pipeline.config import load_config
from tests.jobs.test_init import Output, made, table
from tests.pipeline.data.bench import picture

MODELS = tuple(model for model in ALL_MODELS if model != "ar_prior")  # which a new project trains


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("side", "size", "models"), [(72, 64, MODELS[:2]), (300, 256, MODELS[:3]), (1024, 1024, MODELS)]
)
def test_models_that_no_picture_is_large_enough_for_are_left_out(side: int, size: int, models: tuple) -> None:
    Path("pictures").mkdir()
    for i, scale in enumerate((1, 2)):
        Path(f"pictures/{i}.jpg").write_bytes(picture(i, 2 * side, side // scale, kind="JPEG"))
        Path(f"pictures/{i}.txt").write_text("a cat")
    config = made("mine", "pictures")
    assert (config.bundle.models, config.bundle.sampling.size) == (models, size)
    text = Path("mine.yaml").read_text()
    assert f"first 2 images {int(side >= 1024)} have a short side of 1024 px or more" in text


@pytest.mark.parametrize(
    ("sides", "size", "models", "counts"),
    [
        (["300", 1023.0, "nan", None], 256, MODELS[:3], "first 2 images 0 have a short side of 1024 px or more, 2 of"),
        ([300] * 200 + [2000], 256, MODELS[:3], "first 201 images 1 have"),
        ([300] * 90 + [2000], 1024, MODELS, "first 91 images 1 have"),
        ([100, 200], 64, MODELS[:2], "0 of 256 px, 2 of 64 px"),
    ],
)
@pytest.mark.parametrize("names", [("WIDTH", "HEIGHT"), ("original_width", "original_height")])
def test_sizes_that_a_list_states_decide_of_images_on_the_web(
    names: tuple, sides: list, size: int, models: tuple, counts: str, capsys: Output
) -> None:
    rows = [f"http://closed.test/{i}.png,a cat,{side},{2 * float(side or 1)}\n" for i, side in enumerate(sides)]
    Path("laion.csv").write_text(f"URL,TEXT,{','.join(names)}\n" + "".join(rows))
    config = made("mine", "laion.csv")
    assert (config.bundle.models, config.bundle.sampling.size) == (models, size)
    assert counts in Path("mine.yaml").read_text()
    left_out = (
        f"bundle.models leaves {' and '.join(MODELS[len(models) :])} out, and samples have {size} px: Of the first"
    )
    output = capsys.readouterr().out
    assert (left_out in output) == (models != MODELS)
    assert ", as the list says." in output or models == MODELS


def test_where_no_size_is_known_it_says_how_to_leave_a_model_out(capsys: Output) -> None:
    config = made("mine", table("parquet"))
    assert config.bundle.models == MODELS
    line = next(line for line in capsys.readouterr().out.splitlines() if "images are measured once" in line)
    config = load_config("mine.yaml", line.split()[-2:])
    assert (config.bundle.models, config.bundle.sampling.size) == (MODELS[:3], 256)
