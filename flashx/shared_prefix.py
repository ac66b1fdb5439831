"""Attention of sequences that begin alike: one prefix for each group of them, or a tree of prefixes.

A prefix's keys are read once for all sequences that share it: their rows are the rows of one problem, and the state
of a row's softmax goes on from the prefix to the sequence's own keys (levels.py). Every level knows the absolute
positions of its keys, so causal limits, windows, sink tokens and ALiBi do not see where one level ends and the next
begins. Juravsky et al., "Hydragen", section 3; Zhu et al., "RelayAttention", section 3.

The calls themselves are in prefix_calls.py, what they cost in prefix_plan.py; prefix_tree.py finds what is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch

from . import quick
from .attention import EXPLAINERS, AttentionResult
from .block_mask import BlockMask
from .prefix_calls import PrefixLevel, SharedPrefixCall, TreeCall, checked_options
from .prefix_plan import SharedPrefixExplanation, TreeExplanation


@overload
def shared_prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = ...,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    block_mask: BlockMask | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def shared_prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = ...,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    block_mask: BlockMask | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def shared_prefix_attention(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = None,
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    block_mask: BlockMask | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention of each sequence to a prefix that it shares with its group, and then to keys of its own.

    Exactly attention over the concatenation of both; query holds the last Lq positions of it. The prefix is read once
    per group, not once per sequence, as long as that pays (``flashx.prefix_plan.plan``, ``flashx.explain``). Which
    form runs changes roundings only, and depends on shapes only.

    Args:
        query: (B, Hq, Lq, D), dtypes as in ``flashx.attention``.
        prefix_key: (Hkv, Lp, D) for all sequences, or (G, Hkv, Lp, D): group g's, of the sequences g B/G to
            (g + 1) B/G - 1.
        prefix_value: (Hkv, Lp, Dv) or (G, Hkv, Lp, Dv).
        key: (B, Hkv, Ls, D), the suffixes.
        value: (B, Hkv, Ls, Dv).
        suffix_lens: (B,), integers on query's device: number of keys of each suffix, the first ones of Ls; the others
            are not there. None: all. On a GPU values outside [0, Ls] are clamped, and nothing waits for the device.
        causal: row i sees no key after its own position ``Lp + suffix_len - Lq + i``.
        window: (left, right) around that position, as in ``flashx.attention``.
        sink_tokens: keys at the beginning, of the prefix first, that the left side of the window does not hide.
        block_mask: a ``flashx.BlockMask`` over (B, Hq, Lq, Ls), broadcastable in the first two; it hides suffix keys.
        alibi_slopes, softcap, sinks, scale, backend: as in ``flashx.attention``.
        return_lse: also return the log-sum-exp over prefix and suffix.

    Returns:
        out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``. Differentiable in query, keys, values and sinks, through
        out and lse.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> prefix = torch.randn(8, 4096, 64)
        >>> query, suffix = torch.randn(16, 32, 1, 64), torch.randn(16, 8, 128, 64)
        >>> flashx.shared_prefix_attention(query, prefix, prefix, suffix, suffix).shape
        torch.Size([16, 32, 1, 64])
    """
    repeated = None
    if (
        suffix_lens is None and block_mask is None and alibi_slopes is None and sinks is None and not return_lse
        and type(sink_tokens) is int
        and (options := quick.options_of("prefix", causal, window, softcap, scale, backend, sink_tokens)) is not None
    ):  # fmt: skip
        repeated = quick.key_of(options, query, prefix_key, prefix_value, key, value)
        if repeated is not None:
            known = quick.run(repeated, query, *_read(query, prefix_key, prefix_value, key, value))
            if known is not None:
                return known
    checked = checked_options(
        query, key, value, causal, window, block_mask, alibi_slopes, softcap, sinks, scale, backend, sink_tokens
    )
    call = SharedPrefixCall.checked(query, prefix_key, prefix_value, key, value, suffix_lens, checked)
    out, lse = call.run()
    if repeated is not None and call.plan().form != "concatenated" and quick.came_before(repeated, query, out):
        levels, chosen = call.described()
        taken = _read(query, call.prefix_key, call.prefix_value, key, value)
        quick.keep(repeated, levels, chosen, (query, *taken), out)
    return AttentionResult(out, lse) if return_lse else out


def _read(query: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Which of the prefixes' and suffixes' keys and values a kept call reads: see ``prefix_plan.plan``."""
    prefix_key, _, key, _ = tensors
    groups = prefix_key.shape[0] if prefix_key.dim() == 4 else 1
    if prefix_key.numel() == 0:
        return tensors[2:]
    return tensors[:2] if key.numel() == 0 and query.shape[:1] == (groups,) else tensors


def explain_shared_prefix(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = None,
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    block_mask: BlockMask | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> SharedPrefixExplanation:
    """What ``shared_prefix_attention`` would run, and what decides. ``flashx.explain`` calls this; it runs nothing.

    Example:
        >>> prefix, suffix = torch.randn(8, 4096, 64), torch.randn(16, 8, 128, 64)
        >>> print(flashx.explain(flashx.shared_prefix_attention, suffix, prefix, prefix, suffix, suffix).plan.form)
        levels
    """
    options = checked_options(
        query, key, value, causal, window, block_mask, alibi_slopes, softcap, sinks, scale, backend, sink_tokens
    )
    call = SharedPrefixCall.checked(query, prefix_key, prefix_value, key, value, suffix_lens, options)
    return call.explain()


EXPLAINERS[shared_prefix_attention] = explain_shared_prefix


@overload
def tree_attention(
    query: torch.Tensor,
    levels: Sequence[PrefixLevel],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = ...,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    block_mask: BlockMask | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def tree_attention(
    query: torch.Tensor,
    levels: Sequence[PrefixLevel],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = ...,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    block_mask: BlockMask | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def tree_attention(
    query: torch.Tensor,
    levels: Sequence[PrefixLevel],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = None,
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    block_mask: BlockMask | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention of each sequence to the keys of its nodes of a prefix tree, root first, and then to keys of its own.

    Exactly attention over the concatenation; query holds the last Lq positions of it. Each node's keys are read once
    for all its sequences. The levels are taken as they come, but for those without keys; ``PrefixTree`` finds the ones
    that pay. A sequence may pass over a level, so branches may differ in depth and length. Without a window, a
    sequence's bits do not depend on the sequences beside it.

    Args:
        query: (B, Hq, Lq, D), dtypes as in ``flashx.attention``.
        levels: ``flashx.PrefixLevel`` each, any number of them, root first.
        key: (B, Hkv, Ls, D), each sequence's own keys, after those of its nodes.
        value: (B, Hkv, Ls, Dv).
        suffix_lens, causal, window, sink_tokens, block_mask, alibi_slopes, softcap, sinks, scale, return_lse, backend:
            as in ``flashx.shared_prefix_attention``. Of the levels' node_of_sequence and lens on a GPU, an index out of
            range means no node, and lengths are clamped.

    Returns:
        out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``. Differentiable in query, keys, values (the levels' too)
        and sinks, through out and lse.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> root, few = torch.randn(1, 8, 1024, 64), torch.randn(2, 8, 256, 64)
        >>> levels = [
        ...     flashx.PrefixLevel(root, root, torch.zeros(6, dtype=torch.int64)),
        ...     flashx.PrefixLevel(few, few, torch.tensor([0, 1, 0, 1, -1, 1]), torch.tensor([256, 100])),
        ... ]
        >>> query, own = torch.randn(6, 32, 1, 64), torch.randn(6, 8, 16, 64)
        >>> flashx.tree_attention(query, levels, own, own).shape
        torch.Size([6, 32, 1, 64])
    """
    options = checked_options(
        query, key, value, causal, window, block_mask, alibi_slopes, softcap, sinks, scale, backend, sink_tokens
    )
    out, lse = TreeCall.checked(query, levels, key, value, suffix_lens, options).run()
    return AttentionResult(out, lse) if return_lse else out


def _explain_tree(
    query: torch.Tensor,
    levels: Sequence[PrefixLevel],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    suffix_lens: torch.Tensor | None = None,
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    block_mask: BlockMask | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> TreeExplanation:
    options = checked_options(
        query, key, value, causal, window, block_mask, alibi_slopes, softcap, sinks, scale, backend, sink_tokens
    )
    return TreeCall.checked(query, levels, key, value, suffix_lens, options).explain()


EXPLAINERS[tree_attention] = _explain_tree
