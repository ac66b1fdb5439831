"""From raw scores to logits: scale, softcap, ALiBi, bias, masks; and dropout's factors. logits.cuh's twin.

Plain problems know nothing but the interval mask, and leave the scale to the softmax; the general ones know the rest.
Tiles have their rows first, [M, N], or their keys, [N, M]: KEYS_FIRST.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import words
from .schedule import block_map_at, known
from .tile import INF

LOG2_E = tl.constexpr(1.4426950408889634)
_PIECE = tl.constexpr(16)  # keys; block sizes are multiples of it


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
    b_s, rows, k_begin, place, problem,
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
        b_slope = tl.load(problem.slopes + by_row(rows.o_b * problem.slopes_batch + rows.o_h, KEYS_FIRST))
        b_s -= b_slope * tl.abs((by_row(rows.o_diagonal, KEYS_FIRST) - o_k).to(tl.float32))
    if flags.bias != "none":
        bias = problem.bias
        p_row = (
            bias.data
            + place.i_b.to(tl.int64) * bias.batch
            + o_h.to(tl.int64) * bias.head
            + o_q.to(tl.int64) * bias.query
        )
        p_bias = p_row + o_k.to(tl.int64) * bias.key
        b_bias = tl.load(p_bias, mask=(o_k < problem.k_len) & (o_q >= 0), other=0)
        if flags.bias == "bool":
            b_s = tl.where(b_bias == 0, -INF, b_s)
        else:
            b_bias = b_bias.to(tl.float32)
            b_s = tl.where(b_bias == -INF, -INF, b_s + b_bias)  # -inf hides NaN too
    if HIDES:
        low, high, first = rows.limits.low, rows.limits.high, rows.limits.first
        if flags.members:
            low, high, first = by_row(low, KEYS_FIRST), by_row(high, KEYS_FIRST), by_row(first, KEYS_FIRST)
        o_d = o_k - o_q
        m_seen = o_d >= low
        if flags.first_keys:
            m_seen |= o_k < first
        m_seen = m_seen & (o_d < high) & (o_k < place.k_len)
        if flags.blocks:
            m_seen &= unhidden(rows, k_begin, problem, flags, N, KEYS_FIRST)
        b_s = tl.where(m_seen, b_s, -INF)
    return b_s, b_capped


@triton.jit
def unhidden(rows, k_begin, problem, flags: tl.constexpr, N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """What the block map shows the rows of the keys [k_begin, k_begin + N)."""
    o_c = k_begin + _PIECE * tl.arange(0, N // _PIECE)[None, :]
    o_q = rows.o_q[:, None]
    p_map, _, k_blocks = block_map_at(rows.o_b, rows.o_h, problem, flags)
    i_block = (o_q // flags.block_q).to(tl.int64) * k_blocks + o_c // flags.block_k
    m_in = (o_c // flags.block_k < k_blocks) & (o_q >= 0)
    b_entry = tl.load(p_map[:, None] + i_block, mask=m_in, other=0)  # [M, N / 16]
    b_entry = known(b_entry, problem)
    o_column = o_c % flags.block_k
    o_row = (b_entry - 2).to(tl.int64) * flags.block_q + o_q % flags.block_q
    p_bits = problem.tables.block_bits + (o_row * ((flags.block_k + 31) // 32) + o_column // 32)
    b_bits = tl.load(p_bits, mask=b_entry >= 2, other=0) >> o_column % 32
    b_bits = tl.where(b_entry == 1, -1, tl.where(b_entry == 0, 0, b_bits))
    m_seen = (b_bits[:, :, None] >> tl.arange(0, _PIECE)[None, None, :]) & 1
    m_seen = tl.reshape(m_seen != 0, (o_q.shape[0], N))
    if KEYS_FIRST:
        m_seen = tl.trans(m_seen)
    return m_seen


@triton.jit
def dropout_factor(rows, k_begin, problem, N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Dropout's factor of each weight: 0 or 1 / (1 - p)."""
    o_h = rows.o_b * problem.kv_heads * problem.group + rows.o_h
    b_words = words(o_h, rows.o_q, k_begin, problem.key0, problem.key1, N)
    b_factor = tl.where(b_words >= problem.threshold.to(tl.uint32, bitcast=True), problem.kept, 0.0)  # [M, N]
    if KEYS_FIRST:
        b_factor = tl.trans(b_factor)
    return b_factor
