"""2-simplicial attention (Roy et al., "Fast and Simplex: 2-Simplicial Attention in Triton", sections 3 and 4).

A pair is a query row and a second key that it sees: a row of plain windowed attention with the query q * k2, whose
output o counts as o * v2. A tile holds M pairs, W second keys for each of M / W rows or W rows for each of M / W second
keys, and streams over the first keys as in forward.py and backward.py; then each W are summed, in registers. With
P = exp(S - lse), and dS = P * ((dO * v2) V^T - delta):
  simplicial_forward_kernel         owns packed query rows:  O = sum_k2 (P V) * v2
  simplicial_grad_key_value_kernel  owns first keys:         dV = P^T (dO * v2), dK = dS^T (q * k2)
  simplicial_grad_query_kernel      owns packed query rows:  dQ = sum_k2 (dS K) * k2
  simplicial_grad_second_kernel     owns second keys:        dK2 = sum_q (dS K) * q, dV2 = sum_q (P V) * dO
Nothing is summed in memory, so the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import backward, forward
from .backward import differentiate, row_ends
from .logits import LOG2_E, unit
from .place import Rows, describe, place_of, place_of_rows
from .problem import FAR, UNSPECIALIZED, Problem
from .schedule import column_schedule, row_schedule, tiles_of_rows, visited_tile
from .tile import (
    FINITE,
    INF,
    NEGATIVE_DOWN,
    NEGATIVE_UP,
    PLAIN,
    POSITIVE_UP,
    has_nonfinite,
    load_tile,
    multiply_columns,
    multiply_rows,
    rows_of,
    store_sums,
    zeros,
)


@triton.jit
def describe_pairs(o_r, o_back, window2, place, problem, flags: tl.constexpr):
    """The pairs of packed rows with the second keys o_back before their own positions, and these keys' positions. What
    a row does not see is no pair."""
    rows = describe(o_r, place, problem, flags)
    m_r = rows.m_r & (o_back < window2) & (o_back <= rows.o_q)
    o_second = tl.where(m_r, rows.o_q - o_back, 0)
    o_q = tl.where(m_r, rows.o_q, -FAR)
    pairs = Rows(m_r, rows.o_b, rows.o_h, o_q, rows.o_row, rows.o_number, rows.limits, rows.o_diagonal)
    return pairs, o_second


@triton.jit
def row_pairs(r_first, i_back, window2, place, problem, flags: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """Of the M / W packed rows from r_first on, each with its second keys i_back to i_back + W - 1 back."""
    o_m = tl.arange(0, M)
    return describe_pairs(r_first + o_m // W, i_back + o_m % W, window2, place, problem, flags)


@triton.jit
def rows_at(view, pairs):
    return rows_of(view, pairs.o_b, pairs.o_h, pairs.o_row)


@triton.jit
def load_products(p_rows, p_second, m_r, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows times what belongs to their second keys, [M, BLOCK], in their dtype."""
    b_rows = load_tile(p_rows, m_r, DIM, BLOCK, True)
    b_second = load_tile(p_second, m_r, DIM, BLOCK, True)
    return (b_rows.to(tl.float32) * b_second.to(tl.float32)).to(b_rows.dtype)


@triton.jit
def sum_pairs(b_sums, p_other, m_r, DIM: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr):
    """[M / W, BLOCK]: the pairs' sums times what else is theirs, each W of them together."""
    b_other = load_tile(p_other, m_r, DIM, BLOCK, True).to(tl.float32)
    b_sums = tl.where(m_r[:, None], b_sums * b_other, 0.0)
    return tl.sum(tl.reshape(b_sums, (b_sums.shape[0] // W, W, BLOCK)), 1)


@triton.jit
def amend(b_sums, b_pass, i_pass):
    """What store_sums does with a pass's sums, of sums that stay in registers."""
    b_more = tl.where((i_pass == POSITIVE_UP) | (i_pass == NEGATIVE_DOWN), INF, -INF)
    return tl.where(i_pass == FINITE, b_pass, tl.where(b_pass > 0, b_sums + b_more, b_sums))


@triton.jit
def sweep_values(
    b_q, pairs, queries, tiles, place, key, value, b_shift, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """forward.sweep with its passes: weights relative to a running max, or, FIXED, to b_shift."""
    b_acc, b_max, b_sum = forward.sweep(
        b_q, pairs, queries, tiles, place, key, value, None, PLAIN, b_shift, problem, flags, dims, M, N, False, FIXED
    )
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_acc), NEGATIVE_UP, FINITE)):
        b_pass, _, _ = forward.sweep(
            b_q, pairs, queries, tiles, place, key, value, None, i_pass, b_shift, problem, flags, dims, M, N,
            True, FIXED,
        )  # fmt: skip
        b_acc = amend(b_acc, b_pass, i_pass)
    return b_acc, b_max, b_sum


@triton.jit
def sweep_keys(
    b_q, b_do, pairs, queries, ends, tiles, key, value, place, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """backward.sweep_keys with its passes."""
    b_dq = backward.sweep_keys(
        b_q, b_do, pairs, queries, ends, tiles, key, value, place, PLAIN, problem, flags, dims, M, N, False
    )
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_dq), NEGATIVE_DOWN + 1, FINITE)):
        b_pass = backward.sweep_keys(
            b_q, b_do, pairs, queries, ends, tiles, key, value, place, i_pass, problem, flags, dims, M, N, True
        )
        b_dq = amend(b_dq, b_pass, i_pass)
    return b_dq


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles", "window2"])
def simplicial_forward_kernel(
    query, key, value, key2, value2, out, lse, window2, row_tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    )  # fmt: skip
    OWN: tl.constexpr = M // W
    place, r_first = place_of_rows(tl.program_id(0), row_tiles, problem, flags, OWN)
    own = describe(r_first + tl.arange(0, OWN), place, problem, flags)
    queries, tiles = tiles_of_rows(r_first, place, problem, flags, OWN, N)
    b_factor = unit(problem, flags) * LOG2_E

    b_out = zeros(OWN, dims.value_block)
    b_highest = tl.full([OWN], -INF, tl.float32)
    b_total = tl.zeros([OWN], tl.float32)
    for i_back in tl.range(0, window2, W, num_stages=1):
        pairs, o_second = row_pairs(r_first, i_back, window2, place, problem, flags, M, W)
        p_k2 = rows_of(key2, place.i_b, place.i_kv, o_second)
        p_v2 = rows_of(value2, place.i_b, place.i_kv, o_second)
        b_q = load_products(rows_at(query, pairs), p_k2, pairs.m_r, dims.head, dims.head_block)  # [M, D]
        b_acc, b_max, b_sum = sweep_values(
            b_q, pairs, queries, tiles, place, key, value, 0.0, problem, flags, dims, M, N, False
        )
        # The softmax over the second keys goes on where that over the first ones has ended.
        b_max = tl.reshape(tl.where(pairs.m_r, b_max, -INF), (OWN, W))
        b_sum = tl.reshape(tl.where(pairs.m_r, b_sum, 0.0), (OWN, W))
        b_before = b_highest
        b_highest = tl.maximum(b_before, tl.max(b_max, 1))
        b_shift = tl.where(b_highest == -INF, 0.0, b_highest)
        b_rescale = tl.exp2((b_before - b_shift) * b_factor)
        b_weight = tl.exp2((b_max - b_shift[:, None]) * b_factor)  # [OWN, W]
        b_total = b_total * b_rescale + tl.sum(b_weight * b_sum, 1)
        b_acc *= tl.reshape(b_weight, (M,))[:, None]
        b_out = b_out * b_rescale[:, None] + sum_pairs(b_acc, p_v2, pairs.m_r, dims.value_dim, dims.value_block, W)

    b_total = tl.where(own.m_r, b_total, 1.0)
    b_lse = ((b_highest * unit(problem, flags)).to(tl.float64) + tl.log(b_total.to(tl.float64))).to(tl.float32)
    tl.store(lse + own.o_number, b_lse, mask=own.m_r)
    b_factor = (1.0 / b_total)[:, None]
    store_sums(rows_at(out, own), own.m_r, b_out, b_factor, PLAIN, dims.value_dim, dims.value_block, False)


@triton.jit
def visit_pairs(
    i, steps, sums, b_k, b_v, query, key2, value2, grad_out, lse, delta, window2, k_begin, place, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, HIDES: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """One tile of pairs, for the first keys that a program owns: step i % steps of the row tile i // steps."""
    b_dk, b_dv = sums
    pairs, o_second = row_pairs(i // steps * (M // W), i % steps * W, window2, place, problem, flags, M, W)
    p_k2 = rows_of(key2, place.i_b, place.i_kv, o_second)
    p_v2 = rows_of(value2, place.i_b, place.i_kv, o_second)
    b_q = load_products(rows_at(query, pairs), p_k2, pairs.m_r, dims.head, dims.head_block)  # [M, D]
    b_do = load_products(rows_at(grad_out, pairs), p_v2, pairs.m_r, dims.value_dim, dims.value_block)  # [M, Dv]
    ends = row_ends(pairs, lse, delta)
    # S^T = K Q^T, dP^T = V dO^T
    b_s = multiply_rows(b_k, b_q, flags)  # [N, M]
    b_dp = multiply_rows(b_v, b_do, flags)  # [N, M]
    b_p, b_ds = differentiate(b_s, b_dp, pairs, ends, k_begin, place, problem, flags, N, HIDES, True, False)
    # dV += P^T dO, dK += dS^T Q
    b_dv = multiply_columns(b_dv, b_p, b_do, i_pass, CAREFUL, flags)
    b_dk = multiply_columns(b_dk, b_ds, b_q, i_pass, CAREFUL, flags)
    return b_dk, b_dv


@triton.jit
def sweep_pairs(
    b_k, b_v, query, key2, value2, grad_out, lse, delta, window2, k_begin, place, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All pairs that see the first keys."""
    tiles = column_schedule(k_begin, place, problem, flags, M // W, N)
    steps = tl.cdiv(window2, W)
    b_dk = zeros(N, dims.head_block)
    b_dv = zeros(N, dims.value_block)
    begin = tiles.full_last - tiles.full_first
    if CAREFUL:
        begin *= 0
    else:
        for i in range(tiles.full_first * steps, tiles.full_last * steps):
            b_dk, b_dv = visit_pairs(
                i, steps, (b_dk, b_dv), b_k, b_v, query, key2, value2, grad_out, lse, delta, window2, k_begin, place,
                i_pass, problem, flags, dims, M, N, W, False, False,
            )  # fmt: skip
    for i in tl.range(begin * steps, (tiles.last - tiles.first) * steps, num_stages=1 if CAREFUL else None):
        j = visited_tile(i // steps, tiles, flags) * steps + i % steps
        b_dk, b_dv = visit_pairs(
            j, steps, (b_dk, b_dv), b_k, b_v, query, key2, value2, grad_out, lse, delta, window2, k_begin, place,
            i_pass, problem, flags, dims, M, N, W, True, CAREFUL,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles", "window2"])
def simplicial_grad_key_value_kernel(
    query, key, value, key2, value2, grad_out, lse, delta, grad_key, grad_value, window2, tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    )  # fmt: skip
    i_place = tl.program_id(0) // tiles
    k_begin = tl.program_id(0) % tiles * N
    place = place_of(i_place // kv_heads, i_place % kv_heads, problem, flags)
    o_k = k_begin + tl.arange(0, N)
    m_k = o_k < place.k_len
    i_b, i_kv = place.i_b, place.i_kv
    b_k = load_tile(rows_of(key, i_b, i_kv, o_k), m_k, dims.head, dims.head_block, True)  # [N, D]
    b_v = load_tile(rows_of(value, i_b, i_kv, o_k), m_k, dims.value_dim, dims.value_block, True)  # [N, Dv]
    p_dk, p_dv = rows_of(grad_key, i_b, i_kv, o_k), rows_of(grad_value, i_b, i_kv, o_k)

    b_dk, b_dv = sweep_pairs(
        b_k, b_v, query, key2, value2, grad_out, lse, delta, window2, k_begin, place, PLAIN, problem, flags, dims,
        M, N, W, False,
    )  # fmt: skip
    store_sums(p_dk, m_k, b_dk, scale, PLAIN, dims.head, dims.head_block, False)
    store_sums(p_dv, m_k, b_dv, 1.0, PLAIN, dims.value_dim, dims.value_block, False)
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_dk) | has_nonfinite(b_dv), NEGATIVE_DOWN + 1, FINITE)):
        b_dk, b_dv = sweep_pairs(
            b_k, b_v, query, key2, value2, grad_out, lse, delta, window2, k_begin, place, i_pass, problem, flags,
            dims, M, N, W, True,
        )  # fmt: skip
        store_sums(p_dk, m_k, b_dk, scale, i_pass, dims.head, dims.head_block, False)
        store_sums(p_dv, m_k, b_dv, 1.0, i_pass, dims.value_dim, dims.value_block, False)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles", "window2"])
def simplicial_grad_query_kernel(
    query, key, value, key2, value2, grad_out, lse, delta, grad_query, window2, row_tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    )  # fmt: skip
    OWN: tl.constexpr = M // W
    place, r_first = place_of_rows(tl.program_id(0), row_tiles, problem, flags, OWN)
    own = describe(r_first + tl.arange(0, OWN), place, problem, flags)
    queries, tiles = tiles_of_rows(r_first, place, problem, flags, OWN, N)
    b_total = zeros(OWN, dims.head_block)
    for i_back in tl.range(0, window2, W, num_stages=1):
        pairs, o_second = row_pairs(r_first, i_back, window2, place, problem, flags, M, W)
        p_k2 = rows_of(key2, place.i_b, place.i_kv, o_second)
        p_v2 = rows_of(value2, place.i_b, place.i_kv, o_second)
        b_q = load_products(rows_at(query, pairs), p_k2, pairs.m_r, dims.head, dims.head_block)  # [M, D]
        b_do = load_products(rows_at(grad_out, pairs), p_v2, pairs.m_r, dims.value_dim, dims.value_block)  # [M, Dv]
        ends = row_ends(pairs, lse, delta)
        b_dq = sweep_keys(b_q, b_do, pairs, queries, ends, tiles, key, value, place, problem, flags, dims, M, N)
        b_total += sum_pairs(b_dq, p_k2, pairs.m_r, dims.head, dims.head_block, W)
    store_sums(rows_at(grad_query, own), own.m_r, b_total, scale, PLAIN, dims.head, dims.head_block, False)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles", "window2"])
def simplicial_grad_second_kernel(
    query, key, value, key2, value2, grad_out, lse, delta, grad_key2, grad_value2, window2, tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    )  # fmt: skip
    OWN: tl.constexpr = M // W
    i_place = tl.program_id(0) // tiles
    k_first = tl.program_id(0) % tiles * OWN
    place = place_of(i_place // kv_heads, i_place % kv_heads, problem, flags)
    i_b, i_kv = place.i_b, place.i_kv
    o_m = tl.arange(0, M)
    b_dk2 = zeros(OWN, dims.head_block)
    b_dv2 = zeros(OWN, dims.value_block)
    # The rows that see a second key lie together: those of the heads of its own query, of the next one, and so on.
    for i_row in tl.range(0, window2 * group, W, num_stages=1):
        o_row = i_row + o_m % W
        o_r = (k_first + o_m // W) * group + o_row
        pairs, o_second = describe_pairs(o_r, o_row // group, window2, place, problem, flags)
        q_last = tl.minimum(k_first + OWN - 1 + (i_row + W - 1) // group, q_len - 1)
        q_first = tl.minimum(k_first + i_row // group, q_last)
        tiles_seen = row_schedule(q_first, q_last, place, flags, N)
        p_q, p_do = rows_at(query, pairs), rows_at(grad_out, pairs)
        p_k2, p_v2 = rows_of(key2, i_b, i_kv, o_second), rows_of(value2, i_b, i_kv, o_second)
        b_q = load_products(p_q, p_k2, pairs.m_r, dims.head, dims.head_block)  # [M, D]
        b_do = load_products(p_do, p_v2, pairs.m_r, dims.value_dim, dims.value_block)  # [M, Dv]
        ends = row_ends(pairs, lse, delta)
        queries = (q_first, q_last)
        b_dq = sweep_keys(b_q, b_do, pairs, queries, ends, tiles_seen, key, value, place, problem, flags, dims, M, N)
        b_dk2 += sum_pairs(b_dq, p_q, pairs.m_r, dims.head, dims.head_block, W)
        # P V, weights relative to lse
        b_shift = ends[0] / unit(problem, flags)
        b_acc, _, _ = sweep_values(
            b_q, pairs, queries, tiles_seen, place, key, value, b_shift, problem, flags, dims, M, N, True
        )
        b_dv2 += sum_pairs(b_acc, p_do, pairs.m_r, dims.value_dim, dims.value_block, W)
    o_own = k_first + tl.arange(0, OWN)
    m_own = o_own < place.k_len
    p_dk2, p_dv2 = rows_of(grad_key2, i_b, i_kv, o_own), rows_of(grad_value2, i_b, i_kv, o_own)
    store_sums(p_dk2, m_own, b_dk2, scale, PLAIN, dims.head, dims.head_block, False)
    store_sums(p_dv2, m_own, b_dv2, 1.0, PLAIN, dims.value_dim, dims.value_block, False)
