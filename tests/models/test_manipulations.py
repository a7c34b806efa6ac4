"""What UnCLIP does with images: inversion, variations, interpolation, text differences, principal components."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models import cascade
from models.cascade import UnCLIP
from models.decoder import Decoder
from models.diffusion.schedules import trailing_grid
from models.manipulation import Inversion, first_components, slerp
from models.pixels import from_uint8
from models.tokens import tokenize
from models.view import view
from tests.models.small_models import DECODER, DIM, IMAGES, make


@pytest.fixture(scope="module")
def unclip() -> UnCLIP:
    """Its decoder predicts v with weights so small that the way from data to noise is smooth."""
    whole: Any = make()
    torch.manual_seed(1)
    decoder = Decoder(replace(DECODER, prediction="v"), DIM)
    for name, parameter in decoder.eval().named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if name.startswith("text") else 0.05)
    return replace(whole, decoder=decoder)


def _distance(unclip: UnCLIP, inversion: Inversion, steps: int) -> float:
    """From the images to what their latents become, as a mean over pixels in [-1, 1]."""
    drawn = unclip.reconstruct(inversion, decoder_steps=steps, size=64).images[16]
    truth = np.stack([view(p, 16) for p in IMAGES])
    return float((drawn.float() - torch.from_numpy(truth).float()).abs().mean() / 127.5)


def test_a_image_becomes_its_latents_and_they_the_image(unclip: UnCLIP) -> None:
    error = {}
    for steps in (8, 20, 50):
        inversion = unclip.invert(IMAGES, decoder_steps=steps)
        assert inversion.noise.shape == (2, 3, 16, 16)
        error[steps] = _distance(unclip, inversion, steps)
    assert error[50] < error[20] < error[8]
    assert error[50] < 0.02
    pixels = torch.from_numpy(np.stack([view(p, 32) for p in IMAGES])).permute(0, 3, 1, 2)
    torch.testing.assert_close(inversion.embedding, unclip.clip.encode_image(pixels))


def test_a_decoder_that_predicts_the_image_is_inverted_on_the_grid_that_it_draws_on(
    unclip: UnCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ends before timestep 0: what the network draws there leads to noise that is of no image."""
    visited: list[int] = []
    original = cascade.decoder_denoise

    def recording(*words: Any) -> Any:
        denoise = original(*words)
        return lambda x, t: (visited.append(int(t[0])), denoise(x, t))[1]

    monkeypatch.setattr(cascade, "decoder_denoise", recording)
    of_images = replace(unclip, decoder=Decoder(replace(DECODER, prediction="x0"), DIM).eval())
    grid = trailing_grid(DECODER.steps, 20).tolist()
    inversion = of_images.invert(IMAGES, decoder_steps=20)
    assert visited == [grid[-1], *reversed(grid[1:])]
    visited.clear()
    of_images.reconstruct(inversion, decoder_steps=20, size=64)
    assert visited == grid


def test_the_caption_of_an_inversion_is_the_one_it_is_drawn_with(unclip: UnCLIP) -> None:
    plain, told = unclip.invert(IMAGES), unclip.invert(IMAGES, ["a red fox", "a blue house"])
    assert plain.tokens is None
    assert told.tokens is not None
    assert torch.equal(told.tokens, tokenize(["a red fox", "a blue house"]))
    assert not torch.equal(plain.noise, told.noise)
    with_caption = unclip.reconstruct(told).images[16]
    assert not torch.equal(with_caption, unclip.reconstruct(replace(told, tokens=None)).images[16])
    with pytest.raises(ValueError, match="got 2 images and 1 captions"):
        unclip.invert(IMAGES, ["one"])


def test_images_are_changed_without_guidance_and_thresholding_unless_asked(unclip: UnCLIP) -> None:
    guided = replace(unclip, sampling=replace(unclip.sampling, decoder_guidance=3.0, decoder_threshold=0.5))
    plain = guided.manipulation_sampling({})
    assert (plain.decoder_guidance, plain.decoder_threshold, plain.decoder_sampler) == (0.0, 0.0, "ddim")
    assert guided.manipulation_sampling({"decoder_threshold": 0.9}).decoder_threshold == 0.9
    one = guided.invert(IMAGES[:1])
    assert torch.equal(guided.reconstruct(one).images[16], unclip.reconstruct(one).images[16])


def test_an_inversion_has_the_threshold_that_it_is_drawn_with(unclip: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds, denoise = [], cascade.decoder_denoise
    monkeypatch.setattr(cascade, "decoder_denoise", lambda *a: thresholds.append(a[5]) or denoise(*a))
    unclip.reconstruct(unclip.invert(IMAGES[:1], decoder_threshold=0.9), decoder_threshold=0.9, size=64)
    assert thresholds == [0.9, 0.9]


def test_variations_keep_the_embedding_and_differ_by_seed_and_eta(unclip: UnCLIP) -> None:
    one = unclip.invert(IMAGES[:1], decoder_steps=50)
    drawn = unclip.variations(one, [1, 2, 1], decoder_steps=50, size=64)
    assert torch.equal(drawn.embedding, one.embedding.expand(3, -1))
    assert not torch.equal(drawn.images[16][0], drawn.images[16][1])
    assert torch.equal(drawn.images[16][0], drawn.images[16][2])
    still = unclip.variations(one, [1], eta=0.0, decoder_steps=50, size=64).images[16]
    truth = torch.tensor(view(IMAGES[0], 16)).float()

    def far(image: torch.Tensor) -> float:
        return float((image.float() - truth).abs().mean())

    little = unclip.variations(one, [1], eta=0.3, decoder_steps=50, size=64).images[16]
    assert torch.equal(still, unclip.reconstruct(one, decoder_steps=50, size=64).images[16])
    assert far(still[0]) < far(little[0]) < far(drawn.images[16][0])
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"eta is {eta}"):
            unclip.variations(one, [1], eta=eta)


def test_an_interpolation_begins_at_one_image_and_ends_at_the_other(unclip: UnCLIP) -> None:
    a, b = (unclip.invert([p]) for p in IMAGES)
    strip = unclip.interpolate(a, b, [0, 0.25, 0.5, 0.75, 1], seed=3, size=64)
    assert len(strip.images[16]) == len(strip.embedding) == 5
    for end, latents in ((0, a), (4, b)):
        torch.testing.assert_close(strip.embedding[end], latents.embedding[0])
        alone = unclip.reconstruct(latents, seed=3, size=64).images[16][0]
        assert (strip.images[16][end].int() - alone.int()).abs().max() <= 1
    torch.testing.assert_close(strip.embedding.norm(dim=1), torch.ones(5))
    along = strip.embedding @ b.embedding[0]
    assert (along.diff() > 0).all()


def test_a_text_difference_turns_the_embedding_towards_the_new_caption(unclip: UnCLIP) -> None:
    one = unclip.invert(IMAGES[:1])
    strip = unclip.text_difference(one, "a cat", "an anime drawing of a supersaiyan cat", [0.0, 0.25, 0.5], size=64)
    torch.testing.assert_close(strip.embedding[0], one.embedding[0])
    before, after = unclip.clip.encode_text(tokenize(["a cat", "an anime drawing of a supersaiyan cat"]))
    along = strip.embedding @ (after - before)
    assert (along.diff() > 0).all()
    assert len(strip.images[64]) == 3
    assert not strip.embedding.requires_grad
    with pytest.raises(ValueError, match="got 0 seeds or shares"):
        unclip.text_difference(one, "a cat", "a dog", [])


def test_where_a_prior_has_a_regression_a_text_difference_is_that_of_its_image_embeddings(
    unclip: UnCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = unclip.invert(IMAGES[:1])
    line = torch.randn(2, one.embedding.shape[1], generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(unclip.diffusion_prior, "regress", lambda tokens, text, keep: line)
    strip = unclip.text_difference(one, "a cat", "a dog", [0.5], size=64)
    towards = torch.nn.functional.normalize(line[1:] - line[:1], dim=1)
    torch.testing.assert_close(strip.embedding, slerp(one.embedding, towards, torch.tensor([0.5])))


def test_principal_components_are_drawn_from_one_noise(unclip: UnCLIP) -> None:
    embedding = unclip.invert(IMAGES[:1]).embedding
    assert unclip.codec is not None
    swept = unclip.principal_components(embedding, [0, 2, 4], seed=7, size=64)
    expected = torch.cat([first_components(unclip.codec, embedding, n) for n in (0, 2, 4)])
    torch.testing.assert_close(swept.embedding, expected)
    again = unclip.principal_components(embedding, [2], seed=7, size=64)
    assert (again.images[16][0].int() - swept.images[16][1].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="this bundle has no codec"):
        replace(unclip, ar_prior=None, codec=None).principal_components(embedding, [1])


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.ones(1, DIM + 1), rf"embeddings have shape \(1, {DIM + 1}\), this bundle's CLIP makes \[b, {DIM}\]"),
        (torch.full((1, DIM), float("nan")), "embeddings hold NaN or Inf"),
        (torch.ones(1, DIM), "embeddings have norms from 4 to 4: normalise them to 1"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(unclip: UnCLIP, embedding: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unclip.decode(embedding, None, [0], unclip.sampling)


def test_without_a_caption_the_decoder_draws_from_the_embedding_alone(unclip: UnCLIP) -> None:
    embedding = unclip.invert(IMAGES[:1]).embedding
    tokens = tokenize(["a cat"])
    without, with_one = (unclip.decode(embedding, t, [0], unclip.sampling).images[16] for t in (None, tokens))
    assert not torch.equal(without, with_one)
    assert from_uint8(without).isfinite().all()
