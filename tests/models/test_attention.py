import pytest
import torch
import torch.nn.functional as F

from models.nn.attention import FEW_KEYS, attend


def equals_fused_attention_in_fp64(dtype: torch.dtype, tolerance: float, keys: int) -> None:
    g = torch.Generator().manual_seed(0)
    shown = torch.rand(3, 1, 1, keys, generator=g) < 0.7
    shown[..., 0] = True
    for queries, mask, causal in ((7, None, False), (7, shown, False), (keys, None, True)):
        exact = [
            torch.randn(3, 2, n, 16, generator=g).to(dtype).double().requires_grad_() for n in (queries, keys, keys)
        ]
        ours = [part.detach().to(dtype).requires_grad_() for part in exact]
        expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=causal)
        query, key, value = ours
        result = attend(query, key, value, mask, causal)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
        upstream = torch.randn(result.shape, generator=g)
        result.backward(upstream.to(dtype))
        expected.backward(upstream.to(dtype).double())
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=5 * tolerance)


def test_few_keys_in_bf16_give_what_fused_attention_gives() -> None:
    equals_fused_attention_in_fp64(torch.bfloat16, 0.03, 37)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "keys"),
    [(torch.float32, 1e-4, 37), (torch.float32, 1e-4, FEW_KEYS + 1), (torch.bfloat16, 0.03, FEW_KEYS + 1)],
)
def test_any_number_of_keys_gives_what_fp64_gives(dtype: torch.dtype, tolerance: float, keys: int) -> None:
    equals_fused_attention_in_fp64(dtype, tolerance, keys)
