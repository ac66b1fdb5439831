"""Forward, FlashAttention-2's loop order (Dao, "FlashAttention-2", 3.1), the twin of csrc/cuda/sm80/forward.cuh.

A program owns a tile of packed query rows and streams over the key tiles that they see: Q is read and O written once, K
and V are read once per row tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits import LOG2_E, UNSPECIALIZED, Problem, describe, dropout_factor, to_logits, unit
from .schedule import row_schedule, visited_tile
from .tile import (
    FINITE,
    INF,
    NEGATIVE_UP,
    PLAIN,
    has_nonfinite,
    load_tile,
    multiply_columns,
    multiply_rows,
    rows_of,
    store_sums,
)


@triton.jit
def update(b_s, b_acc, b_max, b_sum, problem, flags: tl.constexpr):
    """The online softmax: scores become weights relative to the running max, sums so far are rescaled to it."""
    b_factor = unit(problem, flags) * LOG2_E
    b_highest = tl.maximum(b_max, tl.max(b_s, 1))  # [M]
    b_shift = tl.where(b_highest == -INF, 0.0, b_highest)  # nothing seen yet: weights 0, not NaN
    b_rescale = tl.exp2((b_max - b_shift) * b_factor)
    if flags.general:  # as low as floats go: differences are taken before they are scaled
        b_p = tl.exp2((b_s - b_shift[:, None]) * b_factor)  # [M, N]
    else:
        b_p = tl.exp2(b_s * b_factor - (b_shift * b_factor)[:, None])
    return b_p, b_acc * b_rescale[:, None], b_highest, b_sum * b_rescale + tl.sum(b_p, 1)


@triton.jit
def visit(
    j, state, b_q, rows, keys, key, value, i_b, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One key tile."""
    b_acc, b_max, b_sum = state
    p_k, p_v = keys
    k_begin = j * N
    m_k = k_begin + tl.arange(0, N) < problem.k_len
    # S = Q K^T
    b_k = load_tile(p_k + k_begin.to(tl.int64) * key.row, m_k, dims.head, dims.head_block, HIDES)  # [N, D]
    b_s = multiply_rows(b_q, b_k, flags.precision)  # [M, N]
    b_s, _ = to_logits(b_s, rows, k_begin, i_b, problem, flags, N, HIDES, False)
    # P = softmax(S) so far
    b_p, b_acc, b_max, b_sum = update(b_s, b_acc, b_max, b_sum, problem, flags)
    if flags.dropout:
        b_p *= dropout_factor(rows, k_begin, i_b, problem, N, False)
    # O += P V
    b_v = load_tile(p_v + k_begin.to(tl.int64) * value.row, m_k, dims.value, dims.value_block, HIDES)  # [N, Dv]
    b_acc = multiply_columns(b_acc, b_p, b_v, i_pass, CAREFUL, flags.precision)
    return b_acc, b_max, b_sum


@triton.jit
def sweep(
    b_q, rows, tiles, key, value, i_b, i_kv, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All key tiles that the rows see: the sums, the max and the sum of the weights."""
    first, last, full_first, full_last = tiles
    o_n = tl.arange(0, N)
    keys = (rows_of(key, i_b, i_kv, o_n), rows_of(value, i_b, i_kv, o_n))  # of tile 0
    b_acc = tl.zeros([M, dims.value_block], tl.float32)
    b_max = tl.full([M], -INF, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    begin = full_last - full_first
    if CAREFUL or flags.bias != "none":
        begin *= 0  # every tile may hide something
    else:
        for j in range(full_first, full_last):
            b_acc, b_max, b_sum = visit(
                j, (b_acc, b_max, b_sum), b_q, rows, keys, key, value, i_b, i_pass, problem,
                flags, dims, N, False, False,
            )  # fmt: skip
    for i in tl.range(begin, last - first, num_stages=1 if CAREFUL else None):
        j = visited_tile(i, first, full_first, full_last)
        b_acc, b_max, b_sum = visit(
            j, (b_acc, b_max, b_sum), b_q, rows, keys, key, value, i_b, i_pass, problem,
            flags, dims, N, True, CAREFUL,
        )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit
def finish(
    o_r, b_acc, b_max, b_sum, rows, out, lse, sinks, i_b, i_pass, problem, flags: tl.constexpr, dims: tl.constexpr
):
    b_unit = unit(problem, flags)
    m_r = o_r < problem.q_len * problem.group
    b_max = tl.where(b_max == -INF, -INF, b_max * b_unit)
    b_rescale = b_sum * 0.0 + 1.0
    if flags.sinks:  # a sink is one more key, with value 0
        b_sink = tl.load(sinks + rows.o_h)
        b_highest = tl.maximum(b_max, b_sink)
        b_shift = tl.where(b_highest == -INF, 0.0, b_highest)
        b_rescale = tl.exp2((b_max - b_shift) * LOG2_E)
        b_sum = b_sum * b_rescale + tl.exp2((b_sink - b_shift) * LOG2_E)
        b_max = b_highest
    # A row that sees no key gives out 0, lse -inf.
    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_lse = (b_max.to(tl.float64) + tl.log(b_sum.to(tl.float64))).to(tl.float32)
    b_factor = tl.where(m_empty, 0.0, b_rescale / b_sum)
    if i_pass <= FINITE:
        o_head = i_b.to(tl.int64) * problem.kv_heads * problem.group + rows.o_h
        tl.store(lse + o_head * problem.q_len + rows.o_q, tl.where(m_empty, -INF, b_lse), mask=m_r)
    p_out = rows_of(out, i_b, rows.o_h, rows.o_q)
    store_sums(p_out, m_r, b_acc, b_factor[:, None], i_pass, dims.value, dims.value_block)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles"])
def forward_kernel(
    query, key, value, out, lse, sinks, row_tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1,
    )  # fmt: skip
    i_place = tl.program_id(0) // row_tiles
    # Last row tiles first: under a causal mask they are the longest.
    i_tile = row_tiles - 1 - tl.program_id(0) % row_tiles
    i_b, i_kv = i_place // kv_heads, i_place % kv_heads
    o_r = i_tile * M + tl.arange(0, M)
    rows = describe(o_r, i_b, i_kv, problem)
    q_last = (tl.minimum(i_tile * M + M, q_len * group) - 1) // group
    tiles = row_schedule(i_tile * M // group, q_last, problem, N)
    m_r = o_r < q_len * group
    b_q = load_tile(rows_of(query, i_b, rows.o_h, rows.o_q), m_r, dims.head, dims.head_block, True)  # [M, D]

    b_acc, b_max, b_sum = sweep(b_q, rows, tiles, key, value, i_b, i_kv, PLAIN, problem, flags, dims, M, N, False)
    finish(o_r, b_acc, b_max, b_sum, rows, out, lse, sinks, i_b, PLAIN, problem, flags, dims)
    # Weights are not negative here.
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_acc), NEGATIVE_UP, FINITE)):
        b_acc, b_max, b_sum = sweep(b_q, rows, tiles, key, value, i_b, i_kv, i_pass, problem, flags, dims, M, N, True)
        finish(o_r, b_acc, b_max, b_sum, rows, out, lse, sinks, i_b, i_pass, problem, flags, dims)
