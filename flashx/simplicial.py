"""2-simplicial attention: each weight belongs to a query and a pair of keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch

from . import dispatch
from .attention import EXPLAINERS, AttentionResult, Explanation, attention, explain
from .backends import triton
from .checks import check_int, check_tensor
from .masks import IntervalMask
from .ops import last_contiguous
from .problem import Inputs, Problem, accumulation_dtype, check_qkv, shape

_FUSED = "simplicial"
_T = TypeVar("_T")
# Rows (queries times second keys) that are computed at a time: what bounds the memory.
_ROWS = 2**13


@overload
def simplicial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key2: torch.Tensor,
    value2: torch.Tensor,
    window: int,
    window2: int,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def simplicial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key2: torch.Tensor,
    value2: torch.Tensor,
    window: int,
    window2: int,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def simplicial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key2: torch.Tensor,
    value2: torch.Tensor,
    window: int,
    window2: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Causal attention to pairs of keys, with trilinear logits.

    ``logits[i, j, k] = scale * sum_d query[i, d] key[j, d] key2[k, d]`` for ``i - window < j <= i`` and
    ``i - window2 < k <= i``; ``out[i] = sum_jk softmax_jk(logits[i])[j, k] * value[j] * value2[k]``, values multiplied
    element by element (Roy et al., "Fast and Simplex: 2-Simplicial Attention in Triton", sections 3 and 4).

    A row with its second key is a query, ``query[i] * key2[k]``, of plain windowed attention. On GPUs fused Triton
    kernels make these queries as they go, where there is Triton and they take the call (``flashx.explain`` says why
    not). Elsewhere the second keys of a row are to the kernels of ``flashx.attention`` what the heads of a group are
    (GQA): they share the key tiles that they read. Rows are taken in chunks, so memory does not grow with
    ``L * window2``; the backward computes each chunk anew.

    Args:
        query: (B, Hq, L, D), D up to 256.
        key, key2: (B, Hkv, L, D); Hq must be a multiple of Hkv.
        value, value2: (B, Hkv, L, Dv).
        window: first keys that a row sees, itself among them; at least 1.
        window2: second keys that a row sees, likewise. Cost grows with ``L * window * window2``.
        scale: default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp over all pairs, differentiable too.
        backend: as in ``flashx.attention``.

    Returns:
        out (B, Hq, L, Dv), or ``AttentionResult(out, lse)``.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> q, k, v, k2, v2 = (torch.randn(1, 4, 300, 64) for _ in range(5))
        >>> flashx.simplicial_attention(q, k, v, k2, v2, window=128, window2=16).shape
        torch.Size([1, 4, 300, 64])
    """
    widths, number = _checked(query, key, value, key2, value2, window, window2, scale)
    tensors = (query, key, value, key2, value2)
    problem, against = _fused(tensors, widths, number, backend)
    if problem is not None and not against:
        out, lse = _Fused.apply(*tensors, widths, problem)
    else:
        out, lse = _Simplicial.apply(*tensors, widths, number, backend)
    return AttentionResult(out, lse) if return_lse else out


class _Widths(NamedTuple):
    first: int
    second: int


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key2: torch.Tensor,
    value2: torch.Tensor,
    window: int,
    window2: int,
    scale: float | None,
) -> tuple[_Widths, float]:
    """The arguments checked: the windows, no wider than the tensors are long, and the scale."""
    for name, tensor in (("query", query), ("key", key), ("value", value), ("key2", key2), ("value2", value2)):
        check_tensor(name, tensor)
    check_qkv(query, key, value)
    for name, tensor, like, of in (("key2", key2, key, "key"), ("value2", value2, value, "value")):
        if shape(tensor) != shape(like):
            raise ValueError(f"{name} must have {of}'s shape {shape(like)}, got {shape(tensor)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(f"{name} must be {query.dtype} on {query.device}, got {tensor.dtype} on {tensor.device}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"key must have query's length {query.shape[2]}, got shape {shape(key)}")
    for name, width in (("window", window), ("window2", window2)):
        check_int(name, width, at_least=1)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    length = max(query.shape[2], 1)
    widths = _Widths(min(window, length), min(window2, length))
    number = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    return widths, number


def _fused(
    tensors: tuple[torch.Tensor, ...], widths: _Widths, scale: float, backend: str | None
) -> tuple[Problem | None, list[str]]:
    """What the fused kernels are asked to run, the attention over the keys of the wider window, and the reasons against
    that; without a problem where nobody asks them."""
    dispatch.check_name(backend)
    if backend not in (None, triton.NAME) or (backend is None and not tensors[0].is_cuda):
        return None, []
    mask = IntervalMask(left=max(widths) - 1, right=0)
    problem = Problem.from_tensors(_inputs(_wider_first(tensors, widths)), mask, scale)
    return problem, triton.simplicial_why_not(problem)


def _wider_first(tensors: tuple[_T, ...], widths: _Widths) -> tuple[_T, ...]:
    """With the keys and values exchanged where the second window is the wider one: it makes tiles, the other pairs."""
    query, key, value, key2, value2 = tensors
    return tensors if widths.first >= widths.second else (query, key2, value2, key, value)


def _inputs(tensors: tuple[torch.Tensor, ...]) -> Inputs:
    query, key, value, _, _ = tensors
    return Inputs(query, key, value, None, None, None, None)


class _Fused(torch.autograd.Function):
    """The fused kernels."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        widths, problem = arguments[5:]
        tensors = tuple(last_contiguous(tensor) for tensor in arguments[:5])
        ordered = _wider_first(tensors, widths)
        out, lse = triton.simplicial_forward(problem, _inputs(ordered), ordered[3], ordered[4], min(widths))
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options = (widths, problem)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        *saved, out, lse = ctx.saved_tensors
        widths, problem = ctx.options
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        grad_out = torch.zeros_like(out) if grad_out is None else last_contiguous(grad_out)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        query, first, second = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[3:5])
        needed = (query, first, first, second, second)
        gradients = tuple(torch.empty_like(t) if need else None for t, need in zip(saved, needed, strict=True))
        tensors = _wider_first(tuple(saved), widths)
        triton.simplicial_backward(
            problem, _inputs(tensors), tensors[3], tensors[4], min(widths), out, lse, grad_out, grad_lse,
            _wider_first(gradients, widths),
        )  # fmt: skip
        return (*gradients, None, None)


def _chunks(query: torch.Tensor, widths: _Widths) -> Iterator[tuple[int, int]]:
    """Queries [begin, end) that are computed together."""
    rows = max(query.shape[0] * query.shape[1] * widths.second, 1)
    step = max(_ROWS // rows, 16)
    for begin in range(0, query.shape[2], step):
        yield begin, min(begin + step, query.shape[2])


def _slices(tensors: tuple[torch.Tensor, ...], begin: int, end: int, widths: _Widths) -> tuple[torch.Tensor, ...]:
    """What the queries [begin, end) read of query, key, value, key2, value2."""
    first, second = max(begin - widths.first + 1, 0), max(begin - widths.second + 1, 0)
    starts = (begin, first, first, second, second)
    return tuple(tensor[:, :, start:end] for tensor, start in zip(tensors, starts, strict=True))


def _options(widths: _Widths, scale: float, backend: str | None) -> dict[str, Any]:
    """flashx.attention's, for a chunk."""
    return {"causal": True, "window": (widths.first - 1, 0), "scale": scale, "backend": backend}


def _attend(
    tensors: tuple[torch.Tensor, ...], begin: int, widths: _Widths, scale: float, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of a chunk's queries, from its slices."""
    query, key, value, key2, value2 = tensors
    batch, q_heads, count, dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    missing = max(widths.second - 1 - begin, 0)
    # (B, Hkv, count, dim, window2): the last one is the query's own position.
    seen_keys, seen_values = (
        torch.nn.functional.pad(tensor, (0, 0, missing, 0)).unfold(2, widths.second, 1) for tensor in (key2, value2)
    )
    groups = query.unflatten(1, (kv_heads, -1))  # (B, Hkv, group, count, dim)
    pairs = groups[:, :, :, None] * seen_keys.permute(0, 1, 4, 2, 3)[:, :, None]
    rows = pairs.reshape(batch, q_heads * widths.second, count, dim)
    out, lse = attention(rows, key, value, **_options(widths, scale, backend), return_lse=True)
    parts = (batch, kv_heads, q_heads // kv_heads, widths.second, count)
    position = torch.arange(begin, begin + count, device=query.device)
    offset = torch.arange(widths.second - 1, -1, -1, device=query.device)[:, None]
    lse = lse.view(parts).masked_fill(offset > position, -torch.inf)
    total = lse.logsumexp(3)
    weights = torch.exp(lse - total[:, :, :, None])[..., None]
    products = out.view(*parts, value_dim).to(lse.dtype) * seen_values.permute(0, 1, 4, 2, 3)[:, :, None]
    return (weights * products).sum(3).flatten(1, 2).to(query.dtype), total.flatten(1, 2)


class _Simplicial(torch.autograd.Function):
    """Chunk by chunk, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tensors, options = arguments[:5], arguments[5:]
        query, value = tensors[0], tensors[2]
        out = query.new_empty(*query.shape[:3], value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
        if out.shape[1] > 0:
            for begin, end in _chunks(query, options[0]):
                slices = _slices(tensors, begin, end, options[0])
                out[:, :, begin:end], lse[:, :, begin:end] = _attend(slices, begin, *options)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        tensors, widths = ctx.saved_tensors, ctx.options[0]
        if (grad_out is None and grad_lse is None) or tensors[0].shape[1] == 0:
            return (None,) * 8
        sums = [torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype)) for tensor in tensors]
        for begin, end in _chunks(tensors[0], widths):
            with torch.enable_grad():
                slices = tuple(part.detach().requires_grad_() for part in _slices(tensors, begin, end, widths))
                results = _attend(slices, begin, *ctx.options)
            pairs = [
                (result, grad[:, :, begin:end])
                for result, grad in zip(results, (grad_out, grad_lse), strict=True)
                if grad is not None
            ]
            grads = torch.autograd.grad([r for r, _ in pairs], slices, [g for _, g in pairs], materialize_grads=True)
            for total, grad in zip(_slices(tuple(sums), begin, end, widths), grads, strict=True):
                total += grad
        return (*(total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)), None, None, None)


def _explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key2: torch.Tensor,
    value2: torch.Tensor,
    window: int,
    window2: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Of the fused kernels; or of the call that the longest chunk makes, the last of them: all of its rows see as many
    keys as any."""
    widths, number = _checked(query, key, value, key2, value2, window, window2, scale)
    problem, against = _fused((query, key, value, key2, value2), widths, number, backend)
    if problem is not None and not against:
        others = {name: why for name, why in dispatch.refusals(problem).items() if name != triton.NAME}
        kernel = f"{triton.kernel(problem)}/{_FUSED}"
        return Explanation(problem, triton.NAME, kernel, {**others, triton.NAME: []})
    begin, end = max(_chunks(query, widths), key=lambda chunk: (chunk[1] - chunk[0], chunk[0]), default=(0, 0))
    query, key, value = _slices((query, key, value, key2, value2), begin, end, widths)[:3]
    batch, q_heads, count, dim = query.shape
    rows = query.new_empty(()).expand(batch, q_heads * widths.second, count, dim)
    explained = explain(rows, key, value, **_options(widths, number, backend))
    if against:
        explained = explained._replace(refusals={**explained.refusals, f"{triton.NAME}/{_FUSED}": against})
    return explained


EXPLAINERS[simplicial_attention] = _explain
