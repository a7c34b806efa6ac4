import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.ar_prior import ARPrior, sample
from models.cascade import UnCLIP
from models.clip import Clip
from models.comparison import compare_priors
from models.decoder import Decoder
from models.folder import load_codec, load_model, save_model
from models.random_streams import RandomStreams, derive_seed
from models.sampling_config import SamplingConfig, change_sampling
from models.tokens import cut_tokens, text_context, tokenize
from models.upsampler import Upsampler
from tests.models.small_models import AR_PRIOR, CAPTIONS, CLIP, CODES, DECODER, DIM, SAMPLING, UPSAMPLER_256, make


def test_captions_become_images_of_every_size() -> None:
    out = make().generate(CAPTIONS, [1, 2, 3])
    assert {side: tuple(image.shape) for side, image in out.images.items()} == {s: (3, s, s, 3) for s in (16, 64, 256)}
    assert all(image.dtype == torch.uint8 for image in out.images.values())
    assert out.image is out.images[256]
    torch.testing.assert_close(out.embedding.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-5)
    assert len(torch.unique(out.images[16].flatten(1), dim=0)) == 3


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_a_image_depends_on_its_caption_and_seed_alone(prior: str) -> None:
    unclip = make()
    together = unclip.generate(CAPTIONS, [1, 2, 3], prior=prior)
    for i in (0, 2):
        alone = unclip.generate(CAPTIONS[i : i + 1], [i + 1], prior=prior)
        torch.testing.assert_close(alone.embedding[0], together.embedding[i], rtol=0, atol=1e-5)
        for side, image in alone.images.items():
            difference = (image[0].int() - together.images[side][i].int()).abs()
            assert difference.max() <= 1  # rounding
            assert (difference > 0).float().mean() < 0.01
    other = unclip.generate(CAPTIONS[:1], [9], prior=prior)
    assert not torch.equal(other.images[16][0], together.images[16][0])


def test_priors_are_compared_with_guidance_that_each_of_them_can_take() -> None:
    unclip = dataclasses.replace(make(), ar_prior=ARPrior(dataclasses.replace(AR_PRIOR, drop_text=0.0), DIM, CODES))
    with pytest.raises(ValueError, match=r"prior_guidance is 3\.0, and the model was trained without drop_text"):
        compare_priors(unclip, "a red fox", prior_guidance=3.0, size=64)
    guided = dataclasses.replace(unclip, sampling=dataclasses.replace(SAMPLING, prior_guidance=3.0))
    assert [guided.sampling_with({"prior": prior}).prior_guidance for prior in ("ar", "diffusion")] == [0.0, 3.0]
    assert len(compare_priors(guided, "a red fox", size=64).names) == 3


def test_a_caption_of_which_the_models_read_a_part_is_said(caplog: pytest.LogCaptureFixture) -> None:
    unclip = make()
    assert text_context(unclip) == 12
    unclip.generate(CAPTIONS, [1, 2, 3], size=64)
    assert not caplog.records
    unclip.generate(["fox " * 10, "fox " * 11], [1, 2], size=64)
    said = "1 of 2 captions have more than the 10 tokens that these models read; the rest is cut"
    assert [record.message for record in caplog.records] == [said]


def test_a_clip_with_its_own_tokenizer_reads_its_own_tokens() -> None:
    """CLIP alone: priors and decoder go on reading the caption as CLIP's BPE."""
    unclip = make()

    def backwards(captions: list[str]) -> torch.Tensor:
        return cut_tokens(tokenize([caption[::-1] for caption in captions]), CLIP.text_context)

    own: Any = backwards
    with_own = dataclasses.replace(unclip, clip=Clip(unclip.clip.model, unclip.clip.model_config, own))
    tokens, sampling = tokenize(CAPTIONS), dataclasses.replace(SAMPLING, prior="ar")
    text = unclip.clip.encode_text(tokenize([caption[::-1] for caption in CAPTIONS]))
    expected = unclip.draw_embedding(tokens, text, [1, 2, 3], sampling)
    drawn = with_own.generate(CAPTIONS, [1, 2, 3], prior="ar", size=64)
    assert torch.equal(drawn.embedding, expected)
    assert not torch.equal(expected, unclip.generate(CAPTIONS, [1, 2, 3], prior="ar", size=64).embedding)
    decoded = unclip.decode(expected, tokens, [1, 2, 3], dataclasses.replace(sampling, size=64))
    assert torch.equal(drawn.image, decoded.image)


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.5)])
def test_an_interval_of_guidance_that_is_none_is_named(interval: tuple[float, float]) -> None:
    first, last = interval
    with pytest.raises(
        ValueError, match=f"decoder_guidance_from is {first} and decoder_guidance_to {last}: use shares"
    ):
        SamplingConfig(decoder_guidance_from=first, decoder_guidance_to=last)


def test_in_bf16_an_image_is_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.precision.has_bfloat16", lambda device: True)
    unclip, given = make(), {"candidates": 1, "decoder_guidance": 0.0}
    whole, half = (unclip.generate(["a cat"], [0], precision=kind, **given).images for kind in ("fp32", "bf16"))
    for side, image in whole.items():
        apart = (half[side].float() - image.float()).abs().mean()
        assert 0 < apart < 1, side
    monkeypatch.setattr("models.precision.has_bfloat16", lambda device: False)
    assert torch.equal(unclip.generate(["a cat"], [0], precision="bf16", **given).image, max(whole.items())[1])


def test_guidance_temperature_and_candidates_are_used() -> None:
    unclip = dataclasses.replace(make(), upsampler_256=None, upsampler_1024=None)

    def generate(**options: Any) -> Any:
        return unclip.generate(CAPTIONS, [1, 2, 3], size=64, **options)

    base = generate()
    for options in ({"prior_guidance": 3.0}, {"candidates": 1}, {"prior_steps": 5}, {"prior_sampler": "ddim"}):
        assert not torch.equal(generate(**options).embedding, base.embedding)
    for options in (
        {"decoder_guidance": 5.0}, {"decoder_guidance_from": 0.5}, {"decoder_threshold": 0.5}, {"decoder_steps": 3},
        {"decoder_sampler": "ddim"},
    ):  # fmt: skip
        changed = generate(**options)
        assert torch.equal(changed.embedding, base.embedding)
        assert not torch.equal(changed.images[16], base.images[16])
    assert not torch.equal(generate(prior="ar").embedding, generate(prior="ar", temperature=0.01).embedding)


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_the_candidate_nearest_to_the_text_is_kept(prior: str) -> None:
    unclip = make()
    tokens, sampling = tokenize(CAPTIONS), dataclasses.replace(SAMPLING, prior=prior)
    text = unclip.clip.encode_text(tokens)

    def score(candidates: int) -> torch.Tensor:
        sampled = unclip.draw_embedding(tokens, text, [1, 2, 3], dataclasses.replace(sampling, candidates=candidates))
        return (sampled * text).sum(-1)

    scores = [score(n) for n in (1, 2, 4)]  # the first candidates stay the same when more are drawn
    assert (scores[1] >= scores[0] - 1e-6).all()
    assert (scores[2] >= scores[1] - 1e-6).all()
    assert (scores[2] > scores[0] + 1e-6).any()


def test_ar_embeddings_are_decoded_codes_of_the_upper_half_of_dot_products() -> None:
    unclip, tokens = make(), tokenize(CAPTIONS)
    text, sampling = unclip.clip.encode_text(tokens), dataclasses.replace(SAMPLING, prior="ar", candidates=1)
    embedding = unclip.draw_embedding(tokens, text, [1, 2, 3], sampling)
    rng = RandomStreams([(derive_seed(seed, "prior", 0), 1) for seed in (1, 2, 3)])
    dots = unclip.codec.sample_upper_dot(rng)
    assert dots.min() >= 4
    codes = sample(unclip.ar_prior, tokens, text, dots, rng)
    torch.testing.assert_close(embedding, F.normalize(unclip.codec.decode(codes), dim=-1), rtol=0, atol=1e-6)
    assert torch.equal(unclip.draw_embedding(tokens, text, list(torch.tensor([1, 2, 3])), sampling), embedding)
    with pytest.raises(TypeError, match="float"):
        unclip.draw_embedding(tokens, text, [1.0, 2.0, 3.0], sampling)


def test_progress_hears_every_step() -> None:
    heard: list[tuple[str, int, int]] = []
    make().generate(["a cat"], [0], lambda *step: heard.append(step[:3]))
    expected = [("diffusion_prior", 3), ("decoder", 4), ("upsampler_256", 3), ("upsampler_1024", 2)]
    assert heard == [(stage, i + 1, steps) for stage, steps in expected for i in range(steps)]
    heard.clear()
    make().generate(["a cat"], [0], lambda *step: heard.append(step[:3]), prior="ar", size=64)
    assert heard[:CODES] == [("ar_prior", i + 1, CODES) for i in range(CODES)]


def test_it_stops_where_the_bundle_or_the_user_stops() -> None:
    unclip = make()
    assert list(unclip.generate(["a cat"], [0], size=64).images) == [16, 64]
    assert list(dataclasses.replace(unclip, upsampler_1024=None).generate(["a cat"], [0]).images) == [16, 64]
    low = dataclasses.replace(unclip, upsampler_256=None, upsampler_1024=None)
    assert list(low.generate(["a cat"], [0]).images) == [16]


def test_upsamplers_see_a_damaged_image_unless_told_otherwise() -> None:
    unclip = make()
    clean = Upsampler(dataclasses.replace(UPSAMPLER_256, corrupt_at_inference=False)).eval()
    clean.load_state_dict(unclip.upsampler_256.state_dict())
    damaged = unclip.generate(["a cat"], [0], size=64)
    undamaged = dataclasses.replace(unclip, upsampler_256=clean).generate(["a cat"], [0], size=64)
    assert torch.equal(damaged.images[16], undamaged.images[16])
    assert not torch.equal(damaged.images[64], undamaged.images[64])


def test_a_bundle_on_disk_makes_the_same_images(tmp_path: Path) -> None:
    unclip = make()
    unclip.save(tmp_path)
    again = UnCLIP.from_folder(tmp_path)
    assert again.sampling == SAMPLING
    for prior in ("diffusion", "ar"):
        expected = unclip.generate(CAPTIONS, [1, 2, 3], prior=prior)
        assert torch.equal(again.generate(CAPTIONS, [1, 2, 3], prior=prior).image, expected.image)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_a_bundle_may_lack_what_it_does_not_need(tmp_path: Path) -> None:
    lacking = dict.fromkeys(("ar_prior", "codec", "upsampler_256", "upsampler_1024"))
    dataclasses.replace(make(), **lacking).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "decoder", "diffusion_prior", "sampling.json"}
    (tmp_path / "sampling.json").unlink()
    again = UnCLIP.from_folder(tmp_path)
    assert again.sampling == SamplingConfig()
    assert all(getattr(again, name) is None for name in lacking)
    with pytest.raises(ValueError, match="no ar_prior: use prior 'diffusion'"):
        again.generate(["a cat"], [0], prior="ar")


def test_a_bundle_is_not_saved_over_another(tmp_path: Path) -> None:
    make().save(tmp_path / "new")
    with pytest.raises(FileExistsError, match="new is not empty: name a new folder for the bundle"):
        make().save(tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion_prior": None, "ar_prior": None}, "a prior is missing"),
        ({"codec": None}, "needs its codec, of 4 codes of 8 buckets"),
        ({"upsampler_256": None}, "upsampler_1024 has nothing to enlarge"),
        ({"decoder": Decoder(DECODER, 8)}, "decoder was trained on 8-dimensional embeddings, CLIP makes 16"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(), **changes)


def test_mistakes_of_a_caller_are_named() -> None:
    unclip = make()
    with pytest.raises(ValueError, match="got 1 captions and 2 seeds"):
        unclip.generate(["a cat"], [0, 1])
    with pytest.raises(ValueError, match=r"unknown sampling options \['guidence'\]"):
        unclip.generate(["a cat"], [0], guidence=1.0)
    with pytest.raises(ValueError, match="size is 512: use 64, 256 or 1024"):
        unclip.generate(["a cat"], [0], size=512)
    with pytest.raises(ValueError, match="negative_prompt is not known here: guidance leads away from the empty"):
        unclip.generate(["a cat"], [0], negative_prompt="a dog")
    with pytest.raises(ValueError, match="decoder_steps is given twice"):
        unclip.generate(["a cat"], [0], steps=2, decoder_steps=2)


def test_options_have_the_names_of_other_programs_too() -> None:
    """Those of diffusers' pipelines, whose guidance of 1 is none, and sizes as OpenAI writes them."""
    theirs = {"num_inference_steps": 3, "guidance_scale": 3, "prior_num_inference_steps": 2, "size": "64x64"}
    unclip = make()
    ours = {"decoder_steps": 3, "decoder_guidance": 2.0, "prior_steps": 2, "size": 64}
    assert unclip.sampling_with(theirs) == unclip.sampling_with(ours)
    assert unclip.sampling_with({"guidance_scale": 0.5}).decoder_guidance == 0
    assert unclip.sampling_with({"size": "auto"}) == unclip.sampling
    assert unclip.manipulation_sampling({"steps": 3}).decoder_steps == 3


def test_a_model_folder_keeps_weights_configuration_and_sizes(tmp_path: Path) -> None:
    model = make().ar_prior
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_model(tmp_path, model, average)
    again = load_model(tmp_path)
    assert (again.config, again.embed_dim, again.codes, again.training) == (AR_PRIOR, DIM, CODES, False)
    assert all(torch.equal(tensor, average[name]) for name, tensor in again.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_steps": "50"}, "decoder_steps is '50': use a whole number"),
        ({"decoder_steps": 25.5}, "decoder_steps is 25.5: use a whole number"),
        ({"candidates": True}, "candidates is True: use a whole number"),
        ({"temperature": None}, "temperature is None: use a number"),
        ({"decoder_guidance": math.nan}, "decoder_guidance is nan: use a number"),
        ({"prior": ["ar"]}, r"prior is \['ar'\]: use a word"),
    ],
)
def test_sampling_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    """They may stand in a bundle of somebody else's."""
    with pytest.raises(ValueError, match=message):
        change_sampling(SamplingConfig(), options)
    whole = change_sampling(SamplingConfig(), {"decoder_guidance": 1})
    assert type(whole.decoder_guidance) is float
    more = change_sampling(whole, {"decoder_guidance": np.float64(0.5), "candidates": np.int64(3)})
    assert (more.decoder_guidance, more.candidates) == (0.5, 3)


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, make().diffusion_prior)
    document = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")

    def check(message: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(document | changes))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)

    check("format 2, newer than 1: update", format=2)
    check("has format '2': fetch or train it again", format="2")
    check("holds a codec: expected one of ar_prior", kind="codec")
    check(r"unknown fields \['layers'\]", config=document["config"] | {"layers": 3})
    check("does not fit config.json", sizes={"embed_dim": 8})
    check("heads", config=document["config"] | {"heads": 3})
    check("is damaged", config=["heads"])
    check("is damaged", config=document["config"] | {"width": "wide"})
    check("is damaged", sizes=None)
    check("names code to be loaded", auto_map={"AutoModel": "evil.Evil"})
    save_file({"query": weights["query"]}, tmp_path / "model.safetensors")
    check("describes a larger model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has neither format nor kind"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    check("is damaged")
    with pytest.raises(ValueError, match="is damaged"):
        load_codec(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        UnCLIP.from_folder(tmp_path / "nowhere")


def test_a_damaged_sampling_file_is_named(tmp_path: Path) -> None:
    make().save(tmp_path)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"sampling.json is not JSON"):
        UnCLIP.from_folder(tmp_path)
    (tmp_path / "sampling.json").write_text("[]")
    with pytest.raises(ValueError, match="in place of sampling options"):
        UnCLIP.from_folder(tmp_path)
