import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from models.ar_prior import (
    ARPrior,
    ar_prior_loss,
    invert_cdf,
    log_likelihood,
    noise_along,
    sample,
    smooth_functions,
)
from models.codec import Codec
from models.codec_fit import fit_codec
from models.prior_configs import ARPriorConfig, TextTower
from models.random_streams import RandomStreams

CONFIG = ARPriorConfig(
    text_context=10, prefix=6, text_width=32, text_depth=1, text_heads=2, width=32, depth=2, heads=2, vocabulary=50,
    buckets=8,
)  # fmt: skip
DIM, CODES = 12, 5
TOWER = TextTower(8, 1, 2, context=10, vocabulary=50)
RIDGE = {"ridge": True, "text_encoder": "frozen"}
FEW_ROWS = {"smooth_buckets": 4, **RIDGE}


def make(**options: Any) -> ARPrior:
    torch.manual_seed(0)
    model = ARPrior(dataclasses.replace(CONFIG, **options), DIM, CODES, TOWER).double().eval()
    for parameter in model.parameters():  # larger than at the start of training, so that every input has weight
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_inputs(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tokens, text embedding, dot codes, codes, keep_text"""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 48, (rows, 10), generator=g)
    tokens[:, 7] = 49
    text = torch.nn.functional.normalize(torch.randn(rows, DIM, generator=g, dtype=torch.float64), dim=-1)
    dots, codes = torch.randint(8, (rows,), generator=g), torch.randint(8, (rows, CODES), generator=g)
    return tokens, text, dots, codes, torch.ones(rows, dtype=torch.bool)


def make_batch(rows: int) -> tuple[dict[str, Tensor], Codec]:
    tokens, text, _, _, _ = make_inputs(rows)
    image = torch.nn.functional.normalize(text + 0.3 * torch.randn(rows, DIM), dim=-1)
    codec = fit_codec(image, (image * text).sum(-1), CODES, CONFIG.buckets).codec
    return {"tokens": tokens, "text_embedding": text.float(), "image_embedding": image.float()}, codec


def test_a_code_depends_on_the_prefix_and_on_what_is_left_of_it_only() -> None:
    model, inputs = make(), make_inputs(1)
    base = model(*inputs)
    for position in range(CODES):
        codes = inputs[3].clone()
        codes[0, position] = (codes[0, position] + 1) % 8
        change = (model(*inputs[:3], codes, inputs[4]) - base).abs().amax(-1)[0]
        assert (change[: position + 1] == 0).all()
        assert (change[position + 1 :] > 1e-6).all()


def test_every_condition_reaches_the_first_code() -> None:
    model = make()
    tokens, text, dots, codes, keep = make_inputs(1)
    base = model(tokens, text, dots, codes, keep)[0, 0]
    late = tokens.clone()
    late[0, 6] += 1  # after the first `prefix` outputs of the text encoder, but before the end token
    for changed in (
        (late, text, dots, codes, keep),
        (tokens, -text, dots, codes, keep),
        (tokens, text, (dots + 1) % 8, codes, keep),
        (tokens, text, dots, codes, ~keep),
    ):
        assert (model(*changed)[0, 0] - base).abs().max() > 1e-6
    padded = tokens.clone()
    padded[0, 8:] = 3  # behind the end token nothing counts
    assert torch.equal(model(padded, text, dots, codes, keep)[0, 0], base)


def test_hidden_text_hides_caption_and_text_embedding_but_not_the_dot_product() -> None:
    model = make()
    tokens, text, dots, codes, keep = make_inputs(2)
    out = model(tokens, text, dots[:1].expand(2), codes[:1].expand(2, -1), ~keep)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-12)
    other = model(tokens, text, torch.tensor([0, 1]), codes[:1].expand(2, -1), ~keep)
    assert (other[0, 0] - other[1, 0]).abs().max() > 1e-6


@pytest.mark.parametrize(("guidance", "options"), [(0.0, {}), (1.5, {}), (1.5, FEW_ROWS)])
def test_sampling_with_a_cache_gives_the_codes_of_full_passes(guidance: float, options: dict[str, Any]) -> None:
    model = make(**options)
    tokens, text, dots, _, keep = make_inputs(16)
    drawn = sample(model, tokens, text, dots, RandomStreams([(7, 16)]), temperature=0.8, guidance=guidance)
    uniform = RandomStreams([(7, 16)]).uniform("codes", CODES)
    codes = torch.zeros(16, CODES, dtype=torch.int64)
    for i in range(CODES):
        logits = (1 + guidance) * model(tokens, text, dots, codes, keep)
        logits = logits - guidance * model(tokens, text, dots, codes, ~keep)
        codes[:, i] = invert_cdf(logits[:, i] / 0.8, uniform[:, i])
    assert torch.equal(drawn, codes)


def test_samples_have_the_models_own_probabilities() -> None:
    model = make()
    rows = 5_000
    inputs = [x.expand(rows, *x.shape[1:]) for x in make_inputs(1)]
    drawn = sample(model.float(), inputs[0], inputs[1].float(), inputs[2], RandomStreams([(0, rows)]))
    first = model(*(x[:1] for x in inputs)).softmax(-1)[0, 0]
    torch.testing.assert_close(torch.bincount(drawn[:, 0], minlength=8) / rows, first, rtol=0, atol=0.02)


def test_likelihoods_of_all_sequences_sum_to_one() -> None:
    torch.manual_seed(0)
    model = ARPrior(dataclasses.replace(CONFIG, buckets=4), DIM, 3).double()
    tokens, text, dots, _, keep = make_inputs(1)
    codes = torch.cartesian_prod(*[torch.arange(4)] * 3)
    wide = [x.expand(len(codes), *x.shape[1:]) for x in (tokens, text, dots % 4, keep)]
    total = log_likelihood(model, wide[0], wide[1], wide[2], codes, wide[3]).sum(-1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_inverse_cdf_edges() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]).expand(4, -1)
    assert invert_cdf(logits, torch.tensor([0.0, 1 / 3 + 1e-6, 0.667, 1 - 2**-24])).tolist() == [0, 1, 3, 3]


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        sample(make(), *make_inputs()[:3], RandomStreams([(0, 3)]), temperature=0)


def test_loss_is_the_mean_negative_log_likelihood_of_the_codes() -> None:
    batch, codec = make_batch(8)
    model = make()
    codes = codec.encode(batch["image_embedding"])
    dots = codec.encode_dot((batch["image_embedding"].double() * batch["text_embedding"].double()).sum(-1))
    expected = -log_likelihood(model, batch["tokens"], batch["text_embedding"], dots, codes, torch.ones(8).bool())
    total = ar_prior_loss(model, batch, RandomStreams([(0, 8)]), codec).total
    torch.testing.assert_close(total, expected.mean(-1), rtol=0, atol=1e-12)


def test_text_is_hidden_from_a_tenth_of_the_training_rows() -> None:
    batch, codec = make_batch(2000)
    model = make().float()
    seen = ar_prior_loss(model, batch, RandomStreams([(0, 2000)]), codec).total
    hidden = (seen - ar_prior_loss(model.train(), batch, RandomStreams([(0, 2000)]), codec).total).abs() > 1e-4
    assert 160 < hidden.sum() < 240


def test_another_codec_is_refused() -> None:
    batch, codec = make_batch(8)
    with pytest.raises(ValueError, match="the codec has 5 codes of 8 buckets, the AR prior 4 of 8"):
        ar_prior_loss(ARPrior(CONFIG, DIM, 4), batch, RandomStreams([(0, 8)]), codec)


def test_loss_is_fp32_under_autocast() -> None:
    batch, codec = make_batch(8)
    model = ARPrior(CONFIG, DIM, CODES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = ar_prior_loss(model, batch, RandomStreams([(0, 8)]), codec).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(
        total, ar_prior_loss(model, batch, RandomStreams([(0, 8)]), codec).total, rtol=0, atol=0.03
    )


def test_tables_of_buckets_start_as_random_walks() -> None:
    torch.manual_seed(0)
    model = ARPrior(dataclasses.replace(CONFIG, buckets=512), DIM, CODES)
    for table, std in ((model.dot.weight, 1.0), (model.code.weight, 1.0), (model.head.weight, 0.3)):
        assert table.mean(0).abs().max() < 1e-6
        assert float(table.detach().std()) == pytest.approx(std / CONFIG.width**0.5, rel=1e-5)
        near = torch.cosine_similarity(table[:-1], table[1:]).median()
        far = torch.cosine_similarity(table[:-256], table[256:]).median()
        assert near > 0.95
        assert far < 0.3


def test_smooth_buckets_have_logits_of_which_a_few_make_any_normal_density() -> None:
    functions = smooth_functions(1024, 6).double()
    torch.testing.assert_close(functions.square().mean(0), torch.ones(6).double(), rtol=0.02, atol=0)
    score = torch.special.ndtri((torch.arange(1024).double() + 0.5) / 1024)
    mean, std = 0.8, 0.4  # of a score, whose own density is standard normal
    wanted = (-((score - mean) ** 2) / (2 * std**2) + score**2 / 2).log_softmax(0)
    rest = torch.linalg.lstsq(torch.cat([functions[:, :2], torch.ones(1024, 1)], 1), wanted[:, None]).residuals
    assert float(rest.sum()) < 1e-6
    model = make(smooth_buckets=4)
    assert (model.code.weight.shape, model.head.weight.shape) == ((CONFIG.width, 4), (4, CONFIG.width))
    assert model(*make_inputs()).shape == (3, CODES, 8)


def make_ridge() -> tuple[ARPrior, Tensor, Codec, dict[str, Tensor]]:
    """A model whose line is random, what that line says of a batch, codec and batch."""
    batch, codec = make_batch(64)
    model, g = make(**RIDGE).float(), torch.Generator().manual_seed(4)
    assert model.line is not None
    said = model.line.inputs(model.caption.text, batch["tokens"], batch["text_embedding"])
    weight, mean, image_mean = (
        torch.randn(*shape, generator=g) for shape in ((DIM, said.shape[1]), said.shape[1:], (DIM,))
    )
    model.line.start_from(weight, mean, image_mean)
    model.start_from(codec)
    return model, image_mean + (said - mean) @ weight.T, codec, batch


def test_with_a_ridge_each_code_is_predicted_with_its_coordinate_of_what_the_line_says() -> None:
    model, line, codec, batch = make_ridge()
    text, keep = batch["text_embedding"], torch.arange(64) > 0
    said = model.regress(batch["tokens"], text, keep)
    torch.testing.assert_close(said[1:], line[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said[0], model.line.image_mean)
    found = model.code_inputs(line)
    coordinates = codec.project(line) / codec.variance.sqrt()
    torch.testing.assert_close(found, coordinates[..., None].float() * model.coordinate_in, rtol=1e-3, atol=1e-3)
    tokens, _, dots, codes, _ = (x[:1] for x in make_inputs())
    base = model(tokens, text[1:2], dots, codes, keep[1:2])
    with torch.no_grad():
        model.coordinates.bias[2] += 1
    change = (model(tokens, text[1:2], dots, codes, keep[1:2]) - base).abs().amax(-1)[0]
    assert (change[:2] == 0).all()
    assert (change[2:] > 1e-6).all()


def test_an_embedding_is_its_codes_and_across_their_components_what_the_line_says() -> None:
    model, line, codec, batch = make_ridge()
    codes = codec.encode(batch["image_embedding"])
    z = model.image_embedding(codes, codec, batch["tokens"], batch["text_embedding"]).double()
    basis = torch.linalg.svd(codec.components).Vh  # the components' plane first, then across it
    coded, across = basis[:CODES], basis[CODES:]
    length = torch.cat(
        [(codec.decode(codes).double() - codec.mean) @ coded.T, (line.double() - codec.mean) @ across.T], 1
    )
    expected = codec.mean + length @ basis
    torch.testing.assert_close(z, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)
    plain = make().float()
    alone = plain.image_embedding(codes, codec, batch["tokens"], batch["text_embedding"])
    torch.testing.assert_close(alone, torch.nn.functional.normalize(codec.decode(codes), dim=-1))


def test_a_text_embedding_has_noise_in_training_alone() -> None:
    batch, codec = make_batch(4000)
    noise = noise_along(codec, RandomStreams([(0, 4000)]), 0.6)
    spread = (noise.double() @ codec.components.T).square().mean(0) / codec.variance
    torch.testing.assert_close(spread, torch.full((CODES,), 0.072).double(), rtol=0.1, atol=0)  # 0.6 squared, over 5
    few = {name: rows[:8] for name, rows in batch.items()}
    quiet, loud = make(drop_text=0).float(), make(drop_text=0, text_noise=0.6).float()
    seen = ar_prior_loss(loud, few, RandomStreams([(0, 8)]), codec).total
    assert torch.equal(seen, ar_prior_loss(quiet.train(), few, RandomStreams([(0, 8)]), codec).total)
    assert (seen - ar_prior_loss(loud.train(), few, RandomStreams([(0, 8)]), codec).total).abs().mean() > 1e-3
