"""Karlo at its real size, folders that do not fit, and the examples of docs/export.md."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.clip import Clip
from models.clip_prior import ClipPrior, ClipPriorConfig
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.folder import save_model
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.interchange import (
    decoder,
    export_decoder,
    export_upsampler,
    import_decoder,
    import_prior,
    import_upsampler,
    prior,
    unet,
    upsampler,
)
from models.interchange.files import check_config
from models.interchange.names import to_theirs, under
from models.interchange.schedules import Process
from models.interchange.text import text_config
from models.prior_configs import ClipConfig, DiffusionPriorConfig, TextTower
from models.upsampler import Upsampler
from pipeline.config import preset_config
from tests.models import karlo
from tests.models.karlo import CONFIG as DECODER
from tests.models.karlo import DIM, UPSAMPLER

WIDTHS = (320, 640, 960, 1280)
PROCESS = Process("cosine", 1000, "eps")
TEXT = text_config(TextTower(768, 12, 12, quick_gelu=True), 768)
# The fields of config.json when Karlo's weights were published.
OLD_FIELDS = """_class_name act_fn attention_head_dim block_out_channels center_input_sample class_embed_type
    cross_attention_dim down_block_types downsample_padding dual_cross_attention flip_sin_to_cos freq_shift in_channels
    layers_per_block mid_block_scale_factor mid_block_type norm_eps norm_num_groups num_class_embeds
    only_cross_attention out_channels resnet_time_scale_shift sample_size up_block_types upcast_attention
    use_linear_projection add_attention time_embedding_type num_attention_heads num_layers embedding_dim num_embeddings
    additional_embeddings dropout clip_extra_context_tokens clip_embeddings_dim time_embed_dim""".split()  # noqa: SIM905


def old_config(network: Any) -> dict[str, Any]:
    """What an old version wrote into config.json."""
    document = json.loads(network.to_json_string())
    return {name: document[name] for name in OLD_FIELDS if name in document}


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


# What preset karlo has of its own, beside every field that is Karlo's. Import reads a released model, so of training it
# knows no more than our defaults: text is dropped as Karlo's own configuration says, and crops are the paper's.
OWN: dict[str, dict[str, Any]] = {
    "decoder": {"text_encoder": "frozen", "embedding_norm": 0.0, "drop_text": 0.3},  # of embeddings of unit norm
    "upsampler_256": {"crop": 0.25, "last_unet": False},  # the second network is tuned on other losses than ours
    "diffusion_prior": {"text_encoder": "frozen", "drop_text": 0.2},
}


def assert_is_karlo(stage: str, theirs: Any) -> None:
    """Compares every field of a preset's model with an imported configuration but for OWN."""
    ours = getattr(preset_config("karlo"), stage).model
    imported = dataclasses.asdict(theirs)
    expected = {name: imported[name] for name in dataclasses.asdict(ours)} | OWN[stage]
    assert dataclasses.asdict(ours) == expected
    assert all(imported[name] != value for name, value in OWN[stage].items())


def test_karlos_decoder_fits_at_its_real_size() -> None:
    network = on_meta(lambda: karlo.unet(64, 3, WIDTHS, 1536, 64, dropout=0.1))
    projections = on_meta(lambda: UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536))
    config = decoder.config_of(old_config(network), old_config(projections), TEXT, PROCESS, 18.0)
    assert_is_karlo("decoder", config)
    parts, shape = decoder.parts_of(config, 768), decoder.shape_of(config)
    for document in (old_config(network), json.loads(network.to_json_string())):
        check_config(Path("decoder"), document, parts.unet, unet.idle_fields(shape))
    check_config(Path("text_proj"), old_config(projections), parts.text_proj, set())
    ours = on_meta(lambda: Decoder(config, 768)).state_dict()
    assert shapes(to_theirs(under("unet.", ours), unet.unet_table(shape))) == shapes(network.state_dict())
    theirs = {decoder.NULL_IMAGE: ours["null_image"]} | to_theirs(ours, decoder.PROJECTIONS)
    assert shapes(theirs) == shapes(projections.state_dict())


def test_karlos_upsampler_fits_at_its_real_size() -> None:
    network = on_meta(lambda: karlo.upsampler(256, 3, WIDTHS))
    config = upsampler.config_of(old_config(network), PROCESS, last_unet=True)
    assert_is_karlo("upsampler_256", config)
    shape = upsampler.shape_of(config)
    for document in (old_config(network), json.loads(network.to_json_string())):
        check_config(Path("super_res_first"), document, unet.unet_config(shape, 256, 0.0), unet.idle_fields(shape))
    ours = on_meta(lambda: Upsampler(config)).state_dict()
    for prefix in ("unet.", "last_unet."):
        assert shapes(to_theirs(under(prefix, ours), unet.unet_table(shape))) == shapes(network.state_dict())


def test_karlos_prior_fits_at_its_real_size() -> None:
    network = on_meta(PriorTransformer)
    config = prior.config_of(old_config(network), TEXT, PROCESS)
    assert_is_karlo("diffusion_prior", config)
    for document in (old_config(network), json.loads(network.to_json_string())):
        check_config(Path("prior"), document, prior.part_of(config, 768), {"dropout"})
    ours = on_meta(lambda: ClipPrior(config, 768)).state_dict()
    theirs = shapes(network.state_dict())
    assert {name: shape for name, shape in theirs.items() if name in prior.BARE} == {
        "positional_embedding": (1, 81, 2048),
        "prd_embedding": (1, 1, 2048),
        "clip_mean": (1, 768),
        "clip_std": (1, 768),
    }
    assert ours["position"].shape == (81, 2048)
    named = shapes(to_theirs(ours, prior.prior_table(config.depth)))
    assert named == {name: shape for name, shape in theirs.items() if name not in prior.BARE}


@pytest.fixture
def copy(karlo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(karlo_folder, tmp_path / "karlo"))


def open_part(folder: Path, part: str) -> None:
    """Reads the model of which a folder's ``part`` is."""
    read = {"prior": import_prior, "super": import_upsampler}.get(re.split("[_/]", part)[0], import_decoder)
    read(folder)


CONFIGS = [
    ("decoder", {"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift is 'default', expected 'scale_shift'"),
    ("decoder", {"norm_num_groups": 16}, "norm_num_groups is 16, expected 32"),
    ("decoder", {"_class_name": "UNet3DConditionModel"}, "_class_name is 'UNet3DConditionModel', expected 'UNet2DCond"),
    ("decoder", {"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "down_block_types is .* are known"),
    ("decoder", {"block_out_channels": [32, 48]}, r"block_out_channels is \[32, 48\]: each must be a multiple"),
    ("decoder", {"block_out_channels": [48, 96]}, "channels is 48: only multiples of 32"),
    ("decoder", {"encoder_hid_dim": 5}, "encoder_hid_dim is 5, expected None"),
    ("decoder", {"in_channels": 4}, "in_channels is 4, expected 3"),
    ("decoder", {"sample_size": None}, "no configuration that is known here"),
    ("decoder", {"attention_head_dim": [16, 16]}, "no configuration that is known here"),
    ("decoder", {"layers_per_block": 1}, "does not fit"),
    ("text_proj", {"cross_attention_dim": 24}, "cross_attention_dim is 20, expected 24"),
    ("text_encoder", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'quick_gelu'"),
    ("prior", {"added_emb_type": None}, "added_emb_type is None, expected 'prd'"),
    ("prior", {"norm_in_type": "layer"}, "norm_in_type is 'layer', expected None"),
    ("prior", {"num_embeddings": 81}, "num_embeddings is 81, expected 77"),
    ("super_res_first", {"add_attention": True}, "add_attention is True, expected False"),
    ("super_res_last", {"freq_shift": 1}, "freq_shift is 1, expected 0"),
    ("decoder_scheduler", {"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear' with"),
    ("decoder_scheduler", {"beta_schedule": "linear", "beta_end": 0.03}, "beta_end is 0.03, expected 0.02"),
    ("prior_scheduler", {"prediction_type": "epsilon"}, "prediction='eps'.*trained for .*prediction='x0'"),
    ("super_res_scheduler", {"thresholding": True}, "thresholding is True, expected None"),
    ("decoder_scheduler", {"num_train_timesteps": None}, "decoder_scheduler.* is missing or odd"),
    ("decoder_scheduler", {"beta_schedule": []}, r"beta_schedule \[\] .*is unknown"),
    ("decoder", {"block_out_channels": []}, "is missing or odd"),
    ("text_proj", {"clip_embeddings_dim": None}, "is missing or odd|does not fit"),
]


@pytest.mark.parametrize(("part", "change", "message"), CONFIGS)
def test_a_configuration_that_does_not_fit_is_one_clear_error(
    copy: Path, part: str, change: dict, message: str
) -> None:
    file = copy / part / ("scheduler_config.json" if part.endswith("scheduler") else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        open_part(copy, part)


def test_a_scheduler_of_another_process_is_refused(tmp_path: Path) -> None:
    export_upsampler(Upsampler(dataclasses.replace(UPSAMPLER, prediction="v")), tmp_path)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "super_res_scheduler")
    with pytest.raises(ValueError, match=r"super_res_scheduler.*prediction='eps'.*trained for .*prediction='v'"):
        import_upsampler(tmp_path)


FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part", ["decoder", "text_proj", "prior", "super_res_last", "text_encoder"])
def test_missing_unknown_odd_and_damaged_weights_are_one_clear_error(copy: Path, part: str) -> None:
    path = copy / part / ("model.safetensors" if part == "text_encoder" else FILE)
    weights = load_file(path)
    name = min(weights)
    for changed, message in (
        ({k: v for k, v in weights.items() if k != name}, "missing"),
        (weights | {"lora.weight": torch.zeros(2)}, "lora.weight"),
        (weights | {name: torch.zeros(2, 3, 5)}, "do not fit|does not fit"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message) as error:
            open_part(copy, part)
        assert str(copy) in str(error.value)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged"):
        open_part(copy, part)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
        open_part(copy, part)


@pytest.mark.parametrize("file", ["decoder/config.json", "prior_scheduler/scheduler_config.json"])
def test_missing_and_damaged_configurations_are_one_clear_error(copy: Path, file: str) -> None:
    for content, message in (("{", "is damaged"), ("[]", "holds no JSON object")):
        (copy / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            open_part(copy, file)
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no .*{file}"):
        open_part(copy, file)


@pytest.mark.parametrize("file", ["text_encoder/config.json", "decoder/config.json"])
@pytest.mark.parametrize("code", [{"auto_map": {"AutoModel": "evil.Evil"}}, {"vision": {"trust_remote_code": True}}])
def test_a_configuration_that_names_code_is_refused(copy: Path, file: str, code: dict[str, Any]) -> None:
    document = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(document | {"auto_map": {}}))
    if file.startswith("text"):  # of diffusers' own, unknown fields must be empty
        open_part(copy, file)
    (copy / file).write_text(json.dumps(document | code))
    with pytest.raises(ValueError, match=f"{file} names code to be loaded"):
        open_part(copy, file)


def test_without_a_prior_the_length_of_embeddings_must_be_given(copy: Path) -> None:
    shutil.rmtree(copy / "prior")
    with pytest.raises(ValueError, match="pass embedding_norm, their root mean square norm"):
        import_decoder(copy)
    assert import_decoder(copy, 9.0).scale == 9.0


def test_half_precision_weights_open_in_single(copy: Path) -> None:
    path = copy / "super_res_first" / FILE
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert {parameter.dtype for parameter in import_upsampler(copy).parameters()} == {torch.float32}


def test_a_model_that_diffusers_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="channels is 16: only multiples of 32"):
        export_decoder(Decoder(dataclasses.replace(DECODER, channels=16, head_channels=16), DIM), tmp_path)
    with pytest.raises(ValueError, match="channels is 16: only multiples of 32"):
        export_upsampler(
            Upsampler(dataclasses.replace(preset_config("nano").upsampler_256.model, prediction="v")), tmp_path
        )
    with pytest.raises(ValueError, match="text_width is 24 and CLIP's embeddings have 20 dimensions"):
        export_decoder(Decoder(DECODER, 20), tmp_path)
    for write, model in (
        (export_decoder, Decoder(dataclasses.replace(DECODER, multipliers=(2, 4)), DIM)),
        (export_upsampler, Upsampler(dataclasses.replace(UPSAMPLER, multipliers=(2, 4)))),
    ):
        with pytest.raises(ValueError, match="multipliers begin with 2: only 1 can be exported"):
            write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ours_without_what_it_has_to_have_or_of_another_version_is_one_clear_error(tmp_path: Path) -> None:
    export_upsampler(Upsampler(UPSAMPLER), tmp_path)
    file = tmp_path / "ours/upsampler/config.json"
    document = json.loads(file.read_text())
    for name in ("config", "sizes"):
        file.write_text(json.dumps({key: value for key, value in document.items() if key != name}))
        with pytest.raises(ValueError, match=f"upsampler.*'{name}'.* is missing or odd"):
            import_upsampler(tmp_path)
    file.write_text(json.dumps(document | {"config": document["config"] | {"shuffle": True}}))
    with pytest.raises(ValueError, match=r"holds a UpsamplerConfig of .*'shuffle'.*which is not known here"):
        import_upsampler(tmp_path)


def test_the_examples_of_the_document_run(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, text = (Path(__file__).parents[2] / "docs/export.md").read_text().partition("\n## Karlo")
    here, there = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    save_model(
        tmp_path / "bundle/decoder", Decoder(dataclasses.replace(DECODER, text_encoder="glide", context_width=0), DIM)
    )
    save_model(
        tmp_path / "bundle/diffusion_prior", DiffusionPrior(DiffusionPriorConfig(width=32, depth=1, heads=2), DIM)
    )
    save_model(tmp_path / "bundle/upsampler_256", Upsampler(UpsamplerConfig(channels=32, depth=1, multipliers=(1, 2))))
    monkeypatch.chdir(copy.parent)
    clip = ClipConfig(embed_dim=DIM, layers=(1,), width=DIM, patch=16, text_width=DIM, text_layers=1, text_heads=2)
    monkeypatch.setattr(Clip, "pretrained", lambda name, tag: Clip.build(clip, seed=0).eval())
    results: dict[str, Any] = {}
    exec(here, results)
    assert results["image"].size == (64, 64)
    exec(there, {})
    UNet2DConditionModel.from_pretrained("exported/decoder")
    PriorTransformer.from_pretrained("exported/prior")
    UNet2DModel.from_pretrained("exported/super_res_first")
    assert isinstance(import_decoder("exported").config, DecoderConfig)
    assert not isinstance(import_prior("exported").config, ClipPriorConfig)
