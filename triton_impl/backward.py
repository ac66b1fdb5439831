"""Backward by recomputation, in sweeps whose programs own what they write, the twin of csrc/cuda/sm80/backward.cuh.

Nothing is summed in memory, so the same call gives the same bits. With P = exp(S - lse), delta = rowsum(dO * O) - dlse
and dS = P * (dO V^T - delta):
  grad_key_value_kernel  owns keys, streams over packed query rows:  dV = P^T dO, dK = dS^T Q   (scores are S^T = K Q^T)
  grad_query_kernel      owns packed query rows, streams over keys:  dQ = dS K
  grad_bias_kernel       owns a tile of dBias:                       the sum of dS over what the bias broadcasts over
Dao et al., "FlashAttention", appendix B; "FlashAttention-2", 3.1.2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits import LOG2_E, UNSPECIALIZED, Problem, by_row, describe, dropout_factor, to_logits, unit
from .schedule import column_schedule, hi, lo, row_schedule, visited_tile
from .tile import (
    FINITE,
    INF,
    NEGATIVE_DOWN,
    PLAIN,
    has_nonfinite,
    load_tile,
    multiply_columns,
    multiply_rows,
    rows_of,
    store_sums,
)


@triton.jit
def row_ends(o_r, rows, lse, delta, i_b, problem):
    """The rows' normalisers and deltas: what their weights' gradients need. A row past the last has weights 0."""
    o_head = i_b.to(tl.int64) * problem.kv_heads * problem.group + rows.o_h
    o_row = o_head * problem.q_len + rows.o_q
    m_r = o_r < problem.q_len * problem.group
    b_lse = tl.load(lse + o_row, mask=m_r, other=INF)
    b_delta = tl.load(delta + o_row, mask=m_r, other=0.0)
    return tl.where(b_lse == -INF, INF, b_lse), b_delta  # an empty row's weights are 0, not inf


@triton.jit
def differentiate(
    b_s, b_dp, rows, ends, k_begin, i_b, problem,
    flags: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, KEYS_FIRST: tl.constexpr, OF_LOGITS: tl.constexpr,
):  # fmt: skip
    """From scores and dP the weights that multiply values, and dS: the gradient of the scores, or, for a bias, of the
    logits, which softcap's slope is not yet part of."""
    b_s, b_capped = to_logits(b_s, rows, k_begin, i_b, problem, flags, N, HIDES, KEYS_FIRST)
    b_lse, b_delta = ends
    b_p = tl.exp2((b_s * unit(problem, flags) - by_row(b_lse, KEYS_FIRST)) * LOG2_E)
    if HIDES:
        b_p = tl.where(b_s == -INF, 0.0, b_p)  # even where lse is NaN
    b_weights = b_p
    if flags.dropout:
        b_factor = dropout_factor(rows, k_begin, i_b, problem, N, KEYS_FIRST)
        b_weights = b_p * b_factor
        b_dp = tl.where(b_factor == 0.0, 0.0, b_factor * b_dp)
    b_ds = b_p * (b_dp - by_row(b_delta, KEYS_FIRST))
    if flags.softcap and not OF_LOGITS:
        b_t = b_capped / problem.softcap
        b_ds *= 1 - b_t * b_t
    # Where the weight is 0, dO V^T may be NaN: the value may be hidden.
    return b_weights, tl.where(b_p == 0.0, 0.0, b_ds)


@triton.jit
def visit_rows(
    j, sums, b_k, b_v, query, grad_out, lse, delta, k_begin, i_b, i_kv, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """One tile of packed query rows, for the keys that a program owns."""
    b_dk, b_dv = sums
    o_r = j * M + tl.arange(0, M)
    m_r = o_r < problem.q_len * problem.group
    rows = describe(o_r, i_b, i_kv, problem)
    b_q = load_tile(rows_of(query, i_b, rows.o_h, rows.o_q), m_r, dims.head, dims.head_block, HIDES)  # [M, D]
    b_do = load_tile(rows_of(grad_out, i_b, rows.o_h, rows.o_q), m_r, dims.value, dims.value_block, HIDES)  # [M, Dv]
    ends = row_ends(o_r, rows, lse, delta, i_b, problem)
    # S^T = K Q^T, dP^T = V dO^T
    b_s = multiply_rows(b_k, b_q, flags.precision)  # [N, M]
    b_dp = multiply_rows(b_v, b_do, flags.precision)  # [N, M]
    b_p, b_ds = differentiate(b_s, b_dp, rows, ends, k_begin, i_b, problem, flags, N, HIDES, True, False)
    # dV += P^T dO, dK += dS^T Q
    b_dv = multiply_columns(b_dv, b_p, b_do, i_pass, CAREFUL, flags.precision)
    b_dk = multiply_columns(b_dk, b_ds, b_q, i_pass, CAREFUL, flags.precision)
    return b_dk, b_dv


@triton.jit
def sweep_rows(
    b_k, b_v, query, grad_out, lse, delta, k_begin, i_b, i_kv, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All row tiles that see the keys."""
    first, last, full_first, full_last = column_schedule(k_begin, problem, M, N)
    b_dk = tl.zeros([N, dims.head_block], tl.float32)
    b_dv = tl.zeros([N, dims.value_block], tl.float32)
    begin = full_last - full_first
    if CAREFUL or flags.bias != "none":
        begin *= 0  # every tile may hide something
    else:
        for j in range(full_first, full_last):
            b_dk, b_dv = visit_rows(
                j, (b_dk, b_dv), b_k, b_v, query, grad_out, lse, delta, k_begin, i_b, i_kv, i_pass, problem,
                flags, dims, M, N, False, False,
            )  # fmt: skip
    for i in tl.range(begin, last - first, num_stages=1 if CAREFUL else None):
        j = visited_tile(i, first, full_first, full_last)
        b_dk, b_dv = visit_rows(
            j, (b_dk, b_dv), b_k, b_v, query, grad_out, lse, delta, k_begin, i_b, i_kv, i_pass, problem,
            flags, dims, M, N, True, CAREFUL,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles"])
def grad_key_value_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1,
    )  # fmt: skip
    i_place = tl.program_id(0) // tiles
    k_begin = tl.program_id(0) % tiles * N
    i_b, i_kv = i_place // kv_heads, i_place % kv_heads
    o_k = k_begin + tl.arange(0, N)
    m_k = o_k < k_len
    b_k = load_tile(rows_of(key, i_b, i_kv, o_k), m_k, dims.head, dims.head_block, True)  # [N, D]
    b_v = load_tile(rows_of(value, i_b, i_kv, o_k), m_k, dims.value, dims.value_block, True)  # [N, Dv]
    p_dk, p_dv = rows_of(grad_key, i_b, i_kv, o_k), rows_of(grad_value, i_b, i_kv, o_k)

    b_dk, b_dv = sweep_rows(
        b_k, b_v, query, grad_out, lse, delta, k_begin, i_b, i_kv, PLAIN, problem, flags, dims, M, N, False
    )
    store_sums(p_dk, m_k, b_dk, scale, PLAIN, dims.head, dims.head_block)
    store_sums(p_dv, m_k, b_dv, 1.0, PLAIN, dims.value, dims.value_block)
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_dk) | has_nonfinite(b_dv), NEGATIVE_DOWN + 1, FINITE)):
        b_dk, b_dv = sweep_rows(
            b_k, b_v, query, grad_out, lse, delta, k_begin, i_b, i_kv, i_pass, problem, flags, dims, M, N, True
        )
        store_sums(p_dk, m_k, b_dk, scale, i_pass, dims.head, dims.head_block)
        store_sums(p_dv, m_k, b_dv, 1.0, i_pass, dims.value, dims.value_block)


@triton.jit
def visit_keys(
    j, b_dq, b_q, b_do, rows, ends, keys, key, value, i_b, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One key tile, for the packed query rows that a program owns."""
    p_k, p_v = keys
    k_begin = j * N
    m_k = k_begin + tl.arange(0, N) < problem.k_len
    b_k = load_tile(p_k + k_begin.to(tl.int64) * key.row, m_k, dims.head, dims.head_block, HIDES)  # [N, D]
    b_v = load_tile(p_v + k_begin.to(tl.int64) * value.row, m_k, dims.value, dims.value_block, HIDES)  # [N, Dv]
    # S = Q K^T, dP = dO V^T
    b_s = multiply_rows(b_q, b_k, flags.precision)  # [M, N]
    b_dp = multiply_rows(b_do, b_v, flags.precision)  # [M, N]
    _, b_ds = differentiate(b_s, b_dp, rows, ends, k_begin, i_b, problem, flags, N, HIDES, False, False)
    # dQ += dS K
    return multiply_columns(b_dq, b_ds, b_k, i_pass, CAREFUL, flags.precision)


@triton.jit
def sweep_keys(
    b_q, b_do, rows, ends, tiles, key, value, i_b, i_kv, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All key tiles that the rows see."""
    first, last, full_first, full_last = tiles
    o_n = tl.arange(0, N)
    keys = (rows_of(key, i_b, i_kv, o_n), rows_of(value, i_b, i_kv, o_n))  # of tile 0
    b_dq = tl.zeros([M, dims.head_block], tl.float32)
    begin = full_last - full_first
    if CAREFUL or flags.bias != "none":
        begin *= 0  # every tile may hide something
    else:
        for j in range(full_first, full_last):
            b_dq = visit_keys(
                j, b_dq, b_q, b_do, rows, ends, keys, key, value, i_b, i_pass, problem, flags, dims, N, False, False
            )
    for i in tl.range(begin, last - first, num_stages=1 if CAREFUL else None):
        j = visited_tile(i, first, full_first, full_last)
        b_dq = visit_keys(
            j, b_dq, b_q, b_do, rows, ends, keys, key, value, i_b, i_pass, problem, flags, dims, N, True, CAREFUL
        )
    return b_dq


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles"])
def grad_query_kernel(
    query, key, value, grad_out, lse, delta, grad_query, tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1,
    )  # fmt: skip
    i_place = tl.program_id(0) // tiles
    # Last row tiles first: under a causal mask they are the longest.
    i_tile = tiles - 1 - tl.program_id(0) % tiles
    i_b, i_kv = i_place // kv_heads, i_place % kv_heads
    o_r = i_tile * M + tl.arange(0, M)
    m_r = o_r < q_len * group
    rows = describe(o_r, i_b, i_kv, problem)
    ends = row_ends(o_r, rows, lse, delta, i_b, problem)
    q_last = (tl.minimum(i_tile * M + M, q_len * group) - 1) // group
    key_tiles = row_schedule(i_tile * M // group, q_last, problem, N)
    b_q = load_tile(rows_of(query, i_b, rows.o_h, rows.o_q), m_r, dims.head, dims.head_block, True)  # [M, D]
    b_do = load_tile(rows_of(grad_out, i_b, rows.o_h, rows.o_q), m_r, dims.value, dims.value_block, True)  # [M, Dv]
    p_dq = rows_of(grad_query, i_b, rows.o_h, rows.o_q)

    b_dq = sweep_keys(b_q, b_do, rows, ends, key_tiles, key, value, i_b, i_kv, PLAIN, problem, flags, dims, M, N, False)
    store_sums(p_dq, m_r, b_dq, scale, PLAIN, dims.head, dims.head_block)
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_dq), NEGATIVE_DOWN + 1, FINITE)):
        b_dq = sweep_keys(
            b_q, b_do, rows, ends, key_tiles, key, value, i_b, i_kv, i_pass, problem, flags, dims, M, N, True
        )
        store_sums(p_dq, m_r, b_dq, scale, i_pass, dims.head, dims.head_block)


@triton.jit
def owned(i, step, SUMS: tl.constexpr, full):
    """What a program spans, or, where the bias broadcasts, sums over, in one dimension: [begin, end)."""
    if SUMS:
        begin, end = i * 0, full
    else:
        begin, end = i * step, tl.minimum(i * step + step, full)
    return begin, end


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "batch", "row_tiles", "key_tiles"])
def grad_bias_kernel(
    query, key, value, grad_out, lse, delta, grad_bias, batch, row_tiles, key_tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1,
    flags: tl.constexpr, dims: tl.constexpr, sums: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Heads are not packed here: rows are queries. sums: which of the four dimensions the bias broadcasts over."""
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1,
    )  # fmt: skip
    heads = kv_heads * group
    own_heads = 1 if sums.heads else heads
    i_own_tile = tl.program_id(0) % (row_tiles * key_tiles)
    i_own_head = tl.program_id(0) // (row_tiles * key_tiles)
    b_begin, b_end = owned(i_own_head // own_heads, 1, sums.batch, batch)
    h_begin, h_end = owned(i_own_head % own_heads, 1, sums.heads, heads)
    q_begin, q_end = owned(i_own_tile // key_tiles, M, sums.rows, q_len)
    k_begin, k_end = owned(i_own_tile % key_tiles, N, sums.keys, k_len)
    b_total = tl.zeros([M, N], tl.float32)
    for i_bh in range(0, (b_end - b_begin) * (h_end - h_begin)):
        i_b, i_h = b_begin + i_bh // (h_end - h_begin), h_begin + i_bh % (h_end - h_begin)
        for q in range(q_begin, q_end, M):
            for k in range(k_begin, k_end, N):
                q_last = tl.minimum(q + M, q_len) - 1
                if (k < hi(q_last, problem)) & (k + N > lo(q, problem)):
                    o_q, o_k = q + tl.arange(0, M), k + tl.arange(0, N)
                    m_q, m_k = o_q < q_len, o_k < k_len
                    i_kv = i_h // group
                    b_q = load_tile(rows_of(query, i_b, i_h, o_q), m_q, dims.head, dims.head_block, True)  # [M, D]
                    b_k = load_tile(rows_of(key, i_b, i_kv, o_k), m_k, dims.head, dims.head_block, True)  # [N, D]
                    b_s = multiply_rows(b_q, b_k, flags.precision)  # [M, N]
                    b_do = load_tile(rows_of(grad_out, i_b, i_h, o_q), m_q, dims.value, dims.value_block, True)
                    b_v = load_tile(rows_of(value, i_b, i_kv, o_k), m_k, dims.value, dims.value_block, True)
                    b_dp = multiply_rows(b_do, b_v, flags.precision)  # [M, N]
                    o_r = tl.where(m_q, o_q * group + i_h % group, q_len * group)
                    rows = describe(o_r, i_b, i_kv, problem)
                    ends = row_ends(o_r, rows, lse, delta, i_b, problem)
                    _, b_ds = differentiate(b_s, b_dp, rows, ends, k, i_b, problem, flags, N, True, False, True)
                    b_total += b_ds
    # Into the contiguous gradient, summed over rows and keys where the bias broadcasts over them.
    o_row, o_key = tl.arange(0, M), tl.arange(0, N)
    if sums.rows:
        b_total = tl.sum(b_total, 0)[None, :]
        o_row = tl.arange(0, 1)
    if sums.keys:
        b_total = tl.sum(b_total, 1)[:, None]
        o_key = tl.arange(0, 1)
    o_row, o_key = q_begin + o_row[:, None], k_begin + o_key[None, :]
    own_rows = 1 if sums.rows else q_len
    own_keys = 1 if sums.keys else k_len
    p_bias = grad_bias + (i_own_head.to(tl.int64) * own_rows + o_row) * own_keys + o_key
    tl.store(p_bias, b_total.to(grad_bias.dtype.element_ty), mask=(o_row < own_rows) & (o_key < own_keys))


@triton.jit(do_not_specialize=["heads", "q_len", "tiles"])
def delta_kernel(
    out, grad_out, grad_lse, delta, heads, q_len, tiles, HAS_GRAD_LSE: tl.constexpr, dims: tl.constexpr, M: tl.constexpr
):
    """delta = rowsum(dO * O) - dlse: how far a row's gradient moves with its normaliser."""
    i_head = tl.program_id(0) // tiles
    i_b, i_h = i_head // heads, i_head % heads
    o_q = tl.program_id(0) % tiles * M + tl.arange(0, M)
    m_q = o_q < q_len
    b_o = load_tile(rows_of(out, i_b, i_h, o_q), m_q, dims.value, dims.value_block, True).to(tl.float32)  # [M, Dv]
    b_do = load_tile(rows_of(grad_out, i_b, i_h, o_q), m_q, dims.value, dims.value_block, True).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    o_row = i_head.to(tl.int64) * q_len + o_q
    if HAS_GRAD_LSE:
        b_delta -= tl.load(grad_lse + o_row, mask=m_q, other=0.0)
    tl.store(delta + o_row, b_delta, mask=m_q)
