"""Design rule 5: what is held out for the test teaches nothing, in any stage."""

from pathlib import Path

import pytest

from tests.pipeline.data.bench import Bench, Page, picture, serving, write_list

TRAINED = ("codec", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")
SLOW = TRAINED[-2:]  # they are fed as the decoder is
ROWS = 26
SMALL = {"batch": 8, "samples": 16, "lanes": 4, "warmup_steps": 0}
RECIPES = dict.fromkeys(("clip", *TRAINED[1:]), SMALL)
RECIPES["upsampler_1024"] = SMALL | {"samples": 8, "batch": 4}  # the slowest by far


def _split(i: int) -> str:
    return "test" if i % 5 == 2 else "validation" if i % 5 == 4 else "train"


def _side(i: int) -> int:
    return 1024 if i < 6 else 256


def _run(folder: Path, poison: bool) -> Bench:
    """All that trainings begin with, of 26 pictures; with ``poison``, test rows have other pictures and captions."""
    bad = [poison and _split(i) == "test" for i in range(ROWS)]
    pages = {f"/{i}": Page(picture(i + 1000 * bad[i], _side(i), _side(i))) for i in range(ROWS)}
    rows = [(f"http://pictures.test/{i}", f"poison {i}" if bad[i] else f"picture {i}", _split(i)) for i in range(ROWS)]
    folder.mkdir()
    settings = {name: {"threads": 1, "device": "cpu"} for name in RECIPES}
    with serving(pages) as address:
        fetch = {"workers": 0, "hosts": {"pictures.test": address}}
        path = write_list(folder / "list.csv", rows)
        bench = Bench(folder / "store", [path], **RECIPES, run={"pairs": fetch, **settings})
        bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    return bench


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Bench]:
    folder = tmp_path_factory.mktemp("split")
    return _run(folder / "clean", poison=False), _run(folder / "poisoned", poison=True)


def _weights(bench: Bench, stage: str) -> dict[str, str]:
    return {name: blob for name, blob in bench.made[stage].blobs.items() if name.endswith(".safetensors")}


def test_the_poison_is_in_the_data(benches: tuple[Bench, Bench]) -> None:
    clean, poisoned = (bench.rows("curation") for bench in benches)
    assert [row["key"] for row in clean] == [row["key"] for row in poisoned]
    assert [row["split"] for row in clean] == [_split(i) for i in range(ROWS)]
    assert [a["sha256"] != b["sha256"] for a, b in zip(clean, poisoned, strict=True)] == [
        _split(i) == "test" for i in range(ROWS)
    ]
    for stage in ("captions", "embeddings"):
        assert benches[0].blobs(stage) != benches[1].blobs(stage)


@pytest.mark.parametrize(
    "stage", ["clip", *(pytest.param(stage, marks=[pytest.mark.slow] * (stage in SLOW)) for stage in TRAINED)]
)
def test_a_poisoned_test_row_changes_no_bit_of_what_is_trained(benches: tuple[Bench, Bench], stage: str) -> None:
    for bench in benches:
        if stage not in bench.made:
            bench.make(*({"codec"} - bench.made.keys() - {stage}), stage)
    clean, poisoned = (_weights(bench, stage) for bench in benches)
    assert len(clean) == 1
    assert clean == poisoned
