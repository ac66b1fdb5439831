"""The reference backend against torch's own attention: the two oracles, this one and tolerance.py's, have a third."""

from __future__ import annotations

import pytest
import torch
from cases import BIASES, LENGTHS, Bias, Case, default_scale
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashx

# torch has no lse, sinks, softcap, slopes or windows: what is left are lengths, masks, biases and groups.
CASES = [
    *(case for case in LENGTHS if not case.causal or case.q_len == case.k_len),  # torch's causal is aligned top-left
    *(case for case in BIASES if not case.causal and case.bias.values != "add32"),
    Case(33, 65, 8, 24, batch=2, heads=6, kv_heads=2, scale=0.3),
    Case(33, 33, 8, batch=2, heads=8, kv_heads=1, causal=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    results = []
    for ours in (True, False):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.differentiable().items()}
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        bias = leaves.get("bias", inputs.bias)
        if ours:
            out = flashx.attention(
                query, key, value, bias=bias, causal=case.causal, scale=case.scale, backend="reference"
            )
        else:
            if bias is not None:
                bias = bias.expand(case.batch, case.heads, case.q_len, case.k_len)
            with sdpa_kernel(SDPBackend.MATH):
                out = scaled_dot_product_attention(
                    query, key, value, bias, is_causal=case.causal, scale=default_scale(case), enable_gqa=True
                )
        grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out)
        results.append((out.detach(), *grads))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_lse_by_hand() -> None:
    """Two keys with logits 0 and ln 3, and a sink of ln 4: weights 1/8 and 3/8, lse ln 8."""
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)
    key[0, 0, 1, 0] = torch.tensor(3.0).log()
    value = torch.tensor([8.0, 16.0]).view(1, 1, 2, 1)
    out, lse = flashx.attention(
        query, key, value, sinks=torch.tensor([4.0]).log(), return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out.item(), 1 / 8 * 8 + 3 / 8 * 16)
    torch.testing.assert_close(lse.item(), torch.tensor(8.0).log().item())


def test_every_feature_by_hand() -> None:
    """One query at position 2 of three keys, window (1, None), so that key 0 is out of sight; logits in plain sight."""
    query = torch.tensor([[[[2.0]]]])
    key, value = torch.tensor([[[[9.0], [1.0], [3.0]]]]), torch.tensor([[[[100.0], [10.0], [20.0]]]])
    bias, slope, cap, scale = torch.tensor([0.0, 0.25, -0.5]), 0.125, 4.0, 0.5
    capped = [cap * torch.tensor(scale * 2.0 * k / cap).tanh().item() for k in (1.0, 3.0)]
    logits = torch.tensor([capped[0] + 0.25 - slope * 1, capped[1] - 0.5 - slope * 0], dtype=torch.float64)
    weights = logits.softmax(0)
    out, lse = flashx.attention(
        query,
        key,
        value,
        window=(1, None),
        bias=bias,
        alibi_slopes=torch.tensor([slope]),
        softcap=cap,
        scale=scale,
        return_lse=True,
        backend="reference",
    )
    assert out.item() == pytest.approx((weights * torch.tensor([10.0, 20.0])).sum().item(), rel=1e-6)
    assert lse.item() == pytest.approx(logits.logsumexp(0).item(), rel=1e-6)


def test_it_takes_what_the_kernels_refuse() -> None:
    query = torch.randn(1, 2, 5, 300, dtype=torch.float64)
    out = flashx.attention(query, query, query, backend="reference")
    torch.testing.assert_close(out, scaled_dot_product_attention(query, query, query))


def test_bool_bias_broadcasts() -> None:
    case = Case(3, 4, 2, batch=2, heads=2, bias=Bias("b11k", "bool"))
    inputs = case.inputs(torch.float64)
    tensors = inputs.query, inputs.key, inputs.value
    out = flashx.attention(*tensors, bias=inputs.bias, backend="reference")
    wide = flashx.attention(*tensors, bias=inputs.bias.expand(2, 2, 3, 4), backend="reference")
    assert torch.equal(out, wide)
