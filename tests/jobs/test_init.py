"""``unclip init``: a first configuration for each kind of list, one that plans as it stands."""

import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from models.sampling_config import MODELS, PRIORS
from pipeline.build import build
from pipeline.config import Config, load_config, make_config, preset_config
from pipeline.data.pairs.preview import preview
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.starter import CLIP_WEIGHTS, starter
from pipeline.store import open_store
from tests.chain import refused
from tests.models.small_models import make
from tests.pipeline.data.bench import Bench, Page, picture, serving
from tests.pipeline.data.source.imported import write_parts

Output = pytest.CaptureFixture[str]
UNREAD = b'url,caption\na.png,a cat\nb.png,a cat\nc.png,"a dog\nd.png\n'
CAPTIONS = ["a red heart", 'a "cat": #1, on blue', "a red heart", "true", "two trees"]
SAMPLED = tuple(name for name in MODELS if name != PRIORS["ar"])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder(captions: Sequence[str] = ()) -> str:
    Path("pictures").mkdir()
    for i, caption in enumerate(captions or CAPTIONS):
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
    assert re.search(r" unclip run my-project.yaml preset=nano .*\n +unclip run my-project.yaml\n$", output)
    assert main(["plan", "my-project.yaml"]) == 0
    assert "my-project: 5 pairs in 1 shard," in capsys.readouterr().out
    assert len(Path("my-project.yaml").read_text().splitlines()) <= 50


@pytest.mark.parametrize(
    ("files", "says", "models"),
    [
        ({"tiny/a.png": picture(0, 9, 9), "tiny/a.txt": b"a"}, "1 of the first 1 images are below 64", SAMPLED[:2]),
        ({"bare/a.jpg": b"no", "bare/b.jpg": b"no", "bare/b.txt": b"a cat"}, "1 row more without a caption", SAMPLED),
        ({"broken/a.png": b"<html>", "broken/a.txt": b"a cat"}, "1 of the first 1 images cannot be opened", SAMPLED),
        ({"unread.csv": UNREAD}, "2 rows more cannot be read and will be left out; the first: line 4 has a", SAMPLED),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_run_would_leave_out_is_named(files: dict, says: str, models: tuple, capsys: Output) -> None:
    for name, data in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    assert made("mine", name.partition("/")[0]).bundle.models == models
    assert f"warning: {says}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "looked_for"),
    [
        ("pictures", "/pictures/0.txt for 0.png, and so on, or write {"),
        ("00000.tar", "000.txt, 000.caption or the caption in 000.json belongs to 000.jpg"),
        ("pairs.csv", "its column caption is empty"),
        ("pairs.parquet", "its column caption is empty"),
    ],
)
def test_a_list_without_any_caption_is_refused(source: str, looked_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.jobs.test_init.CAPTIONS", ["", " ", "", "\n", ""])
    (tar if source.endswith("tar") else folder if source == "pictures" else partial(table, source[6:]))()
    Path("run.yaml").write_text(f"project: mine\npreset: nano\nstore: store\nsource: {{paths: [{source}]}}\n")
    for words in (["init", "mine", source], ["plan", "run.yaml"], ["run", "run.yaml"]):
        refused(*words, says=[f"source {source}: no row has a caption", looked_for], cwd=Path())
    assert not Path("mine.yaml").exists()
    assert not Path("store").exists()


def test_without_a_list_it_names_one_of_each_kind(capsys: Output) -> None:
    assert made("mine").source.paths == ("pairs.csv",)
    text = Path("mine.yaml").read_text()
    assert all(kind in text for kind in (".csv, .tsv, .jsonl or", "a folder of a.jpg and a.txt", "webdataset tars"))
    output = capsys.readouterr().out
    assert "next: name your list in place of pairs.csv below source: paths: in mine.yaml\n" in output
    assert "unclip run" not in output
    refused("plan", "mine.yaml", says=f"source pairs.csv: no such file or folder in {Path.cwd()}", cwd=Path())


def test_what_cannot_be_opened_is_named_with_why_and_so_are_files_that_are_not_read(capsys: Output) -> None:
    folder()
    for i in range(4):
        Path(f"pictures/x{i}.png").write_bytes(b"<html>")
    for name in ("note.txt", "clip.mp4", "talk.mp4", ".hidden"):
        Path(f"pictures/{name}").write_text("")
    made("mine", "pictures")
    output = capsys.readouterr().out
    assert "warning: 4 of the first 9 images cannot be opened and will be left out:\n" in output
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("    /")] == [
        f"    {Path.cwd()}/pictures/x{i}.png" for i in range(3)
    ]
    assert "x2.png: not_an_image: the bytes are not an image" in output
    assert "3 files in " in output
    assert "are not read: 2 .mp4 (such as clip.mp4), 1 .txt without an image (such as note.txt)\n" in output


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ("http://127.0.0.1:9/{}.png", "allow: [127.0.0.1] below pairs:"),
        ("/elsewhere/images/{}.png", "roots: [/elsewhere/images] below source:"),
    ],
)
def test_a_list_whose_images_no_run_reads_gets_the_line_to_write(image: str, line: str, capsys: Output) -> None:
    Path("pairs.csv").write_text("url,caption\n" + "".join(f"{image.format(i)},a cat\n" for i in range(9)))
    with open("pairs.csv", "a") as file:
        file.write("http://closed.test/a.png,a dog\n")
    made("mine", "pairs.csv")
    output = capsys.readouterr().out
    assert f"next: no run reads these images as it stands; if they are yours, write {line}" in output
    assert "unclip run mine.yaml" not in output.partition("next: ")[2]
    assert main(["doctor", "mine.yaml"]) == 1
    found = capsys.readouterr().out
    assert re.search(r"problem +list +9 of the first 10 rows are forbidden_\w+, such as .*" + re.escape(line), found)


def test_a_list_whose_only_image_is_missing_is_not_run(capsys: Output) -> None:
    Path("pairs.csv").write_text("url,caption\ngone.png,a cat\n")
    made("mine", "pairs.csv")
    output = capsys.readouterr().out
    assert "gone.png: missing_file: " in output
    assert "next: no run reads these images as it stands; mend the images named above" in output
    assert "unclip run mine.yaml" not in output


def test_rows_that_name_no_image_or_have_no_caption_are_no_pairs(capsys: Output) -> None:
    Path("pairs.csv").write_text("url,caption\nhttp://closed.test/a.png,a\n,no image\nhttp://closed.test/b.png,\n")
    made("mine", "pairs.csv")
    output = capsys.readouterr().out
    assert "pairs found: 1\n" in output
    assert "warning: 1 row more is left out: the row names no image\n" in output
    assert "warning: 1 row more without a caption" in output


def test_other_columns() -> None:
    Path("laion.csv").write_text("URL,TEXT\nhttp://closed.test/a.png,a cat\n")
    config = made("mine", "laion.csv", "--image-column", "URL", "--caption-column", "TEXT")
    assert (config.source.image_column, config.source.caption_column) == ("URL", "TEXT")
    assert main(["plan", "mine.yaml"]) == 0


def listed(rows: int, columns: str = "url,caption", more: Callable[[int], str] = lambda i: "") -> str:
    """A list of references; ``more`` gives what follows the caption of a row."""
    lines = [f"http://closed.test/{i}.png,picture {i}{more(i)}\n" for i in range(rows)]
    Path("pairs.csv").write_text(f"{columns}\n" + "".join(lines))
    return "pairs.csv"


def held_out(config: Config) -> tuple[int, int]:
    """Rows that a run would hold out for test and validation."""
    found = scan(config.source, open_store(config.store), write=False).held_out
    return found.get("test", 0), found.get("validation", 0)


@pytest.mark.parametrize("rows", [3, 71, 200, 1_000, 3_000])
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
    assert "# unused: the list assigns 38" in Path("mine.yaml").read_text()
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


def test_a_clip_that_exists_is_named(capsys: Output) -> None:
    """The remark in the file works when it is uncommented."""
    made("mine", table("csv"))
    says = "warning: a CLIP trained on fewer than 1,000,000 pairs is poor; use an existing one, which is slow without"
    assert says in capsys.readouterr().out
    text = Path("mine.yaml").read_text()
    Path("mine.yaml").write_text(text.replace("# clip: {", "clip: {"))
    assert load_config("mine.yaml").clip.weights == "open_clip:ViT-B-32:openai"


def started(gpu: bool, pairs: int) -> Config:
    """The configuration of a list of so many pairs, of which few were looked at."""
    source = SourceRecipe((table("csv"),))
    seen = replace(preview(source), behind=pairs - len(CAPTIONS))
    return make_config(yaml.safe_load(starter("mine", gpu, source, seen)))


def test_on_a_machine_with_a_gpu_it_is_used(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    """Without a line about it: the sizes differ, and every stage takes the GPUs that it finds."""
    import torch

    plain = made("without", table("csv"))
    assert plain.clip.weights == "train"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capsys.readouterr()
    config = made("mine", "pairs.csv")
    assert replace(config.run, output=plain.run.output) == plain.run
    assert config.clip.weights == CLIP_WEIGHTS
    output = capsys.readouterr().out
    assert "clip.weights names a pretrained CLIP" in output
    assert "a CLIP trained on fewer" not in output
    assert made("unlisted").clip.weights == CLIP_WEIGHTS
    assert "preset: small" in Path("unlisted.yaml").read_text()


@pytest.mark.parametrize(
    ("gpu", "pairs", "preset"),
    [
        (False, 5, "tiny"),
        (False, 1_000_000, "tiny"),
        (True, 9_999, "tiny"),
        (True, 10_000, "small"),
    ],
)
def test_the_preset_is_for_the_machine_and_for_as_many_pairs(gpu: bool, pairs: int, preset: str) -> None:
    config, whole = started(gpu, pairs), preset_config(preset)
    assert config.decoder.model.channels == whole.decoder.model.channels
    # Below 10,000 pairs preset small would see each of them over a hundred times.
    longest = max(getattr(config, name).samples for name in SAMPLED)
    assert preset == "tiny" or longest <= 103 * pairs


@pytest.mark.parametrize(
    ("pairs", "scale", "weights"),
    [
        (10_000, 0.02, CLIP_WEIGHTS),
        (600_000, 1, CLIP_WEIGHTS),
        (1_000_000, 1, "train"),
    ],
)
def test_on_a_gpu_few_pairs_are_seen_a_hundred_times_and_need_a_clip_that_exists(
    pairs: int, scale: float, weights: str
) -> None:
    """The longest training is the diffusion prior's, of 51,200,000 samples."""
    config = started(True, pairs)
    whole = preset_config("small")
    assert config.clip.weights == weights
    for name in ("diffusion_prior", "decoder", "upsampler_1024"):
        found, preset = getattr(config, name), getattr(whole, name)
        assert found.samples == round(scale * preset.samples)
        assert found.decay / found.samples == pytest.approx(0.2)
        assert found.samples <= 103 * pairs


def test_on_a_gpu_a_list_of_which_no_row_is_taken_is_no_crash() -> None:
    """Such as one that names a bucket which is not among source.roots: ``init`` says so."""
    source = SourceRecipe((table("csv"),))
    seen = replace(preview(source), rows=0, captions=(), behind=0)
    assert seen.pairs == 0
    assert "scale:" not in starter("mine", True, source, seen)


@pytest.mark.parametrize(("pairs", "dropout"), [(5, 0.1), (2_400, 0.1), (2_500, 0.0), (10_000, 0.0)])
def test_without_a_gpu_pairs_that_are_seen_often_get_dropout(pairs: int, dropout: float) -> None:
    config = started(False, pairs)
    assert config.decoder.samples == preset_config("tiny").decoder.samples
    assert config.decoder.model.dropout == dropout
    assert config.ar_prior.model.dropout == preset_config("tiny").ar_prior.model.dropout > 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that lacks nothing."""
    folder: Path = tmp_path_factory.mktemp("bundle")
    make().save(folder)
    return folder


@pytest.mark.parametrize("gpu", [False, True])
def test_fine_tuning_learns_at_rates_that_were_seen_to_be_right(bundle: Path, gpu: bool) -> None:
    """The decoder at its preset's own; the priors, which are fitted to captions and codes, from scratch."""
    source = SourceRecipe((table("csv"),))
    for behind, preset in ((0, "tiny"), (20_000, "small" if gpu else "tiny")):
        text = starter("mine", gpu, source, replace(preview(source), behind=behind), bundle)
        values, usual = yaml.safe_load(text), preset_config(preset)
        assert values["bundle"]["models"] == list(SAMPLED)
        assert "diffusion_prior" not in values
        rates = {name: values[name]["learning_rate"] for name in SAMPLED[1:]}
        assert rates["decoder"] == usual.decoder.learning_rate
        for name in SAMPLED[2:]:
            assert rates[name] == pytest.approx(getattr(usual, name).learning_rate / 10)
        assert max(map(len, re.findall(r"learning_rate: (\S+)", text))) <= len("0.00025")  # as a person writes it
        assert values["decoder"]["init_from"] == str(bundle / "decoder/model.safetensors")


def test_a_bundle_without_a_decoder_has_nothing_to_go_on_from(bundle: Path) -> None:
    shutil.copytree(bundle, "less")
    shutil.rmtree("less/decoder")
    with pytest.raises(UserError, match=r"less: no decoder there to start from; name a bundle's folder"):
        starter("mine", False, SourceRecipe((table("csv"),)), None, Path("less"))


THINGS = [f"{size} {thing}" for size in ("a tiny", "a huge", "an old") for thing in ("cat", "dog", "tree", "house")]
FRAMED = "warning: every caption of 12 of 12 rows begins or ends with words that many share, such as 'an icon of', and"


def test_captions_that_begin_alike_are_noticed_once_and_not_with_the_bare_text(capsys: Output) -> None:
    made("mine", folder([f"an icon of {thing}" for thing in THINGS]))
    assert capsys.readouterr().out.count(FRAMED) == 1
    for file in Path("pictures").glob("*.txt"):
        file.write_text(f"{file.read_text()}\n\n{file.read_text().removeprefix('an icon of ')}\n")
    made("other", "pictures")
    assert "many share" not in capsys.readouterr().out


def metadata_of(folder: Path, column: str, form: str) -> None:
    """Writes embeddings whose metadata have the column alone, beside captions, with each row's number in its form."""
    write_parts(folder)
    for file in (folder / "metadata").iterdir():
        table = pq.read_table(file).select(["image_path", "caption"])
        values = [form.format(int(path.as_py())) for path in table["image_path"]]
        pq.write_table(table.set_column(0, column, pa.array(values)), file)


def test_captions_are_measured_by_the_tokens_that_the_presets_clip_reads(capsys: Output) -> None:
    made("my-project", folder([*CAPTIONS, "word " * 40]))
    assert "1 of the first 6 captions have more than the 30 tokens that this CLIP reads" in capsys.readouterr().out


def test_embeddings_whose_metadata_name_urls_are_a_list_of_images(here: Path, capsys: Output) -> None:
    metadata_of(here / "laion", "url", "http://pictures.test/{}.jpg")
    assert main(["init", "mine", "laion"]) == 0
    said = capsys.readouterr().out
    assert "laion/metadata: the list of images from which the embeddings beside it were made" in said
    assert said.endswith("unclip run mine.yaml\n")
    config = load_config("mine.yaml", [])
    assert [Path(path).resolve() for path in config.source.paths] == [here / "laion/metadata"]
    with serving({f"/{i}.jpg": Page(picture(i, kind="JPEG")) for i in range(5)}) as address:
        own = {"pairs": {"hosts": {"pictures.test": address}, "retries": 0}}
        bench = Bench(here / "store", list(config.source.paths), run=own)
        bench.make("source", "captions", "pairs")
    assert bench.made["pairs"].ledger.kept == 5


def test_embeddings_take_the_clip_that_made_them(here: Path, capsys: Output) -> None:
    metadata_of(here / "laion", "image_path", "pictures/{}.png")
    assert main(["init", "mine", "laion"]) == 0
    said = capsys.readouterr().out
    assert "laion: embeddings, without images: clip.weights in mine.yaml has to name the CLIP that made them" in said
    assert "a CLIP trained on fewer" not in said
    assert said.endswith("unclip run mine.yaml --until diffusion_prior\n")
    config = load_config("mine.yaml", [])
    assert config.clip.weights == CLIP_WEIGHTS
    build(config)
    assert main(["init", "both", "laion", folder()]) == 0
    said = capsys.readouterr().out
    assert "name images with captions as another source (pictures has them), and" in said
    assert said.endswith("unclip run both.yaml\n")


# Models for which images are too small are left out, by what is measured or by what the list says.


@pytest.mark.parametrize(
    ("side", "size", "models"), [(72, 64, SAMPLED[:2]), (300, 256, SAMPLED[:3]), (1024, 1024, SAMPLED)]
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
        (["300", 1023.0, "nan", None], 256, SAMPLED[:3], "first 2 images 0 have a short side of 1024 px or more, 2 of"),
        ([300] * 200 + [2000], 256, SAMPLED[:3], "first 201 images 1 have"),
        ([300] * 90 + [2000], 1024, SAMPLED, "first 91 images 1 have"),
        ([100, 200], 64, SAMPLED[:2], "0 of 256 px, 2 of 64 px"),
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
        f"bundle.models leaves {' and '.join(SAMPLED[len(models) :])} out, and samples have {size} px: Of the first"
    )
    output = capsys.readouterr().out
    assert (left_out in output) == (models != SAMPLED)
    assert ", as the list says." in output or models == SAMPLED


def test_where_no_size_is_known_it_says_how_to_leave_a_model_out(capsys: Output) -> None:
    config = made("mine", table("parquet"))
    assert config.bundle.models == SAMPLED
    line = next(line for line in capsys.readouterr().out.splitlines() if "images are measured once" in line)
    config = load_config("mine.yaml", line.split()[-2:])
    assert (config.bundle.models, config.bundle.sampling.size) == (SAMPLED[:3], 256)
