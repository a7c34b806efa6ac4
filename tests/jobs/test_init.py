"""``unclip init``: a first configuration for each kind of list, one that plans as it stands."""

import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from models.sampling_config import MODELS
from pipeline.config import Config, load_config, make_config, preset_config
from pipeline.data.source import peek as looking
from pipeline.data.source.emoji.listing import emoji_rows
from pipeline.data.source.peek import look
from pipeline.data.source.stage import SourceRecipe, scan
from pipeline.errors import UserError
from pipeline.starter import CAPTION_BYTES, CLIP_WEIGHTS, SHARE, _captions, _scalar, shortest_share, starter
from pipeline.store import open_store
from tests.pipeline.data.bench import picture

Output = pytest.CaptureFixture[str]
CAPTIONS = ["a red heart", 'a "cat": #1, on blue', "a red heart", "true", "two trees"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder() -> str:
    Path("pictures").mkdir()
    for i, caption in enumerate(CAPTIONS):
        Path(f"pictures/{i}.png").write_bytes(picture(i))
        Path(f"pictures/{i}.txt").write_text(caption)
    return "pictures"


def tar() -> str:
    source = Path(folder())
    with tarfile.open("00000.tar", "w") as out:
        for file in sorted(source.iterdir()):
            out.add(file, file.name)
    shutil.rmtree(source)
    return "00000.tar"


def table(kind: str) -> str:
    columns = {"url": [f"http://closed.test/{i}.png" for i in range(len(CAPTIONS))], "caption": CAPTIONS}
    if kind == "parquet":
        pq.write_table(pa.table(columns), "pairs.parquet")
    else:
        from pyarrow import csv

        options = csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        csv.write_csv(pa.table(columns), f"pairs.{kind}", options)
    return f"pairs.{kind}"


KINDS: dict[str, Callable[[], str]] = {
    "folder": folder,
    "tar": tar,
    "csv": lambda: table("csv"),
    "tsv": lambda: table("tsv"),
    "parquet": lambda: table("parquet"),
}


def made(*words: str) -> Config:
    assert main(["init", *words]) == 0
    return load_config(f"{words[0]}.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_list_gives_a_configuration_that_plans(kind: str, capsys: Output) -> None:
    path = KINDS[kind]()
    config = made("my-project", path)
    assert (config.project, config.store, config.source.paths) == ("my-project", "out/my-project/store", (path,))
    assert config.samples.captions == ("a red heart", 'a "cat": #1, on blue', "true", "two trees")
    assert config.run.output == "out/my-project"
    output = capsys.readouterr().out
    assert "pairs found: 5\nwarning: fewer than 1,000 pairs" in output
    assert output.endswith("next:\n    unclip doctor my-project.yaml\n    unclip run my-project.yaml\n")
    assert main(["plan", "my-project.yaml"]) == 0
    assert "my-project: 5 pairs in 1 shard," in capsys.readouterr().out
    assert len(Path("my-project.yaml").read_text().splitlines()) <= 50


@pytest.mark.parametrize(
    ("side", "size", "models"), [(72, 64, MODELS[:3]), (300, 256, MODELS[:4]), (1024, 1024, MODELS)]
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


def test_pictures_on_the_web_or_broken_leave_every_model_in(capsys: Output) -> None:
    Path("pictures").mkdir()
    Path("pictures/a.jpg").write_bytes(b"not a picture")
    Path("pictures/b.jpg").write_bytes(b"not a picture")
    Path("pictures/b.txt").write_text("a cat")
    assert made("mine", table("csv"), "pictures").bundle.models == MODELS
    assert "warning: 1 of them have no caption" in capsys.readouterr().out


def test_small_pictures_are_named(capsys: Output) -> None:
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(picture(0, 40, 40))
    Path("pictures/a.txt").write_text("a cat")
    made("mine", "pictures")
    assert "warning: 1 of the first 1 images are below 64 px" in capsys.readouterr().out


def test_rows_that_cannot_be_read_are_named(capsys: Output) -> None:
    rows = "".join(f"http://closed.test/{i}.png,a cat\n" for i in range(20))
    Path("pairs.csv").write_text(f'url,caption\n{rows}http://closed.test/a.png,"a dog\nhttp://closed.test/b.png\n')
    made("mine", "pairs.csv")
    output = capsys.readouterr().out
    assert "pairs found: 20\n" in output
    says = "warning: 2 rows more cannot be read and will be left out; the first: line 22 has a stray quotation mark\n"
    assert says in output


@pytest.mark.parametrize(
    ("source", "looked_for"),
    [
        ("pictures", "/pictures/0.txt for 0.png, and so on (metadata.jsonl is not read)"),
        ("00000.tar", "000.txt or 000.caption has the caption of 000.jpg"),
        ("pairs.csv", "its column caption is empty"),
        ("pairs.parquet", "its column caption is empty"),
    ],
)
def test_a_list_without_any_caption_is_refused(
    source: str, looked_for: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.jobs.test_init.CAPTIONS", ["", " ", "", "\n", ""])
    (tar if source.endswith("tar") else folder if source == "pictures" else partial(table, source[6:]))()
    Path("pictures").mkdir(exist_ok=True)
    Path("pictures/metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    Path("run.yaml").write_text(f"project: mine\npreset: nano\nstore: store\nsource: {{paths: [{source}]}}\n")
    for words in (["init", "mine", source], ["plan", "run.yaml"], ["run", "run.yaml"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert f"source {source}: no row has a caption" in error
        assert looked_for in error
    assert not Path("mine.yaml").exists()
    assert not Path("store").exists()


def test_without_a_list_it_names_one_of_each_kind(capsys: Output) -> None:
    assert made("mine").source.paths == ("pairs.csv",)
    text = Path("mine.yaml").read_text()
    assert all(kind in text for kind in (".csv, .tsv or .parquet", "a folder of a.jpg and a.txt", "webdataset tars"))
    assert "put your list under source.paths first" in capsys.readouterr().out
    assert main(["plan", "mine.yaml"]) == 2
    where = f"in {Path.cwd()}, from where relative paths count"
    assert capsys.readouterr().err == f"error: source pairs.csv: no such file or folder {where}\n"


def test_other_columns(capsys: Output) -> None:
    Path("laion.csv").write_text("URL,TEXT\nhttp://closed.test/a.png,a cat\n")
    config = made("mine", "laion.csv", "--image-column", "URL", "--caption-column", "TEXT")
    assert (config.source.image_column, config.source.caption_column) == ("URL", "TEXT")
    assert main(["plan", "mine.yaml"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a/b", "pairs.csv"], "project: 'a/b' is not a plain name"),
        (["", "pairs.csv"], "project: '' is not a plain name"),
        (["mine", "gone.csv"], "source gone.csv: no such file or folder"),
        (["mine", "pairs.csv", "list.json"], "source list.json: not a .parquet, .csv, .tsv or .tar file, nor a folder"),
        (["mine", "empty"], "source empty: no rows"),
        (["mine", "laion.csv"], "has URL, TEXT. Set source.image_column or source.caption_column, here with --image"),
        (["taken", "pairs.csv"], "taken.yaml is there already and stays as it is"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words: list[str], says: str, here: Path, capsys: Output) -> None:
    table("csv")
    (here / "empty").mkdir()
    (here / "list.json").write_text("[]")
    (here / "laion.csv").write_text("URL,TEXT\nhttp://closed.test/a.png,a cat\n")
    (here / "taken.yaml").write_text("mine\n")
    before = sorted(here.iterdir())
    assert main(["init", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert sorted(here.iterdir()) == before
    assert (here / "taken.yaml").read_text() == "mine\n"


def test_pictures_that_cannot_be_opened_are_counted(capsys: Output) -> None:
    Path(folder(), "1.png").write_bytes(b"<html>")
    assert main(["init", "mine", "pictures"]) == 0
    assert "warning: 1 of the first 5 images cannot be opened" in capsys.readouterr().out


def test_a_look_at_a_long_list_ends_early_but_sees_the_head_of_every_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "MOST_ROWS", 3)
    first, other = table("csv"), table("parquet")
    seen = look(SourceRecipe((first, other)))
    assert (seen.rows, seen.more, seen.pairs) == (4, True, 10)
    monkeypatch.setattr(looking, "MOST_COUNTED", 3)
    assert look(SourceRecipe((first, other))).pairs == 4 + 3
    Path("bad.csv").write_text("url\nx\n")
    with pytest.raises(UserError, match="no column caption"):
        look(SourceRecipe((first, "bad.csv")))


@pytest.mark.parametrize(
    "text",
    ["plain", "true", "1e3", "- a", "a: b", "a #b", "ends:", "'", '"', "{a", "@x", "*a", "~", "", "é 🐈", "a\nb"],
)
def test_any_text_comes_back_from_yaml(text: str) -> None:
    for document in (f"- {_scalar(text)}", f"- {_scalar(text)} # remark", f"- {_scalar(text)}\n- b"):
        assert yaml.safe_load(document)[0] == text
    assert yaml.safe_load(f"a: {_scalar(text)} # remark") == {"a": text}


def test_captions_are_short_enough_for_clip() -> None:
    long = "word " * 100
    assert _captions(looking.Look(2, False, (long, "short"), ())) == ["short"]
    (cut,) = _captions(looking.Look(1, False, (long,), ()))
    assert cut == "word " * 14 + "word"
    (cut,) = _captions(looking.Look(1, False, ("猫" * 100,), ()))
    assert cut == "猫" * (CAPTION_BYTES // 3)


def listed(rows: int, columns: str = "url,caption", more: Callable[[int], str] = lambda i: "") -> str:
    """A list of references; ``more`` gives what follows the caption of a row."""
    lines = [f"http://closed.test/{i}.png,picture {i}{more(i)}\n" for i in range(rows)]
    Path("pairs.csv").write_text(f"{columns}\n" + "".join(lines))
    return "pairs.csv"


def held_out(config: Config) -> tuple[int, int]:
    """Rows that a run would hold out for test and validation."""
    found = scan(config.source, open_store(config.store), write=False).held_out
    return found.get("test", 0), found.get("validation", 0)


@pytest.mark.parametrize("rows", [3, 5, 71, 160, 200, 320, 1_000, 3_000])
def test_a_small_set_gets_a_split_that_can_be_judged(rows: int) -> None:
    """At least 32 and 16 rows where there are that many, with some more, and never over a fifth of all."""
    config = made("mine", listed(rows))
    test, validation = held_out(config)
    assert min(40, rows // 5) <= test <= max(rows // 5, rows * 0.03)
    assert min(20, rows // 5) <= validation <= max(rows // 5, rows * 0.03)
    text = Path("mine.yaml").read_text()
    assert f"  test: {config.source.test} # {test} of {rows:,} rows\n" in text
    assert f"  validation: {config.source.validation} # {validation} of {rows:,} rows\n" in text
    assert min(config.source.test, config.source.validation) >= 0.02


def test_a_split_of_the_lists_own_is_counted() -> None:
    splits = ["test"] * 38 + ["train"] * 162
    config = made("mine", listed(200, "url,caption,split", lambda i: f",{splits[i]}"))
    assert held_out(config) == (38, 0)
    assert "# unused: the list names 38" in Path("mine.yaml").read_text()
    Path("mine.yaml").unlink()
    config = made("mine", listed(400, "url,caption,split", lambda i: f",{splits[i] if i < 200 else ''}"))
    test, validation = held_out(config)
    assert test >= 40
    assert 20 <= validation <= 80


def test_groups_are_held_out_whole() -> None:
    config = made("mine", listed(400, "url,caption,group", lambda i: f",group {i // 25}"))
    test, validation = held_out(config)
    assert (test % 25, validation % 25) == (0, 0)
    assert 50 <= test <= 80
    assert 25 <= validation <= 80
    Path("mine.yaml").unlink()
    assert held_out(made("mine", listed(100, "url,caption,group", lambda i: ",one"))) in ((0, 0), (100, 0), (0, 100))


@pytest.mark.parametrize("seed", range(20))
def test_a_share_is_the_shortest_that_fits(seed: int) -> None:
    chance = random.Random(seed)
    places = sorted(chance.choice([chance.random(), 0.5]) for _ in range(chance.randrange(1, 60)))
    wanted = chance.randrange(len(places) + 1)
    share = shortest_share(places, wanted, len(places))
    assert sum(place < share for place in places) >= wanted
    assert share == SHARE or sum(place < round(share - 0.01, 2) for place in places) < wanted


def test_a_clip_that_exists_is_named(capsys: Output) -> None:
    """The remark in the file works when it is uncommented."""
    made("mine", table("csv"))
    says = "warning: a CLIP trained on fewer than 1,000,000 pairs is poor; take one that exists, which is slow without"
    assert says in capsys.readouterr().out
    text = Path("mine.yaml").read_text()
    Path("mine.yaml").write_text(text.replace("# clip: {", "clip: {"))
    assert load_config("mine.yaml").clip.weights == "open_clip:ViT-B-32:openai"


def test_on_a_machine_with_a_gpu_it_is_used(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    import torch

    plain = made("without", table("csv"))
    assert (plain.run.embeddings.gpus, plain.clip.weights) == (0, "train")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capsys.readouterr()
    config = made("mine", "pairs.csv")
    assert config.run.embeddings.gpus == 1
    assert config.clip.weights == "open_clip:ViT-B-32:openai"
    assert config.decoder.model.prediction == "v"
    assert "preset: small" in Path("mine.yaml").read_text()
    output = capsys.readouterr().out
    assert "clip.weights takes a CLIP that exists" in output
    assert "a CLIP trained on fewer" not in output
    assert made("unlisted").clip.weights == "open_clip:ViT-B-32:openai"


@pytest.mark.parametrize(
    ("pairs", "scale", "weights"),
    [
        (5, 0.02, CLIP_WEIGHTS),
        (10_000, 0.02, CLIP_WEIGHTS),
        (123_000, 0.24, CLIP_WEIGHTS),
        (500_000, 0.98, CLIP_WEIGHTS),
        (600_000, 1, CLIP_WEIGHTS),
        (1_000_000, 1, "train"),
    ],
)
def test_on_a_gpu_few_pairs_are_seen_a_hundred_times_and_need_a_clip_that_exists(
    pairs: int, scale: float, weights: str
) -> None:
    """A million samples are the least of the longest training, the diffusion prior's 51,200,000."""
    source = SourceRecipe((table("csv"),))
    seen = replace(look(source), behind=pairs - len(CAPTIONS))
    config = make_config(yaml.safe_load(starter("mine", True, source, seen)))
    whole = preset_config("small")
    assert config.clip.weights == weights
    for name in ("diffusion_prior", "decoder", "upsampler_1024"):
        found, preset = getattr(config, name), getattr(whole, name)
        assert found.samples == round(scale * preset.samples)
        assert found.decay / found.samples == pytest.approx(0.2)
        assert found.samples <= max(103 * pairs, 1_030_000)
    assert config.evaluation.early == round(scale * whole.evaluation.early)


@pytest.mark.parametrize(("pairs", "dropout"), [(5, 0.1), (6_500, 0.1), (6_600, 0.0), (10_000, 0.0)])
def test_without_a_gpu_pairs_that_are_seen_often_get_dropout(pairs: int, dropout: float) -> None:
    source = SourceRecipe((table("csv"),))
    seen = replace(look(source), behind=pairs - len(CAPTIONS))
    config = make_config(yaml.safe_load(starter("mine", False, source, seen)))
    assert config.decoder.samples == preset_config("tiny").decoder.samples
    assert config.decoder.model.dropout == dropout
    assert config.ar_prior.model.dropout == preset_config("tiny").ar_prior.model.dropout > 0


THINGS = [f"{size} {thing}" for size in ("a tiny", "a huge", "an old") for thing in ("cat", "dog", "tree", "house")]
FRAMED = (
    "warning: every caption of 12 of 12 rows begins or ends with words that many share, such as 'an icon of', and a "
    "CLIP that trains on them learns those words, not the things; add the bare text as a second caption of each row: "
    "Captions that name a style in docs/your-data.md\n"
)


def spoken(captions: list[str]) -> None:
    """Writes a folder of images that have these texts, of one caption a line."""
    Path("pictures").mkdir()
    for i, text in enumerate(captions):
        Path(f"pictures/{i}.png").write_bytes(picture(i))
        Path(f"pictures/{i}.txt").write_text(text)


def test_captions_that_begin_alike_are_noticed_once_and_not_with_the_bare_text(capsys: Output) -> None:
    spoken([f"an icon of {thing}" for thing in THINGS])
    made("mine", "pictures")
    assert capsys.readouterr().out.count(FRAMED) == 1
    for file in Path("pictures").glob("*.txt"):
        file.write_text(f"{file.read_text()}\n{file.read_text().removeprefix('an icon of ')}\n")
    made("other", "pictures")
    assert "many share" not in capsys.readouterr().out


def framed_slowly(rows: list[tuple[str, ...]]) -> int:
    """How many rows have shared words in every caption, each compared with every different caption."""
    texts = [caption.split() for caption in {caption for row in rows for caption in row}]
    long = [words for words in texts if len(words) > 3]

    def shared(caption: str) -> bool:
        own = caption.split()
        begins = sum(other[:3] == own[:3] for other in long)
        ends = sum(other[-3:] == own[-3:] for other in long)
        return len(own) > 3 and max(begins, ends) >= 10 and 10 * max(begins, ends) >= len(texts)

    return sum(bool(row) and all(map(shared, row)) for row in rows)


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_captions_that_share_their_words_are_counted(seed: int) -> None:
    chance = random.Random(seed)
    words = ["a", "photo", "of", "red", "cat"][: 2 + seed % 4]
    rows = [
        tuple(" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(chance.randint(0, 2)))
        for _ in range(60)
    ]
    found = looking.framed_rows(rows)
    assert found.rows == framed_slowly(rows)
    assert bool(found.words) == bool(found.rows)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(f"{thing} on a white background",) for thing in THINGS], (12, "a white background")),
        ([(f"an icon of {thing}", thing) for thing in THINGS], (0, "")),
        ([(thing,) for thing in THINGS], (0, "")),
        ([("a tall green tree in a park",)] * 100, (0, "")),  # one text of many images is a class, not a style
        ([(f"{kind} of a {thing}",) for kind in ("a flat icon", "one old photo") for thing in range(50)], (100, "")),
        ([], (0, "")),
    ],
)
def test_what_counts_as_shared_words(rows: list[tuple[str, ...]], found: tuple[int, str]) -> None:
    counted, words = looking.framed_rows(rows)
    assert counted == found[0]
    assert words == found[1] or words in ("a flat icon", "one old photo")


def test_the_quick_starts_own_captions_are_fine_with_names_and_not_without() -> None:
    rows = [row.captions for row in emoji_rows("full")]
    assert looking.framed_rows(rows).rows == 0
    assert looking.framed_rows([row[:1] for row in rows]).rows == len(rows)
