from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.diffusion.process import posterior_variance, q_sample
from models.diffusion.schedules import make_schedule, strided_grid
from models.diffusion_prior import (
    DiffusionPrior,
    best_of,
    diffusion_prior_gamma,
    diffusion_prior_loss,
    diffusion_prior_variance,
)
from models.folder import load_model, save_model
from models.prior_configs import DiffusionPriorConfig
from models.random_streams import RandomStreams

CONFIG = DiffusionPriorConfig(text_context=10, width=32, depth=2, heads=2, vocabulary=50)
DIM = 12
SCHEDULE = make_schedule("cosine", 1000)


def make() -> DiffusionPrior:
    torch.manual_seed(0)
    model = DiffusionPrior(CONFIG, DIM).double().eval()
    for parameter in model.parameters():  # larger than at the start of training, so that every input has weight
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(rows: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 48, (rows, 10), generator=g)
    tokens[:, 7] = 49
    text = F.normalize(torch.randn(rows, DIM, generator=g), dim=-1)
    image = F.normalize(text + 0.3 * torch.randn(rows, DIM, generator=g), dim=-1)
    return {"tokens": tokens, "text_embedding": text, "image_embedding": image}


def test_scale_is_the_papers_at_its_dimension() -> None:
    assert DiffusionPrior(CONFIG, 1024).scale == pytest.approx(17.2, abs=1e-9)


def test_every_input_reaches_the_output() -> None:
    model, batch = make(), make_batch(1)
    x_t, t, keep = torch.randn(1, DIM), torch.tensor([300]), torch.tensor([True])
    inputs = (x_t, t, batch["tokens"], batch["text_embedding"], keep)
    base = model(*inputs)
    for i, changed in enumerate((x_t + 1, t + 100, batch["tokens"] - 1, -batch["text_embedding"], ~keep)):
        altered = [*inputs[:i], changed, *inputs[i + 1 :]]
        assert (model(*altered) - base).abs().max() > 1e-6
    padded = batch["tokens"].clone()
    padded[0, 8:] = 3  # behind the end token nothing counts
    assert torch.equal(model(x_t, t, padded, batch["text_embedding"], keep), base)


def test_hidden_text_still_shows_the_noised_embedding() -> None:
    model, batch = make(), make_batch(2)
    x_t, t, hide = torch.randn(1, DIM).expand(2, -1), torch.tensor([300, 300]), torch.tensor([False, False])
    out = model(x_t, t, batch["tokens"], batch["text_embedding"], hide)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-12)
    other = model(x_t + 1, t, batch["tokens"], batch["text_embedding"], hide)
    assert (other - out).abs().max() > 1e-6


def test_captions_that_were_read_once_serve_every_step() -> None:
    model, batch = make(), make_batch(3)
    captions = (batch["tokens"], batch["text_embedding"], torch.tensor([True, False, True]))
    condition = model.condition(*captions)
    for step in (900, 40, 0):
        x_t, t = torch.randn(3, DIM), torch.tensor([step, step // 2, 0])
        whole = model(x_t, t, *captions)
        torch.testing.assert_close(model.predict(x_t, t, condition), whole, rtol=0, atol=1e-12)


def test_loss_is_the_squared_error_at_the_diffusions_scale() -> None:
    model, batch, rng = make(), make_batch(6), RandomStreams([(0, 4), (1, 2)])
    x0 = batch["image_embedding"] * 0.5375 * DIM**0.5
    t, noise = rng.integers("t", 1000), rng.normal("noise", DIM)
    level = SCHEDULE.alpha_bar[t][:, None]
    x_t = level.sqrt() * x0 + (1 - level).sqrt() * noise
    out = model(x_t, t, batch["tokens"], batch["text_embedding"], torch.ones(6).bool())
    total = diffusion_prior_loss(model, batch, rng).total
    torch.testing.assert_close(total, (out - x0).square().mean(1).float(), rtol=1e-4, atol=1e-5)


def test_text_is_hidden_from_a_tenth_of_the_training_rows() -> None:
    model, batch, rng = make().float(), make_batch(2000), RandomStreams([(0, 2000)])
    seen = diffusion_prior_loss(model, batch, rng).total
    hidden = (seen - diffusion_prior_loss(model.train(), batch, rng).total).abs() > 1e-4
    assert 160 < hidden.sum() < 240


def test_loss_is_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    model, batch, rng = DiffusionPrior(CONFIG, DIM), make_batch(8), RandomStreams([(0, 8)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = diffusion_prior_loss(model, batch, rng).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, diffusion_prior_loss(model, batch, rng).total, rtol=0, atol=0.03)


def test_embeddings_of_samples_have_their_direction_and_unit_norm() -> None:
    embedding = make_batch(4)["image_embedding"]
    samples = embedding * torch.tensor([0.1, 1.0, 5.0, 20.0])[:, None]
    torch.testing.assert_close(make().image_embedding(samples), embedding, rtol=0, atol=1e-6)


def test_best_of_keeps_the_best_direction_of_each_row() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    samples = F.normalize(torch.tensor([[[9.0, 9.0], [0.1, 0.3]], [[0.2, 0.0], [5.0, 5.0]]]), dim=-1)
    assert torch.equal(best_of(samples, text), torch.stack([samples[1, 0], samples[0, 1]]))


# --- Analytic-DPM -----------------------------------------------------------------------------------------------------


def test_gamma_is_the_mean_square_of_the_noise_that_the_prior_predicts() -> None:
    """At the first and the last timestep, which are always measured; over all rows of all batches, text shown."""
    model, batch = make(), make_batch(40)
    halves = [{name: column[part] for name, column in batch.items()} for part in (slice(10), slice(10, None))]
    gamma = diffusion_prior_gamma(
        model, list(zip(halves, (RandomStreams([(1, 10)]), RandomStreams([(2, 30)])), strict=True))
    )
    assert (gamma.dtype, gamma.shape) == (torch.float32, (1000,))
    assert torch.isfinite(gamma).all()
    for t in (0, 999):
        noise = torch.cat(
            [RandomStreams([(1, 10)]).normal(f"gamma{t}", DIM), RandomStreams([(2, 30)]).normal(f"gamma{t}", DIM)]
        )
        level = SCHEDULE.alpha_bar[t]
        x_t = q_sample(batch["image_embedding"] * model.scale, noise, level.expand(40))
        out = model(x_t, torch.full((40,), t), batch["tokens"], batch["text_embedding"], torch.ones(40).bool())
        eps = (x_t - level.sqrt() * out) / (1 - level).sqrt()
        expected = 1 + (eps**2 - noise**2).mean()
        assert gamma[t].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_prior_is_saved_and_loaded_with_its_gamma_and_without(tmp_path: Path) -> None:
    model = make().float()
    gamma = torch.rand(1000)
    save_model(tmp_path / "before", model)
    save_model(tmp_path / "after", model, model.state_dict() | {"gamma": gamma})
    before, after = load_model(tmp_path / "before"), load_model(tmp_path / "after")
    assert before.gamma is None
    assert torch.equal(after.gamma, gamma)
    assert after.state_dict().keys() - before.state_dict().keys() == {"gamma"}
    save_model(tmp_path / "again", after)
    assert torch.equal(load_model(tmp_path / "again").gamma, gamma)
    save_model(tmp_path / "short", model, model.state_dict() | {"gamma": gamma[:10]})
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path / "short")


def test_a_model_in_training_has_no_buffers_to_synchronise_or_to_average() -> None:
    assert list(make().buffers()) == []
    assert "gamma" not in make().state_dict()


def test_the_variance_is_the_small_one_until_gamma_is_known() -> None:
    model, grid = make(), strided_grid(1000, 64)
    assert diffusion_prior_variance(model, grid) == "small"
    small = posterior_variance(SCHEDULE.at(grid), SCHEDULE.at(torch.tensor([*grid.tolist()[1:], -1])))
    for gamma in (torch.ones(1000), torch.zeros(1000)):
        model.gamma = gamma
        variance = diffusion_prior_variance(model, grid)
        assert isinstance(variance, Tensor)
        assert ((variance == small) if gamma.any() else (variance > small)).all()
        assert (variance <= small + 1.1 * CONFIG.scale**2).all()  # the mean square of a scaled component
