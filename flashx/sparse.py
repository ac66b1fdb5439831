"""Attention over a part of the keys: sliding windows and block masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from .attention import EXPLAINERS, AttentionResult, Explanation, explain, operator_arguments
from .block_mask import BlockMask


@overload
def sliding_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | Sequence[int | None],
    *,
    causal: bool = ...,
    sink_tokens: int = ...,
    block_mask: BlockMask | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def sliding_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | Sequence[int | None],
    *,
    causal: bool = ...,
    sink_tokens: int = ...,
    block_mask: BlockMask | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def sliding_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | Sequence[int | None],
    *,
    causal: bool = True,
    sink_tokens: int = 0,
    block_mask: BlockMask | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention of each row to the keys around its own position, and to the first ones.

    Row i has position ``p = i + Lk - Lq`` and sees keys ``[p - left, p + right]``, and the first ``sink_tokens`` keys
    however far behind they are (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", section 3.2;
    positions are not renumbered). Tiles that no row sees are not read, so that cost grows with Lq times the window.

    Args:
        query, key, value: as in ``flashx.attention``, which describes the other arguments too.
        window: (left, right), ints >= 0, None is unbounded; an int is both.
        causal: row i sees no key after p; right then counts no more.
        sink_tokens: keys at the beginning that the left side of the window does not hide.
        sinks: (Hq,), learned sinks: another thing, and both may be given.

    Returns:
        out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> q = torch.randn(1, 8, 4096, 64)
        >>> flashx.sliding_window_attention(q, q, q, window=256, sink_tokens=4).shape
        torch.Size([1, 8, 4096, 64])
    """
    arguments = operator_arguments(
        query, key, value, causal, _pair(window), block_mask, bias, alibi_slopes, softcap, sinks, dropout_p, scale,
        backend, sink_tokens=sink_tokens,
    )  # fmt: skip
    out, lse = torch.ops.flashx.attention(*arguments)
    return AttentionResult(out, lse) if return_lse else out


def _pair(window: int | Sequence[int | None]) -> Sequence[int | None]:
    """(left, right); an int is both."""
    if window is None:
        raise TypeError("window must be an int or a pair (left, right), got None")
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        return window  # type: ignore[return-value]  # operator_arguments refuses a bool
    return window, window


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention to the keys that a block mask leaves, exact by element; hidden blocks are neither read nor computed.

    The forward walks the rows of the mask's map, the gradients of key and value its columns (Dao et al.,
    "FlashAttention", section 3.3). Any boolean mask is a block mask: ``flashx.BlockMask.from_dense``.

    Args:
        query, key, value: as in ``flashx.attention``, which describes the other arguments too.
        block_mask: a ``flashx.BlockMask`` over (B, Hq, Lq, Lk), broadcastable in the first two. Combines with causal
            and window.

    Returns:
        out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``. A row that sees nothing has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> q = torch.randn(1, 8, 1024, 64)
        >>> mask = flashx.BlockMask.butterfly(1024, 1024)
        >>> flashx.block_sparse_attention(q, q, q, mask).shape
        torch.Size([1, 8, 1024, 64])
    """
    _check_block_mask(block_mask)
    arguments = operator_arguments(
        query, key, value, causal, window, block_mask, bias, alibi_slopes, softcap, sinks, dropout_p, scale, backend
    )
    out, lse = torch.ops.flashx.attention(*arguments)
    return AttentionResult(out, lse) if return_lse else out


def _check_block_mask(block_mask: BlockMask) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a flashx.BlockMask, got {type(block_mask).__name__}")


def _explain_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | Sequence[int | None],
    *,
    causal: bool = True,
    **options: Any,
) -> Explanation:
    return explain(query, key, value, causal=causal, window=_pair(window), **options)


def _explain_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: BlockMask, **options: Any
) -> Explanation:
    _check_block_mask(block_mask)
    return explain(query, key, value, block_mask=block_mask, **options)


EXPLAINERS[sliding_window_attention] = _explain_window
EXPLAINERS[block_sparse_attention] = _explain_blocks
