"""From raw scores to logits: scale, softcap, ALiBi, bias, masks; and dropout's factors. logits.cuh's twin.

Plain problems know nothing but the interval mask, and leave the scale to the softmax; the general ones know the rest.
Tiles have their rows first, [M, N], or their keys, [N, M]: KEYS_FIRST.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .philox import words
from .tile import INF

LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments of every kernel whose values it is not compiled for: another length would be another kernel.
UNSPECIALIZED = [
    "kv_heads", "group", "q_len", "k_len", "low", "high", "shift", "slopes_batch", "threshold", "key0", "key1",
]  # fmt: skip


class Bias(NamedTuple):
    """The bias; strides in elements, 0 where it broadcasts."""

    data: Any
    batch: Any
    head: Any
    query: Any
    key: Any


class Flags(NamedTuple):
    """What a problem has, known when a kernel is compiled."""

    bias: str  # "none", "add" or "bool"
    alibi: bool
    softcap: bool
    sinks: bool
    dropout: bool
    general: bool  # not plain
    precision: str  # of float32 products


class Problem(NamedTuple):
    """What a problem has at run time. Row q sees the keys [q + low, q + high)."""

    kv_heads: Any
    group: Any  # query heads that read one key head
    q_len: Any
    k_len: Any
    low: Any
    high: Any
    shift: Any
    scale: Any
    softcap: Any
    bias: Any
    slopes: Any  # ALiBi's
    slopes_batch: Any  # their batch stride
    kept: Any  # dropout's factor of what it keeps: words from threshold on
    threshold: Any
    key0: Any
    key1: Any


class Rows(NamedTuple):
    """Query rows' part in their logits, [M] each."""

    o_q: Any
    o_h: Any


@triton.jit
def describe(o_r, i_b, i_kv, problem):
    """The packed rows o_r: row r is query r // group of head r % group of the key head.

    A row past the last is taken for the last: what it reads exists, what it gives nobody keeps.
    """
    o_r = tl.minimum(o_r, problem.q_len * problem.group - 1)
    o_q = o_r // problem.group
    return Rows(o_q, i_kv * problem.group + o_r % problem.group)


@triton.jit
def by_row(b_x, KEYS_FIRST: tl.constexpr):
    """[M] to [M, 1] or [1, M]."""
    if KEYS_FIRST:
        b_y = b_x[None, :]
    else:
        b_y = b_x[:, None]
    return b_y


@triton.jit
def tanh(b_x):
    b_size, b_square = tl.abs(b_x), b_x * b_x
    # A polynomial fitted to (tanh(x) / x - 1) / x^2 on [0, 0.6]: 1 - 2 / (exp(2x) + 1) would cancel there.
    b_y = b_square * 2.2266863379627466e-3 - 8.262331597507e-3
    b_y = b_y * b_square + 2.1732499822974205e-2
    b_y = b_y * b_square - 5.3952112793922424e-2
    b_y = b_y * b_square + 0.13333244621753693
    b_y = b_y * b_square - 0.3333333134651184
    b_small = b_x + b_x * (b_y * b_square)
    b_large = 1 - 2 / (tl.exp(2 * b_size) + 1)
    b_large = tl.where(b_x < 0, -b_large, b_large)
    return tl.where(b_size < 0.6, b_small, b_large)


@triton.jit
def unit(problem, flags: tl.constexpr):
    """What brings scores, as to_logits leaves them, to natural logits."""
    if flags.general:
        b_unit = problem.scale * 0.0 + 1.0
    else:
        b_unit = problem.scale
    return b_unit


@triton.jit
def to_logits(
    b_s, rows, k_begin, i_b, problem,
    flags: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Logits of the scores of rows and keys [k_begin, k_begin + N), and, for softcap's slope, the capped scores.

    HIDES: some keys may be hidden from some rows.
    """
    o_q, o_h = by_row(rows.o_q, KEYS_FIRST), by_row(rows.o_h, KEYS_FIRST)
    o_k = by_row(k_begin + tl.arange(0, N), not KEYS_FIRST)
    if flags.general:
        b_s = b_s * problem.scale
    b_capped = b_s
    if flags.softcap:
        b_capped = problem.softcap * tanh(b_s / problem.softcap)
        b_s = b_capped
    if flags.alibi:
        b_slope = tl.load(problem.slopes + i_b * problem.slopes_batch + o_h)
        b_s -= b_slope * tl.abs((o_q + problem.shift - o_k).to(tl.float32))
    if flags.bias != "none":
        bias = problem.bias
        p_row = bias.data + i_b.to(tl.int64) * bias.batch + o_h.to(tl.int64) * bias.head + o_q.to(tl.int64) * bias.query
        p_bias = p_row + o_k.to(tl.int64) * bias.key
        b_bias = tl.load(p_bias, mask=(o_k < problem.k_len) & (o_q >= 0), other=0)
        if flags.bias == "bool":
            b_s = tl.where(b_bias == 0, -INF, b_s)
        else:
            b_bias = b_bias.to(tl.float32)
            b_s = tl.where(b_bias == -INF, -INF, b_s + b_bias)  # -inf hides NaN too
    if HIDES:
        o_d = o_k - o_q
        b_s = tl.where((o_d >= problem.low) & (o_d < problem.high) & (o_k < problem.k_len), b_s, -INF)
    return b_s, b_capped


@triton.jit
def dropout_factor(rows, k_begin, i_b, problem, N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Dropout's factor of each weight: 0 or 1 / (1 - p)."""
    o_h = i_b * problem.kv_heads * problem.group + rows.o_h
    b_words = words(o_h, rows.o_q, k_begin, problem.key0, problem.key1, N)
    b_factor = tl.where(b_words >= problem.threshold.to(tl.uint32, bitcast=True), problem.kept, 0.0)  # [M, N]
    if KEYS_FIRST:
        b_factor = tl.trans(b_factor)
    return b_factor
