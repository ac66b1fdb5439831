"""The calls whose cost is asked for: a Problem, and what its tables hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..masks import IntervalMask
from ..problem import Inputs, Problem


class Sequence(NamedTuple):
    """One sequence of a ragged call, as a row of problem.SEQUENCE_FIELDS without where it lies."""

    q_len: int
    k_len: int
    shift: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Tables:
    """What a call's tables hold, where it has any.

    Attributes:
        sequences: one of each of the batch, in the order of the batch.
        groups: the sequences (indices) that share the keys of each batch entry of key.
        block_map: a BlockMask's map, (B|1, H|1, q blocks, k blocks): 0 hidden, 1 full, more a bitmap.
        bias: shape of the bias, 4 dimensions, and the bytes of an element.
        bias_grad: its gradient is wanted.
        grad_lse: lse has a gradient too.
    """

    sequences: tuple[Sequence, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    block_map: torch.Tensor | None = None
    bias: tuple[tuple[int, int, int, int], int] | None = None
    bias_grad: bool = False
    grad_lse: bool = False

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs, bias_grad: bool = False, grad_lse: bool = False) -> Tables:
        """The tables of a call's tensors; lengths clamped to what there is, as the kernels clamp them."""
        sequences, groups, bias = None, None, None
        if inputs.sequences is not None:
            sequences = tuple(
                Sequence(
                    problem.q_len if inputs.members is not None else _clamp(q_len, problem.q_len),
                    _clamp(k_len, problem.k_len),
                    shift,
                    max(offset, 0),
                )
                for _, q_len, _, k_len, shift, offset in inputs.sequences.tolist()
            )
        if inputs.members is not None:
            assert inputs.member_begin is not None
            members, begin = inputs.members.tolist(), inputs.member_begin.tolist()
            groups = tuple(tuple(members[b:e]) for b, e in itertools.pairwise(begin))
        if inputs.bias is not None:
            size = (1,) * (4 - inputs.bias.dim()) + tuple(inputs.bias.shape)
            bias = ((size[0], size[1], size[2], size[3]), inputs.bias.element_size())
        block_map = None if inputs.block_map is None else inputs.block_map.cpu()
        return cls(sequences, groups, block_map, bias, bias_grad, grad_lse)


def problem(
    q_len: int,
    k_len: int | None = None,
    *,
    head_dim: int = 64,
    value_dim: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    window: Seq[int | None] | None = None,
    sink_tokens: int = 0,
    sinks: bool = False,
    alibi: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    device: str = "cuda",
) -> Problem:
    """A Problem from sizes, arguments as in ``flashx.attention``: what the functions of ``flashx.io`` take.

    Args:
        q_len: queries of a sequence.
        k_len: keys; as many as queries, if None.
        value_dim, kv_heads: head_dim and heads, if None.
        window: (left, right), None is unbounded on a side. Aligned bottom-right, as everything in flashx.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> print(flashx.io.problem(4096, heads=32, kv_heads=8, head_dim=128, causal=True))
    """
    keys = q_len if k_len is None else k_len
    key_heads = heads if kv_heads is None else kv_heads
    values = head_dim if value_dim is None else value_dim
    sizes = {"q_len": q_len, "k_len": keys, "batch": batch, "heads": heads, "kv_heads": key_heads}
    for name, size in {**sizes, "head_dim": head_dim, "value_dim": values, "sink_tokens": sink_tokens}.items():
        least = 0 if name == "sink_tokens" else 1
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name} must be >= {least}, got {size}")
    if heads % key_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {key_heads}")
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype!r}")
    left, right = (None, None) if window is None else _window(window)
    if causal:
        right = 0
    return Problem(
        batch=batch,
        q_heads=heads,
        kv_heads=key_heads,
        q_len=q_len,
        k_len=keys,
        head_dim=head_dim,
        value_dim=values,
        dtype=dtype,
        device=device,
        mask=IntervalMask(left, right, keys - q_len, sink_tokens),
        scale=1 / math.sqrt(head_dim),
        softcap=softcap,
        dropout_p=dropout_p,
        alibi=alibi,
        sinks=sinks,
    )


def visible_pairs(problem: Problem, tables: Tables | None = None) -> int:
    """(query, key) pairs that the masks show, over all heads and sequences: those that attention has to compute.

    Of a block mask whole blocks, its partly visible ones included.
    """
    tables = Tables() if tables is None else tables
    if tables.block_map is not None and problem.block is not None:
        return _visible_in_map(problem, tables.block_map)
    if tables.sequences is None:
        pairs = interval_pairs(problem.mask, problem.q_len, problem.k_len)
        return problem.batch * problem.q_heads * pairs
    shown = 0
    for it in tables.sequences:
        shown += interval_pairs(mask_of(problem.mask, it), it.q_len, it.k_len)
    return problem.q_heads * shown


def interval_pairs(mask: IntervalMask, q_len: int, k_len: int) -> int:
    """Pairs of one head that an interval mask shows."""
    if mask.left is None and mask.right is None:
        return q_len * k_len
    q = torch.arange(q_len, dtype=torch.int64)
    high = torch.full_like(q, k_len) if mask.right is None else (q + (mask.shift + mask.right + 1)).clamp(0, k_len)
    if mask.left is None:
        return int(high.sum())
    low = (q + (mask.shift - mask.left)).clamp(0, k_len)
    # Beside the window, the first keys that are before it.
    return int(((high - low).clamp(min=0) + torch.minimum(torch.minimum(low, high), torch.tensor(mask.first))).sum())


def mask_of(mask: IntervalMask, sequence: Sequence) -> IntervalMask:
    """The interval mask of a sequence, which has a shift of its own."""
    return IntervalMask(mask.left, mask.right, sequence.shift, max(mask.first - sequence.offset, 0))


def _visible_in_map(problem: Problem, block_map: torch.Tensor) -> int:
    assert problem.block is not None
    rows, columns = problem.block
    sizes = [
        (torch.arange(count) * size + size).clamp(max=length) - torch.arange(count) * size
        for count, size, length in zip(
            block_map.shape[2:], (rows, columns), (problem.q_len, problem.k_len), strict=True
        )
    ]
    area = sizes[0][:, None] * sizes[1]
    shown = ((block_map != 0) * area).sum((2, 3)).expand(problem.batch, problem.q_heads)
    return int(shown.sum())


def _window(window: Seq[int | None]) -> tuple[int | None, int | None]:
    widths = tuple(window)
    if len(widths) != 2:
        raise ValueError(f"window must be (left, right), got {widths!r}")
    for width in widths:
        if width is not None and (isinstance(width, bool) or not isinstance(width, int)):
            raise TypeError(f"window must be of ints or None, got {width!r}")
        if width is not None and width < 0:
            raise ValueError(f"window must be >= 0, got {width}")
    return widths[0], widths[1]


def _clamp(value: int, most: int) -> int:
    return min(max(value, 0), most)
