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

from .logits import LOG2_E, by_row, dropout_factor, to_logits, unit
from .place import describe, place_of, place_of_rows
from .problem import UNSPECIALIZED, Problem
from .schedule import (
    WALK,
    column_chunk,
    column_schedule,
    hi,
    lo,
    lowest_bit,
    row_chunk,
    tile_count,
    tiles_of_rows,
    visited_tile,
)
from .tile import (
    FINITE,
    INF,
    NEGATIVE_DOWN,
    PLAIN,
    has_nonfinite,
    keys_of,
    load_tile,
    multiply_columns,
    multiply_pieces,
    multiply_rows,
    own_tile,
    rows_of,
    store_sums,
    zeros,
)


@triton.jit
def row_ends(rows, lse, delta):
    """The rows' normalisers and deltas: what their weights' gradients need. A row past the last has weights 0."""
    b_lse = tl.load(lse + rows.o_number, mask=rows.m_r, other=INF)
    b_delta = tl.load(delta + rows.o_number, mask=rows.m_r, other=0.0)
    return tl.where(b_lse == -INF, INF, b_lse), b_delta  # an empty row's weights are 0, not inf


@triton.jit
def differentiate(
    b_s, b_dp, rows, ends, k_begin, place, problem,
    flags: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, KEYS_FIRST: tl.constexpr, OF_LOGITS: tl.constexpr,
):  # fmt: skip
    """From scores and dP the weights that multiply values, and dS: the gradient of the scores, or, for a bias, of the
    logits, which softcap's slope is not yet part of."""
    b_s, b_capped = to_logits(b_s, rows, k_begin, place, problem, flags, N, HIDES, KEYS_FIRST)
    b_lse, b_delta = ends
    b_p = tl.exp2((b_s * unit(problem, flags) - by_row(b_lse, KEYS_FIRST)) * LOG2_E)
    if HIDES:
        b_p = tl.where(b_s == -INF, 0.0, b_p)  # even where lse is NaN
    b_weights = b_p
    if flags.dropout:
        b_factor = dropout_factor(rows, k_begin, problem, N, KEYS_FIRST)
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
    j, sums, b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """One tile of packed query rows, for the keys that a program owns."""
    b_dk, b_dv = sums
    rows = describe(j * M + tl.arange(0, M), place, problem, flags)
    # A member may have fewer rows than the others.
    RAGGED: tl.constexpr = HIDES or flags.members
    p_q, p_do = (
        rows_of(query, rows.o_b, rows.o_h, rows.o_row),
        rows_of(grad_out, rows.o_b, rows.o_h, rows.o_row),
    )
    if not dims.piece:
        b_q = load_tile(p_q, rows.m_r, dims.head, dims.head_block, RAGGED)  # [M, D]
        b_do = load_tile(p_do, rows.m_r, dims.value_dim, dims.value_block, RAGGED)  # [M, Dv]
    ends = row_ends(rows, lse, delta)
    # S^T = K Q^T, dP^T = V dO^T
    if dims.piece:
        m_k = k_begin + tl.arange(0, N) < place.k_len
        b_s = multiply_pieces(b_k, m_k, p_q, rows.m_r, dims.head, dims.piece, flags)  # [N, M]
        b_dp = multiply_pieces(b_v, m_k, p_do, rows.m_r, dims.value_dim, dims.piece, flags)  # [N, M]
        b_q = load_tile(p_q, rows.m_r, dims.head, dims.head_block, RAGGED)  # [M, D]
        b_do = load_tile(p_do, rows.m_r, dims.value_dim, dims.value_block, RAGGED)  # [M, Dv]
    else:
        b_s = multiply_rows(b_k, b_q, flags)  # [N, M]
        b_dp = multiply_rows(b_v, b_do, flags)  # [N, M]
    b_p, b_ds = differentiate(b_s, b_dp, rows, ends, k_begin, place, problem, flags, N, HIDES, True, False)
    # dV += P^T dO, dK += dS^T Q
    b_dv = multiply_columns(b_dv, b_p, b_do, i_pass, CAREFUL, flags)
    b_dk = multiply_columns(b_dk, b_ds, b_q, i_pass, CAREFUL, flags)
    return b_dk, b_dv


@triton.jit
def sweep_rows(
    b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All row tiles that see the keys."""
    tiles = column_schedule(k_begin, place, problem, flags, M, N)
    b_dk = zeros(N, dims.head_block)
    b_dv = zeros(N, dims.value_block)
    EVERY_TILE_HIDES: tl.constexpr = CAREFUL or flags.bias != "none"
    if flags.blocks:
        for i_chunk in tl.range(tiles.first // WALK, tl.cdiv(tiles.last, WALK), num_stages=1):
            whole, whole_count, cut, cut_count = column_chunk(
                i_chunk, tiles, k_begin, place, problem, flags, M, N, not EVERY_TILE_HIDES
            )
            if not EVERY_TILE_HIDES:
                for _ in range(0, whole_count):
                    j = i_chunk * WALK + lowest_bit(whole)
                    whole &= whole - 1
                    b_dk, b_dv = visit_rows(
                        j, (b_dk, b_dv), b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem,
                        flags, dims, M, N, False, False,
                    )  # fmt: skip
            for _ in tl.range(0, cut_count, num_stages=1 if CAREFUL else None):
                j = i_chunk * WALK + lowest_bit(cut)
                cut &= cut - 1
                b_dk, b_dv = visit_rows(
                    j, (b_dk, b_dv), b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem,
                    flags, dims, M, N, True, CAREFUL,
                )  # fmt: skip
    else:
        begin = tiles.full_last - tiles.full_first
        if EVERY_TILE_HIDES:
            begin *= 0
        else:
            for j in range(tiles.full_first, tiles.full_last):
                b_dk, b_dv = visit_rows(
                    j, (b_dk, b_dv), b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem,
                    flags, dims, M, N, False, False,
                )  # fmt: skip
        for i in tl.range(begin, tiles.last - tiles.first, num_stages=1 if CAREFUL else None):
            j = visited_tile(i, tiles, flags)
            b_dk, b_dv = visit_rows(
                j, (b_dk, b_dv), b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem,
                flags, dims, M, N, True, CAREFUL,
            )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles"])
def grad_key_value_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
    if flags.sequences:
        o_k += place.k_begin
    i_b, i_kv = place.i_b, place.i_kv
    b_k = own_tile(rows_of(key, i_b, i_kv, o_k), m_k, dims.head, dims.head_block, dims.piece)  # [N, D]
    b_v = own_tile(rows_of(value, i_b, i_kv, o_k), m_k, dims.value_dim, dims.value_block, dims.piece)  # [N, Dv]
    p_dk, p_dv = rows_of(grad_key, i_b, i_kv, o_k), rows_of(grad_value, i_b, i_kv, o_k)

    b_dk, b_dv = sweep_rows(
        b_k, b_v, query, grad_out, lse, delta, k_begin, place, PLAIN, problem, flags, dims, M, N, False
    )
    store_sums(p_dk, m_k, b_dk, scale, PLAIN, dims.head, dims.head_block, False)
    store_sums(p_dv, m_k, b_dv, 1.0, PLAIN, dims.value_dim, dims.value_block, False)
    for i_pass in range(FINITE, tl.where(has_nonfinite(b_dk) | has_nonfinite(b_dv), NEGATIVE_DOWN + 1, FINITE)):
        b_dk, b_dv = sweep_rows(
            b_k, b_v, query, grad_out, lse, delta, k_begin, place, i_pass, problem, flags, dims, M, N, True
        )
        store_sums(p_dk, m_k, b_dk, scale, i_pass, dims.head, dims.head_block, False)
        store_sums(p_dv, m_k, b_dv, 1.0, i_pass, dims.value_dim, dims.value_block, False)


@triton.jit
def visit_keys(
    j, b_dq, b_q, b_do, rows, ends, keys, key, value, place, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One key tile, for the packed query rows that a program owns."""
    p_k, p_v = keys
    k_begin = j * N
    m_k = k_begin + tl.arange(0, N) < place.k_len
    p_k = keys_of(key, p_k, k_begin, m_k, place, problem, flags, N)
    p_v = keys_of(value, p_v, k_begin, m_k, place, problem, flags, N)
    # S = Q K^T, dP = dO V^T
    if dims.piece:
        b_s = multiply_pieces(b_q, rows.m_r, p_k, m_k, dims.head, dims.piece, flags)  # [M, N]
        b_dp = multiply_pieces(b_do, rows.m_r, p_v, m_k, dims.value_dim, dims.piece, flags)  # [M, N]
        b_k = load_tile(p_k, m_k, dims.head, dims.head_block, HIDES)  # [N, D]
    else:
        b_k = load_tile(p_k, m_k, dims.head, dims.head_block, HIDES)  # [N, D]
        b_v = load_tile(p_v, m_k, dims.value_dim, dims.value_block, HIDES)  # [N, Dv]
        b_s = multiply_rows(b_q, b_k, flags)  # [M, N]
        b_dp = multiply_rows(b_do, b_v, flags)  # [M, N]
    _, b_ds = differentiate(b_s, b_dp, rows, ends, k_begin, place, problem, flags, N, HIDES, False, False)
    # dQ += dS K
    return multiply_columns(b_dq, b_ds, b_k, i_pass, CAREFUL, flags)


@triton.jit
def sweep_keys(
    b_q, b_do, rows, queries, ends, tiles, key, value, place, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All key tiles that the rows see."""
    o_n = tl.arange(0, N)
    if flags.sequences:
        o_n += place.k_begin
    keys = (rows_of(key, place.i_b, place.i_kv, o_n), rows_of(value, place.i_b, place.i_kv, o_n))  # of tile 0
    b_dq = zeros(M, dims.head_block)
    EVERY_TILE_HIDES: tl.constexpr = CAREFUL or flags.bias != "none"
    if flags.blocks:
        q_first, q_last = queries
        first = tiles.first
        if flags.first_keys:
            first = tl.where(tiles.lead_first < tiles.lead_last, tiles.lead_first, first)
        for i_chunk in tl.range(first // WALK, tl.cdiv(tiles.last, WALK), num_stages=1):
            whole, whole_count, cut, cut_count = row_chunk(
                i_chunk, tiles, q_first, q_last, place, problem, flags, N, not EVERY_TILE_HIDES
            )
            if not EVERY_TILE_HIDES:
                for _ in range(0, whole_count):
                    j = i_chunk * WALK + lowest_bit(whole)
                    whole &= whole - 1
                    b_dq = visit_keys(
                        j, b_dq, b_q, b_do, rows, ends, keys, key, value, place, i_pass, problem,
                        flags, dims, N, False, False,
                    )  # fmt: skip
            for _ in tl.range(0, cut_count, num_stages=1 if CAREFUL else None):
                j = i_chunk * WALK + lowest_bit(cut)
                cut &= cut - 1
                b_dq = visit_keys(
                    j, b_dq, b_q, b_do, rows, ends, keys, key, value, place, i_pass, problem,
                    flags, dims, N, True, CAREFUL,
                )  # fmt: skip
    else:
        begin = tiles.full_last - tiles.full_first
        if EVERY_TILE_HIDES:
            begin *= 0
        else:
            for j in range(tiles.full_first, tiles.full_last):
                b_dq = visit_keys(
                    j, b_dq, b_q, b_do, rows, ends, keys, key, value, place, i_pass, problem,
                    flags, dims, N, False, False,
                )  # fmt: skip
        for i in tl.range(begin, tile_count(tiles, flags), num_stages=1 if CAREFUL else None):
            j = visited_tile(i, tiles, flags)
            b_dq = visit_keys(
                j, b_dq, b_q, b_do, rows, ends, keys, key, value, place, i_pass, problem,
                flags, dims, N, True, CAREFUL,
            )  # fmt: skip
    return b_dq


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles"])
def grad_query_kernel(
    query, key, value, grad_out, lse, delta, grad_query, row_tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    )  # fmt: skip
    place, r_first = place_of_rows(tl.program_id(0), row_tiles, problem, flags, M)
    rows = describe(r_first + tl.arange(0, M), place, problem, flags)
    m_r = rows.m_r
    ends = row_ends(rows, lse, delta)
    queries, tiles = tiles_of_rows(r_first, place, problem, flags, M, N)
    p_q, p_do = (
        rows_of(query, rows.o_b, rows.o_h, rows.o_row),
        rows_of(grad_out, rows.o_b, rows.o_h, rows.o_row),
    )
    b_q = own_tile(p_q, m_r, dims.head, dims.head_block, dims.piece)  # [M, D]
    b_do = own_tile(p_do, m_r, dims.value_dim, dims.value_block, dims.piece)  # [M, Dv]
    p_dq = rows_of(grad_query, rows.o_b, rows.o_h, rows.o_row)

    b_dq = sweep_keys(
        b_q, b_do, rows, queries, ends, tiles, key, value, place, PLAIN, problem, flags, dims, M, N, False
    )
    again = has_nonfinite(b_dq)
    m_now = m_r
    if flags.adds:  # what is added to must be added to once
        m_now = tl.where(again, False, m_r)
    store_sums(p_dq, m_now, b_dq, scale, PLAIN, dims.head, dims.head_block, flags.adds)
    for i_pass in range(FINITE, tl.where(again, NEGATIVE_DOWN + 1, FINITE)):
        b_dq = sweep_keys(
            b_q, b_do, rows, queries, ends, tiles, key, value, place, i_pass, problem, flags, dims, M, N, True
        )
        store_sums(p_dq, m_r, b_dq, scale, i_pass, dims.head, dims.head_block, flags.adds)


@triton.jit
def owned(i, step, SUMS: tl.constexpr, full):
    """What a program spans, or, where the bias broadcasts, sums over, in one dimension: [begin, end)."""
    if SUMS:
        begin, end = i * 0, full
    else:
        begin, end = i * step, tl.minimum(i * step + step, full)
    return begin, end


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles", "key_tiles"])
def grad_bias_kernel(
    query, key, value, grad_out, lse, delta, grad_bias, row_tiles, key_tiles,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, sums: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Heads are not packed here: rows are queries. sums: which of the four dimensions the bias broadcasts over."""
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
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
        i_kv = i_h // group
        place = place_of(i_b, i_kv, problem, flags)
        for q in range(q_begin, q_end, M):
            for k in range(k_begin, k_end, N):
                q_last = tl.minimum(q + M, q_len) - 1
                begin = lo(q, place.early, k_len, flags)
                if flags.first_keys:
                    begin = tl.where(k < place.early.first, 0, begin)
                if (k < hi(q_last, place.early, k_len)) & (k + N > begin):
                    o_q, o_k = q + tl.arange(0, M), k + tl.arange(0, N)
                    m_q, m_k = o_q < q_len, o_k < k_len
                    p_q, p_do = rows_of(query, i_b, i_h, o_q), rows_of(grad_out, i_b, i_h, o_q)
                    p_k, p_v = rows_of(key, i_b, i_kv, o_k), rows_of(value, i_b, i_kv, o_k)
                    if dims.piece:
                        b_s = multiply_pieces(p_q, m_q, p_k, m_k, dims.head, dims.piece, flags)  # [M, N]
                        b_dp = multiply_pieces(p_do, m_q, p_v, m_k, dims.value_dim, dims.piece, flags)  # [M, N]
                    else:
                        b_q = load_tile(p_q, m_q, dims.head, dims.head_block, True)  # [M, D]
                        b_k = load_tile(p_k, m_k, dims.head, dims.head_block, True)  # [N, D]
                        b_s = multiply_rows(b_q, b_k, flags)  # [M, N]
                        b_do = load_tile(p_do, m_q, dims.value_dim, dims.value_block, True)  # [M, Dv]
                        b_v = load_tile(p_v, m_k, dims.value_dim, dims.value_block, True)  # [N, Dv]
                        b_dp = multiply_rows(b_do, b_v, flags)  # [M, N]
                    o_r = tl.where(m_q, o_q * group + i_h % group, q_len * group)
                    rows = describe(o_r, place, problem, flags)
                    ends = row_ends(rows, lse, delta)
                    _, b_ds = differentiate(b_s, b_dp, rows, ends, k, place, problem, flags, N, True, False, True)
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
    b_o = load_tile(rows_of(out, i_b, i_h, o_q), m_q, dims.value_dim, dims.value_block, True).to(tl.float32)  # [M, Dv]
    b_do = load_tile(rows_of(grad_out, i_b, i_h, o_q), m_q, dims.value_dim, dims.value_block, True).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    o_row = i_head.to(tl.int64) * q_len + o_q
    if HAS_GRAD_LSE:
        b_delta -= tl.load(grad_lse + o_row, mask=m_q, other=0.0)
    tl.store(delta + o_row, b_delta, mask=m_q)
