"""The reference backend: naive attention, every step a line. It is the oracle, not a fast path."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import philox
from ..problem import Gradients, Inputs, Problem, accumulation_dtype

NAME = "reference"
DEVICE = None
AUTOMATIC = True


def limits(problem: Problem) -> list[str]:
    """It takes everything."""
    return []


def why_not(problem: Problem) -> list[str]:
    return limits(problem)


def kernel(problem: Problem) -> str:
    return "reference/naive"


class Naive(NamedTuple):
    """Naive attention's intermediate results, (B, Hq, Lq, Lk) each but lse (B, Hq, Lq)."""

    weights: torch.Tensor  # softmax(logits), 0 where hidden
    kept: torch.Tensor  # dropout's factors: 0 or 1 / (1 - p)
    visible: torch.Tensor
    softcap_slope: torch.Tensor | float
    lse: torch.Tensor


def naive(problem: Problem, inputs: Inputs) -> Naive:
    """The softmax of naive attention; key and value have query's heads."""
    query, key, _, bias, alibi_slopes, sinks, seed = inputs
    logits = query @ key.transpose(-1, -2) * problem.scale
    softcap_slope: torch.Tensor | float = 1.0
    if problem.softcap:
        tanh = torch.tanh(logits / problem.softcap)
        logits, softcap_slope = problem.softcap * tanh, 1 - tanh * tanh
    visible = problem.mask.dense(problem.q_len, problem.k_len, query.device)
    if alibi_slopes is not None:
        q, k = (torch.arange(n, device=query.device) for n in (problem.q_len, problem.k_len))
        logits = logits - alibi_slopes[..., None, None] * (q[:, None] + problem.mask.shift - k).abs()
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        logits, visible = logits + bias, visible & (bias != -torch.inf)
    logits = torch.where(visible, logits, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : problem.k_len]
    weights = torch.where(lse[..., None] == -torch.inf, 0, weights)
    kept = torch.ones((), dtype=query.dtype)
    if seed is not None:
        kept = philox.keep_mask(int(seed), problem.dropout_p, *weights.shape).to(weights)
        kept = kept / (1 - problem.dropout_p) if problem.dropout_p < 1 else kept
    return Naive(weights, kept, visible.expand_as(weights), softcap_slope, lse)


def forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    with torch.autocast(problem.device, enabled=False):
        _forward(problem, _prepare(problem, inputs), out, lse)


def _forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    step = naive(problem, inputs)
    out.copy_(_visible_matmul(step.weights * step.kept, inputs.value, step.visible))
    lse.copy_(step.lse)


def backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    with torch.autocast(problem.device, enabled=False):
        _backward(problem, _prepare(problem, inputs), out, grad_out, grad_lse, gradients)


def _backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    query, key, value, *_ = inputs
    out, grad_out = out.to(query.dtype), grad_out.to(query.dtype)
    weights, kept, visible, softcap_slope, lse = naive(problem, inputs)
    delta = (grad_out * out).sum(-1) - (0 if grad_lse is None else grad_lse)
    grad_weights = grad_out @ value.transpose(-1, -2)
    grad_logits = torch.where(visible, weights * (grad_weights * kept - delta[..., None]), 0)
    grad_scores = grad_logits * softcap_slope * problem.scale
    grad_scores = torch.where(visible, grad_scores, 0)
    seen_by = visible.transpose(-1, -2)
    gradients.query.copy_(_visible_matmul(grad_scores, key, visible))
    gradients.key.copy_(_sum_groups(problem, _visible_matmul(grad_scores.transpose(-1, -2), query, seen_by)))
    gradients.value.copy_(_sum_groups(problem, _visible_matmul((weights * kept).transpose(-1, -2), grad_out, seen_by)))
    if gradients.bias is not None:
        gradients.bias.copy_(grad_logits.sum_to_size(gradients.bias.shape))
    if gradients.sinks is not None:
        assert inputs.sinks is not None
        gradients.sinks.copy_(-(torch.exp(inputs.sinks[:, None] - lse) * delta).sum((0, 2)))


def _prepare(problem: Problem, inputs: Inputs) -> Inputs:
    """Query, key and value in the accumulation dtype, key and value repeated to query's heads."""
    dtype = accumulation_dtype(problem.dtype)
    ratio = problem.q_heads // max(problem.kv_heads, 1)
    key, value = (tensor.to(dtype).repeat_interleave(ratio, dim=1) for tensor in (inputs.key, inputs.value))
    return inputs._replace(query=inputs.query.to(dtype), key=key, value=value)


def _sum_groups(problem: Problem, grad: torch.Tensor) -> torch.Tensor:
    """(B, Hq, Lk, D) -> (B, Hkv, Lk, D): the query heads of a group share their key head's gradient."""
    return grad.unflatten(1, (problem.kv_heads, -1)).sum(2) if problem.kv_heads else grad


def _visible_matmul(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """weights @ values, where NaN and inf in values count only for the rows that see them (0 * NaN is NaN)."""
    bad = ~values.isfinite()
    if not bad.any():
        return weights @ values
    touched = visible.to(weights.dtype) @ bad.to(weights.dtype) > 0
    return torch.where(touched, weights @ values, weights @ values.masked_fill(bad, 0))
