"""FID against torchmetrics' own metric, with random weights: the published ones, whose format theirs is, are not to be
had here."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.image import fid as theirs
from torchvision.models import Inception3

from pipeline.errors import UserError
from pipeline.evaluate.inception import fid_figures, load_inception
from pipeline.evaluate.metrics import derangement
from pipeline.evaluate.rows import HeldOut
from pipeline.evaluate.stage import EvaluationRecipe
from pipeline.evaluate.statistics import frechet_distance
from pipeline.graph.keys import artifact_key
from pipeline.parse import ContentFile
from pipeline.store import open_store

CPU = torch.device("cpu")
STORE = open_store("never-written")


def save_weights(path: Path, seed: int = 0) -> Path:
    """Random weights of Inception-v3 with 1008 classes by the names of torchvision, which are those of the published
    ones, without counts of batches; as a file of before PyTorch 1.6."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)  # so that 48 layers neither drown nor drown out an image
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> ContentFile:
    return named(save_weights(tmp_path_factory.mktemp("weights") / "inception.pth"))


def named(path: Path) -> ContentFile:
    return ContentFile.at(str(path), "evaluation.inception")


def images(n: int, seed: int, brightness: float) -> Tensor:
    """Coloured clouds: uint8 [n, 64, 64, 3]."""
    generator = torch.Generator().manual_seed(seed)
    clouds = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), (64, 64), mode="bicubic") * brightness
    return (clouds * 255).clamp(0, 255).byte().permute(0, 2, 3, 1)


def test_it_is_the_fid_of_torchmetrics(weights: ContentFile, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "unclip"):
        inception = load_inception(STORE, weights, CPU)
    assert "is not the file that is published" in caplog.text
    assert inception is not None
    sets = images(9, 0, 1.0), images(8, 1, 0.6)
    real, drawn = map(inception.look, sets)
    metric = theirs.FrechetInceptionDistance(feature_extractor_weights_path=weights.path)
    for x, is_real in zip(sets, (True, False), strict=True):
        metric.update(x.permute(0, 3, 1, 2), real=is_real)
    expected = float(metric.compute())
    assert expected > 0.1
    assert frechet_distance(drawn, real) == pytest.approx(expected, rel=1e-4)


def test_every_set_has_its_figure_on_its_own_rows() -> None:
    sizes = {"decoder": 12, "ar_prior": 7, "early": 12}
    features = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
    drawn = {kind: features[i][:size] for i, (kind, size) in enumerate(sizes.items())}
    real, training = features[3:]
    captions = [str(i) for i in range(12)]
    rows = HeldOut("test", captions, captions, captions, [None] * 12, {}, derangement(captions))
    found = {(f.model, f.name): f for f in fid_figures(drawn, real, training, rows)}
    assert found.keys() == {("decoder", "fid"), ("ar_prior", "fid"), ("decoder", "fid_early")}
    prior = found["ar_prior", "fid"]
    assert prior.value == pytest.approx(frechet_distance(features[1][:7], real[:7]))
    assert prior.baseline == pytest.approx(frechet_distance(training[:7], real[:7]))
    assert (prior.rows, prior.split, prior.holds) == (7, "test", None)
    assert found["decoder", "fid_early"].says == (
        "decoder: FID of an early checkpoint's images to real ones; baseline: training images"
    )


def test_the_weights_content_is_in_the_key_and_their_path_is_not(tmp_path: Path) -> None:
    def key(text: str | None, name: str = "a") -> str:
        if text is not None:
            (tmp_path / name).write_text(text)
        recipe = EvaluationRecipe(inception=None if text is None else named(tmp_path / name))
        return artifact_key("evaluation", 1, recipe, {"bundle": "b"})

    assert key("one") == key("one", "moved")
    assert len({key(None), key("one"), key("two")}) == 3
    assert load_inception(STORE, None, CPU) is None


def test_without_a_package_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch, weights: ContentFile) -> None:
    said = r"^evaluation\.inception needs torch-fidelity: pip install -e '\.\[fid\]' in the checkout installs "
    monkeypatch.setattr(theirs, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(UserError, match=said):
        load_inception(STORE, weights, CPU)


class Trap:
    """What runs code where a pickle is trusted."""

    sprung = False

    def __reduce__(self) -> Any:
        return setattr, (Trap, "sprung", True)


def test_a_file_of_other_content_is_one_line(tmp_path: Path, weights: ContentFile) -> None:
    (tmp_path / "text").write_text("no weights here")
    (tmp_path / "empty").write_bytes(b"")
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "whole", _use_new_zipfile_serialization=False)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-1000])
    torch.save([1.0], tmp_path / "list")
    torch.save(torch.load(weights.path, weights_only=True) | {"fc.bias": torch.zeros(1000)}, tmp_path / "classes")
    torch.save({"fc.bias": Trap()}, tmp_path / "trap")
    for name in ("text", "empty", "whole", "cut", "list", "classes", "trap"):
        said = (
            rf"^evaluation\.inception: .*/{name} does not hold the weights that FID is defined by; fetch [^\n]*\.pth$"
        )
        with pytest.raises(UserError, match=said):
            load_inception(STORE, named(tmp_path / name), CPU)
    assert not Trap.sprung

    file = named(tmp_path / "text")
    (tmp_path / "text").write_text("something else")
    with pytest.raises(
        UserError, match=r"^evaluation\.inception: .*/text has changed since it was named; run the same command again$"
    ):
        load_inception(STORE, file, CPU)
    (tmp_path / "text").unlink()
    with pytest.raises(
        UserError, match=r"^evaluation\.inception: .*/text cannot be read \(No such file or directory\)"
    ):
        load_inception(STORE, file, CPU)
    with pytest.raises(
        UserError, match=r"^evaluation\.inception: .*/text cannot be read \(No such file or directory\)"
    ):
        named(tmp_path / "text")
