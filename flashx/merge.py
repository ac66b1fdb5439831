"""Exact n-ary merge of partial attention results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .attention import AttentionResult
from .problem import accumulation_dtype, shape


def merge_attention(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> AttentionResult:
    """Attention over the union of disjoint key sets, from the results over each of them.

    ``lse = log(sum_n exp(lse_n))`` and ``out = sum_n exp(lse_n - lse) * out_n`` (Juravsky et al., "Hydragen",
    section 3.1), in float32 (float64 for float64). Associative and commutative to rounding; differentiable through
    every out and every lse.

    Args:
        parts: one or more ``(out, lse)``: out (..., Lq, Dv), lse (..., Lq) in natural log, all of one shape,
            dtype and device. An empty part is out 0 and lse -inf, and changes nothing.

    Returns:
        AttentionResult(out, lse): out in the parts' dtype, lse in float32 (float64 for float64 parts). Rows that
        are empty in every part stay (0, -inf).

    Raises:
        ValueError, TypeError: no parts; a part that is not a pair of tensors; shapes, dtypes or devices that differ.

    Example:
        >>> a = flashx.attention(q, k[:, :, :64], v[:, :, :64], return_lse=True)
        >>> b = flashx.attention(q, k[:, :, 64:], v[:, :, 64:], return_lse=True)
        >>> out, lse = flashx.merge_attention([a, b])  # == flashx.attention(q, k, v, return_lse=True)
    """
    outs, lses = _check(parts)
    dtype = accumulation_dtype(outs[0].dtype)
    lse = torch.stack([part.to(dtype) for part in lses])
    empty = lse == -torch.inf
    top = lse.amax(0).detach()
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.where(empty, 0, torch.exp(torch.where(empty, 0, lse - top)))
    total = weights.sum(0)
    nothing = empty.all(0)
    safe_total = torch.where(nothing, 1, total)
    shares = (weights / safe_total)[..., None]
    # A part's out is 0 where it is empty; skipping it there also keeps whatever stands in its place from leaking.
    stacked = torch.where(empty[..., None], 0, torch.stack([part.to(dtype) for part in outs]))
    merged_lse = torch.where(nothing, -torch.inf, top + torch.log(safe_total))
    return AttentionResult((shares * stacked).sum(0).to(outs[0].dtype), merged_lse)


def _check(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if not isinstance(parts, Sequence) or len(parts) == 0:
        raise ValueError(f"parts must be a non-empty sequence of (out, lse) pairs, got {parts!r:.60}")
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for index, part in enumerate(parts):
        if not isinstance(part, tuple) or len(part) != 2 or not all(isinstance(t, torch.Tensor) for t in part):
            raise TypeError(f"parts[{index}] must be a pair of tensors (out, lse), got {type(part).__name__}")
        out, lse = part
        first = outs[0] if outs else out
        if out.dim() < 2 or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"parts[{index}]: lse must have out's shape without its last dimension, "
                f"got out {shape(out)} and lse {shape(lse)}"
            )
        if not out.is_floating_point() or not lse.is_floating_point():
            raise TypeError(f"parts[{index}] must hold floating tensors, got {out.dtype} and {lse.dtype}")
        if out.shape != first.shape:
            raise ValueError(f"parts[{index}]'s out must have parts[0]'s shape {shape(first)}, got {shape(out)}")
        if out.dtype != first.dtype:
            raise TypeError(f"parts[{index}]'s out must have parts[0]'s dtype {first.dtype}, got {out.dtype}")
        if out.device != first.device or lse.device != first.device:
            raise ValueError(
                f"parts[{index}] must be on parts[0]'s device {first.device}, got {out.device}, {lse.device}"
            )
        outs.append(out)
        lses.append(lse)
    return outs, lses
