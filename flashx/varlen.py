"""Attention over sequences of different lengths, packed one after the other: no padding is computed or read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from . import ops
from .attention import EXPLAINERS, AttentionResult, Explanation, explain_problem, operator_arguments
from .checks import check_tensor, on_host
from .problem import shape

# Number of the operator's arguments that every call has, and of tables after them.
_PLAIN = 14
_TABLES = 6


@overload
def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention within each of B sequences that lie one after the other, in flash-attn's packed layout.

    Sequence b is the rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of query and ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]`` of key and value. Each is attended as by ``flashx.attention``, aligned bottom-right by its
    own lengths. A sequence may be empty, of queries, of keys or of both. On a GPU nothing waits for the tables: what
    they hold is clamped to what the tensors have, not checked. The layout is that of flash-attn's
    ``flash_attn_varlen_func``.

    Args:
        query: (total_q, Hq, D), float16, bfloat16, float32 or (CPU) float64. Rows from ``cu_seqlens_q[-1]`` on belong
            to no sequence and are not read; so for key and value.
        key: (total_k, Hkv, D); Hq must be a multiple of Hkv.
        value: (total_k, Hkv, Dv).
        cu_seqlens_q: (B + 1,), int32 or int64, on query's device: 0, then where each sequence's rows end.
        cu_seqlens_k: (B + 1,), as ``cu_seqlens_q``, for key and value.
        max_seqlen_q: length of the longest sequence of queries, or more. None takes it from ``cu_seqlens_q`` on the
            CPU; on a GPU it is total_q, which is right but starts blocks for nothing. There, rows of a sequence beyond
            ``max_seqlen_q`` are not computed, and whether many keys are cut in parts (split-KV) depends on it.
        max_seqlen_k: the same for keys; on a GPU, keys of a sequence beyond it are not seen.
        causal: row i of a sequence sees its key j only if ``j <= i + Lk - Lq``.
        window: (left, right), as in ``flashx.attention``.
        sink_tokens: the first keys of each sequence that stay visible however far the window is (still causal).
        alibi_slopes: (Hq,) or (B, Hq), floating.
        softcap: c > 0 gives ``c * tanh(x / c)``; 0 switches it off.
        sinks: (Hq,), floating: one more logit per head, with a zero value. Differentiable.
        dropout_p: probability in [0, 1] of dropping an attention weight.
        scale: factor on ``query . key``; default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp, differentiable too.
        backend: as in ``flashx.attention``.

    Returns:
        out (total_q, Hq, Dv), or ``AttentionResult(out, lse)`` with lse (Hq, total_q), float32, as flash-attn has it.
        A row that sees no key has out 0, lse -inf (the sink logit, if there are sinks) and gradients 0; a row of no
        sequence has lse -inf.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value. UnsupportedError if no backend, or not the
            one asked for, can run the problem.

    Example:
        >>> q, k, v = (torch.randn(10, 8, 64) for _ in range(3))
        >>> ends = torch.tensor([0, 3, 10], dtype=torch.int32)  # two sequences, of 3 and 7
        >>> flashx.varlen_attention(q, k, v, ends, ends, causal=True).shape
        torch.Size([10, 8, 64])
    """
    out, lse = torch.ops.flashx.attention(
        *_arguments(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, window=window,
            sink_tokens=sink_tokens, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
            scale=scale, backend=backend,
        )
    )  # fmt: skip
    out = out[0].transpose(0, 1)
    return AttentionResult(out, lse[0]) if return_lse else out


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
    draw: bool = True,
) -> tuple[Any, ...]:
    """The operator's arguments; ``draw`` as in operator_arguments."""
    _check_packed(query, key, value)
    sequences, lengths = _sequences(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    packed_query, packed_key, packed_value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    arguments = operator_arguments(
        packed_query, packed_key, packed_value,
        causal, window, None, None, alibi_slopes, softcap, sinks, dropout_p, scale, backend,
        sink_tokens=sink_tokens, draw=draw,
    )  # fmt: skip
    return with_sequences(arguments, sequences, lengths=lengths)


def _explain(*arguments: Any, return_lse: bool = False, **options: Any) -> Explanation:
    described = _arguments(*arguments, draw=False, **options)
    return explain_problem(ops.describe(described), options.get("backend"))


EXPLAINERS[varlen_attention] = _explain


def with_sequences(
    arguments: tuple[Any, ...],
    sequences: torch.Tensor,
    page_table: torch.Tensor | None = None,
    lengths: tuple[int, int] = (-1, -1),
    unified_max: float | None = None,
) -> tuple[Any, ...]:
    """operator_arguments for ragged sequences: see problem.Inputs and Problem.from_tensors."""
    plain, variant = arguments[:_PLAIN], arguments[_PLAIN:]
    sink_tokens = variant[_TABLES] if variant else 0
    return *plain, None, None, sequences, None, None, page_table, sink_tokens, 0, 0, *lengths, unified_max


def sequence_table(
    q_begin: torch.Tensor, q_len: torch.Tensor, k_begin: torch.Tensor, k_len: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """problem.SEQUENCE_FIELDS of each sequence, from (B,) each."""
    return torch.stack((q_begin, q_len, k_begin, k_len, shift, torch.zeros_like(q_len)), 1).to(torch.int32)


def _count(name: str, value: Any) -> Any:
    """The value, an int >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value


def _check_packed(query: Any, key: Any, value: Any) -> None:
    """Ranks and sizes; what else there is to check does not depend on the layout."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (total length, heads, dim), got shape {shape(tensor)}")
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value must have key's total length {key.shape[0]}, got shape {shape(value)}")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value must have key's {key.shape[1]} heads, got shape {shape(value)}")
    if query.shape[2] < 1:
        raise ValueError(f"query must have a head dim of at least 1, got shape {shape(query)}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"key must have query's head dim {query.shape[2]}, got shape {shape(key)}")


def _sequences(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The table of the sequences, and the lengths of the longest ones (-1: the totals)."""
    longest: list[int] = []
    for side, total, ends, limit in (
        ("q", query.shape[0], cu_seqlens_q, max_seqlen_q),
        ("k", key.shape[0], cu_seqlens_k, max_seqlen_k),
    ):
        name, limit_name = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        if not isinstance(ends, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(ends).__name__}")
        if ends.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {ends.dtype}")
        if ends.dim() != 1 or ends.shape[0] < 1:
            raise ValueError(f"{name} must have shape (number of sequences + 1,), got {shape(ends)}")
        if ends.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {ends.device}")
        found = _longest(name, ends.tolist(), total) if on_host(ends) else -1
        if limit is None:
            longest.append(found)
            continue
        longest.append(_count(limit_name, limit))
        if limit < found:
            raise ValueError(f"{limit_name} must be at least the longest sequence's length {found}, got {limit}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's shape {shape(cu_seqlens_q)}, got {shape(cu_seqlens_k)}"
        )
    q_len, k_len = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    table = sequence_table(cu_seqlens_q[:-1], q_len, cu_seqlens_k[:-1], k_len, k_len - q_len)
    return table, (longest[0], longest[1])


def _longest(name: str, ends: list[int], total: int) -> int:
    """The longest sequence's length; checks where the sequences end."""
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    if ends[-1] > total:
        raise ValueError(f"{name} must end at the total length {total} or before, got {ends[-1]}")
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name} must not decrease, got {ends[i + 1]} after {ends[i]} (sequence {i})")
    return max(lengths, default=0)
