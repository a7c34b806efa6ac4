import open_clip
import pytest
import torch
from torch import Tensor, nn

from models.nn.transformer import Block, Cache, CaptionEmbedding, Transformer, is_padding, quick_gelu


def make(causal: bool) -> Transformer:
    torch.manual_seed(0)
    return Transformer(32, 2, 4, causal=causal).double().eval()


def test_a_masked_block_equals_pytorchs_own_attention() -> None:
    torch.manual_seed(0)
    block = Block(32, 4, causal=True, dropout=0.0, joining_std=0.02).double()
    peer = nn.MultiheadAttention(32, 4, batch_first=True).double()
    weights = {"in_proj_": block.qkv, "out_proj.": block.attention_out}
    peer.load_state_dict({f"{name}{end}": getattr(m, end) for name, m in weights.items() for end in ("weight", "bias")})
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    shown = torch.tensor([[True, True, False, True, True], [True, False, False, False, True]])
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = peer(x, x, x, key_padding_mask=~shown, attn_mask=future)
    ours = block.attention_out(block._attend(x, 0, None, shown))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_quick_gelu_is_open_clips() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), open_clip.transformer.QuickGELU()(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("causal", [True, False])
def test_hidden_positions_do_not_matter_to_the_others(causal: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    shown = torch.ones(1, 9, dtype=torch.bool)
    torch.testing.assert_close(make(causal)(x, shown=shown), make(causal)(x), rtol=0, atol=1e-12)
    shown[:, [3, 6]] = False
    changed = x.clone()
    changed[:, 3] = torch.randn(32)
    difference = (make(causal)(x, shown=shown) - make(causal)(changed, shown=shown)).abs().amax(-1)[0]
    assert (difference > 0).tolist() == [i == 3 for i in range(9)]


def test_the_last_position_alone_is_the_same_without_the_others() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    shown = torch.ones(3, 9, dtype=torch.bool)
    shown[1, [3, 8]] = False
    for model in (make(True), make(False)):
        for mask in (None, shown):
            expected, alone = model(x, shown=mask)[:, -1:], model(x, shown=mask, last_only=True)
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


def test_causal_output_depends_on_nothing_to_its_right() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5] = torch.randn(32)
    difference = (make(causal=True)(x) - make(causal=True)(changed)).abs().amax(-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 0).all()
    assert ((make(causal=False)(x) - make(causal=False)(changed)).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("parts", [(9,), (1,) * 9, (4, 1, 1, 1, 1, 1), (4, 3, 2), (1, 5, 3)])
@pytest.mark.parametrize("hidden", [(), (2,), (1, 3)])
def test_cache_gives_what_one_pass_gives(parts: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    transformer = make(causal=True)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    shown = torch.ones(2, 9, dtype=torch.bool)
    shown[1, [i for i in hidden if i < parts[0]]] = False
    cache = Cache(9)
    given: Tensor | None = shown[:, : parts[0]] if hidden else None
    out = []
    for part in x.split(parts, dim=1):
        out.append(transformer(part, cache, given))
        given = None
    torch.testing.assert_close(torch.cat(out, 1), transformer(x, shown=shown), rtol=0, atol=1e-12)


def test_positions_are_taken_back_from_a_cache() -> None:
    transformer, cache = make(causal=True), Cache(6)
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    transformer(x[:, :4], cache)
    for start in (4, 6):
        out = transformer(x[:, start : start + 2], cache, last_only=True)
        whole = transformer(torch.cat([x[:, :4], x[:, start : start + 2]], dim=1), last_only=True)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
        cache.length -= 2


def test_padding_starts_after_the_first_end_token() -> None:
    tokens = torch.tensor([[8, 0, 9, 0, 0], [8, 1, 2, 3, 9], [8, 9, 0, 9, 0]])
    assert is_padding(tokens, end=9).tolist() == [
        [False, False, False, True, True],
        [False] * 5,
        [False, False, True, True, True],
    ]


def test_a_dropped_caption_is_all_padding_and_differs_from_an_empty_one() -> None:
    torch.manual_seed(0)
    caption = CaptionEmbedding(10, 5, 16)
    tokens = torch.tensor([[8, 1, 9, 0, 0], [8, 9, 0, 0, 0]])
    out = caption(tokens, torch.tensor([False, True]))
    assert torch.equal(out[0], caption.padding)
    assert torch.equal(out[1, 2:], caption.padding[2:])
    assert not torch.equal(out[1, :2], caption.padding[:2])
    with pytest.raises(ValueError, match="5 tokens or more, got 4"):
        caption(tokens[:, :4], torch.tensor([True, True]))


def test_a_long_caption_is_cut() -> None:
    caption = CaptionEmbedding(10, 3, 16)
    keep = torch.tensor([True])
    long = caption(torch.tensor([[8, 1, 2, 3, 9]]), keep)
    assert torch.equal(long, caption(torch.tensor([[8, 1, 2]]), keep))
