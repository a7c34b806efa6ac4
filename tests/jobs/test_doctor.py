"""``unclip doctor``: one line a check, exit code 1 for a problem, nothing left behind, never a traceback."""

import os
import shutil
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

import jobs.doctor
from jobs.cli import main
from pipeline.config import load_config, make_config
from pipeline.cost.observed import Observation, Observations, shape
from pipeline.doctor import machine, packages
from pipeline.doctor.finding import Finding
from pipeline.doctor.nodes import Answer, judge, versions
from pipeline.graph import resources
from pipeline.graph.keys import flatten
from pipeline.graph.ray import ClusterNode, this_machine
from pipeline.graph.stages import Graph
from pipeline.settings import RaySettings
from pipeline.store import Store, open_store
from pipeline.store.folder import FolderStore
from tests.chain import ROOT, unclip
from tests.seaweed import Server

Output = pytest.CaptureFixture[str]
Usage = namedtuple("Usage", "total used free")
CONFIG = "project: mine\npreset: nano\nstore: {store}\nsource:\n  paths: [pairs.csv]\nrun:\n  output: out\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder of an idle machine. Ray's workers find our packages by PYTHONPATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is not asked: it takes seconds, and tests below are about it."""
    monkeypatch.setattr(jobs.doctor, "check_nodes", lambda *_: ())


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks with room, whatever this machine has."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(200e9, 0, 100e9))


def doctor(capsys: Output, store: object, *words: str, held_out: int = 8) -> tuple[int, list[str]]:
    """Exit code and lines of a doctor's visit to a configuration with this store, and a list of 8 pairs a split."""
    Path("mine.yaml").write_text(CONFIG.format(store=store))
    splits = {"train": 8, "validation": held_out, "test": held_out}
    rows = [f"http://closed.test/{split}-{i},a,{split}\n" for split, count in splits.items() for i in range(count)]
    Path("pairs.csv").write_text("url,caption,split\n" + "".join(rows))
    code = main(["doctor", "mine.yaml", *words])
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    return code, output.out.splitlines()


def about(lines: list[str], subject: str) -> list[str]:
    return [line for line in lines if line.split()[1] == subject]


def level(lines: list[str], subject: str) -> list[str]:
    return [line.split()[0] for line in about(lines, subject)]


# --- healthy ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_ray", "plenty")
def test_a_healthy_folder(capsys: Output, here: Path) -> None:
    (here / "there").mkdir()
    for store in ("there", "out/mine/store"):
        code, lines = doctor(capsys, store)
        assert code == 0, lines
        assert level(lines, "store") == ["ok"]
        assert level(lines, "disk") == ["ok", "ok"]
        assert {line.split()[0] for line in lines} == {"ok", "problems:"}
        assert lines[-1] == "problems: 0, warnings: 0"
    assert sorted(path.name for path in here.rglob("*")) == ["mine.yaml", "pairs.csv", "there"]


@pytest.mark.usefixtures("no_ray", "plenty")
def test_a_healthy_s3_store(capsys: Output, s3: Server) -> None:
    url = f"{s3.url}/doctor-{os.getpid()}"
    code, lines = doctor(capsys, url)
    assert code == 0, lines
    assert level(lines, "store") == ["ok"]
    assert level(lines, "disk") == ["ok"]
    assert list(open_store(url).list("")) == []


@pytest.mark.usefixtures("plenty")
def test_without_a_configuration_it_starts_a_ray_and_ends_it(capsys: Output) -> None:
    import ray

    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"python", "machine", "memory", "packages", "ray", "nodes"} <= {line.split()[1] for line in lines}
    assert not {"store", "disk"} & {line.split()[1] for line in lines}
    assert not ray.is_initialized()


# --- the store --------------------------------------------------------------------------------------------------------


CREATE, SWAP = FolderStore.create, FolderStore.swap


@pytest.mark.usefixtures("no_ray", "plenty")
@pytest.mark.parametrize(
    ("method", "instead", "says"),
    [
        (
            "create",
            lambda store, path, data, **_: store.delete([path]) or CREATE(store, path, data),
            "overwrites objects instead of refusing (If-None-Match is ignored); use a store with",
        ),
        (
            "swap",
            lambda store, path, _, new: SWAP(store, path, store.stat(path).version, new),
            "swaps objects without comparing (If-Match is ignored); use a store with",
        ),
        ("delete", lambda *_: None, "keeps objects that were deleted; allow these credentials to delete"),
    ],
)
def test_a_store_that_ignores_conditions(
    method: str, instead: object, says: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderStore, method, instead)
    code, lines = doctor(capsys, "store")
    (line,) = about(lines, "store")
    assert (code, line.startswith("problem  store     ")) == (1, True)
    assert says in line


@pytest.mark.usefixtures("no_ray", "s3")
def test_an_endpoint_that_is_none(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    code, lines = doctor(capsys, "s3://unclip/doctor")
    assert code == 1
    (line,) = about(lines, "store")
    says = "Invalid endpoint: nonsense; AWS_ENDPOINT_URL has to begin with http:// or https://"
    assert line.startswith(f"problem  store     s3://unclip/doctor: {says}")


@pytest.mark.usefixtures("no_ray")
def test_a_folder_that_cannot_be_written(capsys: Output, here: Path) -> None:
    (here / "file").write_text("not a folder")
    code, lines = doctor(capsys, "file/store")
    assert code == 1
    assert level(lines, "store") == ["problem"]
    assert main(["doctor", "gone.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: gone.yaml: no such configuration")


# --- list and CLIP ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_ray", "plenty")
def test_too_few_rows_are_held_out(capsys: Output) -> None:
    code, lines = doctor(capsys, "store", held_out=7)
    assert code == 0
    assert level(lines, "list") == ["ok", "warning", "warning"]
    assert "ok       list      22 rows, of which 7 for test and 7 for validation" in lines
    assert any("7 test pairs, and a figure needs 8; set source.test" in line for line in lines)
    assert level(doctor(capsys, "store")[1], "list") == ["ok"]


@pytest.mark.usefixtures("no_ray", "plenty")
def test_a_list_that_is_missing(capsys: Output) -> None:
    code, lines = doctor(capsys, "store", "source.paths=[gone.csv]")
    assert code == 1
    assert level(lines, "list") == ["problem"]


@pytest.mark.usefixtures("no_ray", "plenty")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "clip.weights=open_clip:ViT-B-23:openai",
            "clip.weights: open_clip has no model 'ViT-B-23': did you mean ViT-B-32?",
        ),
        (
            "evaluation.judge=open_clip:RN50:opnai",
            "evaluation.judge: RN50 has no weights opnai, nor is there such a file; did",
        ),
    ],
)
def test_a_clip_that_is_nowhere(override: str, says: str, capsys: Output) -> None:
    """Also where a model reads the text tower of that CLIP, which counting its weights needs."""
    code, lines = doctor(capsys, "store", override, "decoder.model.text_encoder=frozen")
    assert code == 1
    (line,) = about(lines, "clip")
    assert line.startswith(f"problem  clip      {says}")
    assert level(lines, "memory") == ["ok"]


@pytest.mark.usefixtures("no_ray", "plenty")
def test_a_clip_of_open_clip_is_in_the_cache_or_on_the_hub(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand more")

    words = ("store", "clip.weights=open_clip:ViT-B-32:openai")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    code, lines = doctor(capsys, *words)
    (line,) = about(lines, "clip")
    assert code == 1
    assert line.startswith("problem  clip      clip.weights: the weights are not in the cache, and timm/vit_base_")
    assert "cannot be reached (no route to host); connect to the network for the first run" in line
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: asked.append(url))
    assert level(doctor(capsys, *words)[1], "clip") == ["ok"]
    assert asked[0].endswith("/open_clip_model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cached")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert level(doctor(capsys, *words)[1], "clip") == ["ok"]
    (here / "own.pt").touch()
    assert level(doctor(capsys, "store", "clip.weights=open_clip:ViT-B-32:own.pt")[1], "clip") == ["ok"]


@pytest.mark.usefixtures("no_ray", "plenty")
def test_it_says_on_what_each_stage_will_run(capsys: Output, request: pytest.FixtureRequest) -> None:
    code, lines = doctor(capsys, "store", "preset=paper")
    slow = next(line for line in lines if line.startswith("warning  stages    ") and "decoder" in line)
    assert " need a GPU: " in slow
    assert slow.endswith("; run it where there is one, or take preset=tiny, or scale=0.1")
    request.getfixturevalue("gpus")
    code, lines = doctor(capsys, "store", "preset=paper")
    assert code == 0
    assert level(lines, "gpu") == ["ok"]
    [said] = [line for line in lines if line.startswith("ok       stages    ")]
    assert said.startswith("ok       stages    runs on ")
    assert not any(" a GPU: " in line for line in lines)
    assert "8 H100 (clip, ar_prior, " in said
    assert "1 H100 (embeddings, samples, evaluation)" in said  # of one shard


@pytest.mark.usefixtures("no_ray", "plenty")
def test_a_run_on_another_machines_gpu_makes_this_machine_no_faster(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(store: object, project: str, graph: Graph, held_out: float) -> Observations:
        recipes = {name: flatten(stage.recipe) for name, stage in graph.items()}
        one = Observation(100, 10.0, 10.0, 1, shape("decoder", graph, recipes), device="cuda")
        return {"decoder": [one]}

    monkeypatch.setattr("jobs.plan.observe", seen)
    _, lines = doctor(capsys, "store", "preset=paper")
    assert any(line.startswith("warning  stages    ") and "decoder" in line and "a GPU: " in line for line in lines)
    assert not any("GPU (" in line for line in lines)


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("free", "expected", "code"), [(0.2e9, "problem", 1), (5e9, "warning", 0), (50e9, "ok", 0)])
def test_disks(free: float, expected: str, code: int, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e9, 0, free))
    found, lines = doctor(capsys, "store")
    assert found == code
    assert level(lines, "disk") == [expected, expected]
    assert level(lines, "shm") in (["ok" if free > 1e9 else "warning"], [])  # macOS has no /dev/shm


def test_memory_is_held_against_the_largest_training(monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_config({"project": "a", "preset": "nano", "store": "s", "source": {"paths": ["x"]}})
    paper = make_config({"project": "a", "store": "s", "source": {"paths": ["x"]}})
    assert machine.largest_training(paper)[0] == "decoder"
    assert machine.largest_training(paper)[1] > 100 * machine.largest_training(small)[1]
    for available, expected in ((20 * 10**9, "ok"), (10**9, "warning")):
        monkeypatch.setattr(machine, "available_memory", lambda available=available: available)
        assert next(finding.level for finding in machine.check_memory(small)) == expected
    (said, *_) = [finding.text for finding in machine.check_memory(paper) if "decoder" in finding.text]
    assert "decoder, the largest training, needs at least 71" in said


def test_a_container_has_its_limit_and_gives_its_page_cache_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    assert resources.container_memory() is None
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.container_memory() is None
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{(1 << 30) - 4096}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {512 << 20}\n")
    assert machine.available_memory() == (512 << 20) + 4096
    assert this_machine(RaySettings()).memory == 1 << 30


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_ray", "plenty")
def test_packages_out_of_bounds(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy<1", "no-such-package-here>=2", "webdataset>=0.1", "pyyaml>=6", 'never-asked-for; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    code, lines = doctor(capsys, "store")
    assert code == 1
    faults = [line for line in lines if line.startswith("problem ")]
    assert f"numpy {metadata.version('numpy')} is outside <1; pip install 'numpy<1'" in faults[0]
    assert "no-such-package-here is not installed; pip install" in faults[1]
    assert "cannot be imported (ModuleNotFoundError: import of webdataset halted" in faults[2]
    assert lines[-1] == "problems: 3, warnings: 0"


def test_a_project_that_is_not_installed_has_unknown_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PROJECT", "no-such-project-here")
    assert [finding.level for finding in packages.check_packages()] == ["warning"]


def test_a_package_that_hides_ours_is_one_line(here: Path) -> None:
    name = "pipeline.py"  # a folder: test_python.py
    (here / name).touch()
    process = unclip("plan", env={"PYTHONPATH": f"{here}:{ROOT}"}, cwd=here)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {here / name} hides a package of this project; take it off")
    assert process.stderr.count("\n") == 1


# --- nodes ------------------------------------------------------------------------------------------------------------


def findings(store: Store, *answers: Answer | Exception) -> list[Finding]:
    nodes = [(ClusterNode(f"node-{i}", 4, 0), answer) for i, answer in enumerate(answers)]
    return list(judge(nodes, versions(), store))


def test_nodes_that_differ_or_do_not_see_the_store(here: Path) -> None:
    folder = open_store(str(here / "store"))
    good = Answer(versions())
    assert [f.level for f in findings(folder, good, good)] == ["ok"]
    (unseen,) = findings(folder, good, Answer(versions(), "it is not there"))
    assert (unseen.level, unseen.subject) == ("problem", "nodes")
    assert f"node-1 cannot reach the store {folder.url} (it is not there)" in unseen.text
    assert "s3://BUCKET/PREFIX" in unseen.advice
    (unseen,) = findings(open_store("s3://bucket/a"), Answer(versions(), "no AWS credentials"))
    assert "AWS settings" in unseen.advice
    (other,) = findings(folder, Answer(versions() | {"torch": "1.0"}))
    assert f"node-0 has torch 1.0 (here {versions()['torch']})" in other.text
    (silent,) = findings(folder, ModuleNotFoundError("No module named 'pipeline'"))
    assert "node-0 does not answer (ModuleNotFoundError: No module named 'pipeline')" in silent.text


@pytest.mark.parametrize(("address", "says"), [("127.0.0.1:1", "refused"), ("http://127.0.0.1:1", "Invalid Ray")])
@pytest.mark.usefixtures("plenty")
def test_a_cluster_that_does_not_answer(
    address: str, says: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    code, lines = doctor(capsys, "store")
    assert code == 1
    (line,) = about(lines, "ray")
    assert line.startswith(f"problem  ray       no Ray cluster answers at {address}")
    assert says in line
    assert load_config("mine.yaml").store == "store"
