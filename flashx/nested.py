"""Jagged nested tensors (torch.nested, layout torch.jagged): their values are packed sequences, attended as such."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from .attention import AttentionResult, operator_arguments
from .checks import on_host
from .problem import shape
from .varlen import sequence_table, with_sequences

# (B, H, j, D): the dimension that is ragged.
_LENGTH = 2


def attention_nested(
    query: Any,
    key: Any,
    value: Any,
    *,
    causal: Any = False,
    window: Any = None,
    block_mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: Any = 0.0,
    sinks: Any = None,
    dropout_p: Any = 0.0,
    scale: Any = None,
    backend: Any = None,
    align: Literal["top-left", "bottom-right"] = "bottom-right",
) -> AttentionResult:
    """``flashx.attention`` of jagged tensors (B, Hq, j, D), (B, Hkv, k, D) and (B, Hkv, k, Dv).

    Nothing is padded or copied: sequences stay where they are in the values, holes between them (offsets with lengths)
    are not read. Differentiable.

    Args:
        align: the key that row 0 of a sequence stands at: key 0, or, bottom-right, key ``Lk - Lq`` of its own lengths.

    Returns:
        out (B, Hq, j, Dv) with query's offsets, its values laid out as of a contiguous (B, j, Hq, Dv); lse (B, Hq, j).

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not are_jagged(tensor):
            got = f"layout {tensor.layout}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, as query, got {got}")
        if tensor.dim() != 4 or tensor._ragged_idx != _LENGTH:
            raise ValueError(
                f"{name} must be jagged in its third dimension (batch, heads, length, dim), got shape {shape(tensor)}"
            )
    for name, given in (("block_mask", block_mask), ("bias", bias)):
        if given is not None:
            raise ValueError(f"{name} must be None where query is nested, got {type(given).__name__}")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's batch size {query.shape[0]}, got shape {shape(key)}")
    if not same_structure(key, value):
        raise ValueError(f"value must have key's offsets and lengths, got shape {shape(value)}, key's is {shape(key)}")
    q_begin, q_len, q_most = _segments("query", query)
    k_begin, k_len, k_most = _segments("key", key)
    shift = torch.zeros_like(q_len) if align == "top-left" else k_len - q_len
    packed_query, packed_key, packed_value = (tensor.values()[None] for tensor in (query, key, value))
    arguments = operator_arguments(
        packed_query, packed_key, packed_value,
        causal, window, None, None, alibi_slopes, softcap, sinks, dropout_p, scale, backend,
    )  # fmt: skip
    sequences = sequence_table(q_begin, q_len, k_begin, k_len, shift)
    out, lse = torch.ops.flashx.attention(*with_sequences(arguments, sequences, lengths=(q_most, k_most)))
    # Modules go on with out.transpose(1, 2).flatten(2), a view only of this layout.
    out = out[0].transpose(0, 1).contiguous().transpose(0, 1)
    return AttentionResult(_in_structure_of(query, out), _in_structure_of(query, lse[0]))


def are_jagged(*tensors: Any) -> bool:
    """Whether all are nested tensors of layout torch.jagged, which have this class; asks the tensors nothing."""
    return all(isinstance(tensor, NestedTensor) for tensor in tensors)


def _segments(name: str, tensor: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """First rows and lengths of the sequences in the values; the longest one's length, -1 if nobody knows."""
    offsets, lengths = tensor.offsets(), tensor.lengths()
    if on_host(offsets):
        ends, total = offsets.tolist(), tensor.values().shape[_LENGTH - 1]
        if not 0 <= ends[0] <= ends[-1] <= total or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"{name}'s offsets must not decrease and be from 0 to {total}, got {ends}")
        room = [b - a for a, b in itertools.pairwise(ends)]
        found = room if lengths is None else lengths.tolist()
        if any(not 0 <= length <= most for length, most in zip(found, room, strict=True)):
            raise ValueError(f"{name}'s lengths must be from 0 to what its offsets leave room for, {room}, got {found}")
        most = max(found, default=0)
    else:
        known = tensor._maybe_max_seqlen
        most = -1 if known is None else known
    return offsets[:-1], offsets.diff() if lengths is None else lengths, most


def same_structure(key: Any, value: Any) -> bool:
    """Whether value's sequences lie in its values as key's do in key's; False if only a device knows."""
    for own, other in ((key.offsets(), value.offsets()), (key.lengths(), value.lengths())):
        if own is other:
            continue
        if own is None or other is None or not (on_host(own) and torch.equal(own, other)):
            return False
    return True


def _in_structure_of(nested: Any, values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(
        values,
        nested.offsets(),
        nested.lengths(),
        jagged_dim=_LENGTH,
        min_seqlen=nested._maybe_min_seqlen,
        max_seqlen=nested._maybe_max_seqlen,
    )
