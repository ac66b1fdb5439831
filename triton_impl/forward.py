"""Forward, FlashAttention-2's loop order (Dao, "FlashAttention-2", 3.1), the twin of csrc/cuda/sm80/forward.cuh.

A program owns a tile of packed query rows and streams over the key tiles that they see: Q is read and O written once, K
and V are read once per row tile. A split (split-KV) is the same program over a part of its schedule, whose result is a
partial one for combine_kernel (csrc/cuda/combine.cuh).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logits import LOG2_E, dropout_factor, to_logits, unit
from .place import describe, place_of_rows
from .problem import UNSPECIALIZED, Problem
from .schedule import WALK, lowest_bit, row_chunk, tile_count, tiles_of_rows, visited_tile, within
from .tile import (
    FINITE,
    INF,
    NEGATIVE_UP,
    PLAIN,
    has_nonfinite,
    keys_of,
    load_tile,
    multiply_columns,
    multiply_pieces,
    multiply_rows,
    nonfinite_rows,
    own_tile,
    rows_of,
    store_sums,
    tile_at,
    zeros,
)


class Carry(NamedTuple):
    """The states of rows whose softmax goes on in another call; acc has rows of the value dim."""

    max: Any
    sum: Any
    acc: Any


class Partial(NamedTuple):
    """Results of the splits: [split][number][value dim] and [split][number], numbers as of lse."""

    out: Any
    lse: Any


@triton.jit
def update(b_s, b_acc, b_max, b_sum, unified, problem, flags: tl.constexpr, FIXED: tl.constexpr):
    """The online softmax: scores become weights relative to the running max, sums so far are rescaled to it; or, FIXED,
    weights relative to `unified`."""
    b_factor = unit(problem, flags) * LOG2_E
    b_highest = tl.maximum(b_max, tl.max(b_s, 1))  # [M]
    if FIXED:
        b_shift = tl.zeros_like(b_highest) + unified
    else:
        b_shift = tl.where(b_highest == -INF, 0.0, b_highest)  # nothing seen yet: weights 0, not NaN
        b_rescale = tl.exp2((b_max - b_shift) * b_factor)
    if flags.general:  # as low as floats go: differences are taken before they are scaled
        b_p = tl.exp2((b_s - b_shift[:, None]) * b_factor)  # [M, N]
    else:
        b_p = tl.exp2(b_s * b_factor - (b_shift * b_factor)[:, None])
    if FIXED:
        b_sum += tl.sum(b_p, 1)
    else:
        b_acc, b_sum = b_acc * b_rescale[:, None], b_sum * b_rescale + tl.sum(b_p, 1)
    return b_p, b_acc, b_highest, b_sum


@triton.jit
def visit(
    j, state, b_q, rows, place, keys, key, value, i_pass, unified, problem,
    flags: tl.constexpr, dims: tl.constexpr, N: tl.constexpr, HIDES: tl.constexpr, CAREFUL: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """One key tile."""
    b_acc, b_max, b_sum = state
    p_k, p_v = keys
    k_begin = j * N
    m_k = k_begin + tl.arange(0, N) < place.k_len
    # S = Q K^T
    p_some = keys_of(key, p_k, k_begin, m_k, place, problem, flags, N)
    if dims.piece:
        b_s = multiply_pieces(b_q, rows.m_r, p_some, m_k, dims.head, dims.piece, flags)  # [M, N]
    else:
        b_k = load_tile(p_some, m_k, dims.head, dims.head_block, HIDES)  # [N, D]
        b_s = multiply_rows(b_q, b_k, flags)  # [M, N]
    b_s, _ = to_logits(b_s, rows, k_begin, place, problem, flags, N, HIDES, False)
    # P = softmax(S) so far
    b_p, b_acc, b_max, b_sum = update(b_s, b_acc, b_max, b_sum, unified, problem, flags, FIXED)
    if flags.dropout:
        b_p *= dropout_factor(rows, k_begin, problem, N, False)
    # O += P V
    p_some = keys_of(value, p_v, k_begin, m_k, place, problem, flags, N)
    b_v = load_tile(p_some, m_k, dims.value_dim, dims.value_block, HIDES)  # [N, Dv]
    b_acc = multiply_columns(b_acc, b_p, b_v, i_pass, CAREFUL, flags)
    return b_acc, b_max, b_sum


@triton.jit
def resume(rows, carry, i_pass, flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr):
    """The state to start from: nothing, or what an earlier call has left."""
    b_acc = zeros(M, dims.value_block)
    b_max = tl.full([M], -INF, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    if flags.carried and not flags.split:
        b_max = tl.load(carry.max + rows.o_number, mask=rows.m_r, other=-INF)
        b_sum = tl.load(carry.sum + rows.o_number, mask=rows.m_r, other=0.0)
        # A pass that counts starts from nothing.
        p_acc, m_acc = tile_at(carry.acc + rows.o_number * dims.value_dim, rows.m_r, dims.value_dim, dims.value_block)
        b_acc = tl.load(p_acc, mask=m_acc & (i_pass <= FINITE), other=0.0)
    return b_acc, b_max, b_sum


@triton.jit
def sweep(
    b_q, rows, queries, tiles, place, key, value, carry, i_pass, unified, problem,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAREFUL: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """All key tiles that the rows see: the sums, the max and the sum of the weights."""
    o_n = tl.arange(0, N)
    if flags.sequences:
        o_n += place.k_begin
    keys = (rows_of(key, place.i_b, place.i_kv, o_n), rows_of(value, place.i_b, place.i_kv, o_n))  # of tile 0
    b_acc, b_max, b_sum = resume(rows, carry, i_pass, flags, dims, M)
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
                    b_acc, b_max, b_sum = visit(
                        j, (b_acc, b_max, b_sum), b_q, rows, place, keys, key, value, i_pass, unified, problem,
                        flags, dims, N, False, False, FIXED,
                    )  # fmt: skip
            for _ in tl.range(0, cut_count, num_stages=1 if CAREFUL else None):
                j = i_chunk * WALK + lowest_bit(cut)
                cut &= cut - 1
                b_acc, b_max, b_sum = visit(
                    j, (b_acc, b_max, b_sum), b_q, rows, place, keys, key, value, i_pass, unified, problem,
                    flags, dims, N, True, CAREFUL, FIXED,
                )  # fmt: skip
    else:
        begin = tiles.full_last - tiles.full_first
        if EVERY_TILE_HIDES:
            begin *= 0
        else:
            for j in range(tiles.full_first, tiles.full_last):
                b_acc, b_max, b_sum = visit(
                    j, (b_acc, b_max, b_sum), b_q, rows, place, keys, key, value, i_pass, unified, problem,
                    flags, dims, N, False, False, FIXED,
                )  # fmt: skip
        for i in tl.range(begin, tile_count(tiles, flags), num_stages=1 if CAREFUL else None):
            j = visited_tile(i, tiles, flags)
            b_acc, b_max, b_sum = visit(
                j, (b_acc, b_max, b_sum), b_q, rows, place, keys, key, value, i_pass, unified, problem,
                flags, dims, N, True, CAREFUL, FIXED,
            )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit
def finish(
    m_r, b_acc, b_max, b_sum, rows, i_split, out, lse, carry, partial, numbered, sinks, i_pass, problem,
    flags: tl.constexpr, dims: tl.constexpr,
):  # fmt: skip
    """Writes the rows m_r: their results, or their states."""
    if flags.suspends and not flags.split:
        if i_pass <= FINITE:
            tl.store(carry.max + rows.o_number, b_max, mask=m_r)
            tl.store(carry.sum + rows.o_number, b_sum, mask=m_r)
        p_acc = carry.acc + rows.o_number * dims.value_dim
        store_sums(p_acc, m_r, b_acc, 1.0, i_pass, dims.value_dim, dims.value_block, False)
    else:
        b_unit = unit(problem, flags)
        b_max = tl.where(b_max == -INF, -INF, b_max * b_unit)
        b_rescale = b_sum * 0.0 + 1.0
        if flags.sinks:  # a sink is one more key, with value 0; the first split has it
            b_sink = tl.load(sinks + rows.o_h)
            if flags.split:
                b_sink = tl.where(i_split == 0, b_sink, -INF)
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
        o_number = rows.o_number
        p_lse, p_out = lse + o_number, rows_of(out, rows.o_b, rows.o_h, rows.o_row)
        if flags.split:
            o_number += i_split.to(tl.int64) * numbered
            p_lse, p_out = partial.lse + o_number, partial.out + o_number * dims.value_dim
        if i_pass <= FINITE:
            tl.store(p_lse, tl.where(m_empty, -INF, b_lse), mask=m_r)
        store_sums(p_out, m_r, b_acc, b_factor[:, None], i_pass, dims.value_dim, dims.value_block, False)


@triton.jit
def fitting(b_acc, b_max, b_q, unified, problem, flags: tl.constexpr):
    """Rows whose weights kept their precision relative to `unified`: float16's is the narrowest range."""
    HALF: tl.constexpr = b_q.dtype == tl.float16
    b_above = (b_max - unified) * unit(problem, flags)
    m_near = (b_above <= (10.0 if HALF else 20.0)) & (b_above >= (-7.0 if HALF else -20.0))
    return ((b_max == -INF) | m_near) & (nonfinite_rows(b_acc) == 0)


@triton.jit
def any_row(m_r):
    # In two dimensions, as in tile.py's has_nonfinite: b_acc's maxima are what m_r comes from.
    b_r = tl.broadcast_to(m_r.to(tl.int32)[:, None], [m_r.shape[0], 2])
    return tl.max(b_r) > 0


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles", "split_tiles", "numbered"])
def forward_kernel(
    query, key, value, out, lse, carry, partial, numbered, sinks, unified, row_tiles, split_tiles,
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
    queries, tiles = tiles_of_rows(r_first, place, problem, flags, M, N)
    i_split = tl.program_id(1)
    if flags.split:
        tiles = within(tiles, i_split * split_tiles, i_split * split_tiles + split_tiles)
    p_q = rows_of(query, rows.o_b, rows.o_h, rows.o_row)
    b_q = own_tile(p_q, rows.m_r, dims.head, dims.head_block, dims.piece)  # [M, D]

    m_r = rows.m_r
    if flags.unified:
        # Hong et al., "FlashDecoding++", section 3: no sum is rescaled; rows that it does not fit come again.
        b_unified = unified / unit(problem, flags)
        b_acc, b_max, b_sum = sweep(
            b_q, rows, queries, tiles, place, key, value, carry, PLAIN, b_unified, problem, flags, dims, M, N,
            False, True,
        )  # fmt: skip
        m_fits = fitting(b_acc, b_max, b_q, b_unified, problem, flags)
        b_max = tl.where(b_max == -INF, -INF, b_unified)
        finish(
            m_r & m_fits, b_acc, b_max, b_sum, rows, i_split, out, lse, carry, partial, numbered, sinks, PLAIN,
            problem, flags, dims,
        )  # fmt: skip
        m_r = m_r & (m_fits == 0)
        tiles = within(tiles, 0, tl.where(any_row(m_r), tiles.last, 0))
    b_acc, b_max, b_sum = sweep(
        b_q, rows, queries, tiles, place, key, value, carry, PLAIN, 0.0, problem, flags, dims, M, N, False, False
    )
    again = has_nonfinite(b_acc)
    m_now = m_r
    if flags.carried:  # a state to go on from is left alone until the last sweep that reads it
        m_now = tl.where(again, False, m_r)
    finish(
        m_now, b_acc, b_max, b_sum, rows, i_split, out, lse, carry, partial, numbered, sinks, PLAIN, problem,
        flags, dims,
    )  # fmt: skip
    # Weights are not negative here.
    for i_pass in range(FINITE, tl.where(again, NEGATIVE_UP, FINITE)):
        b_acc, b_max, b_sum = sweep(
            b_q, rows, queries, tiles, place, key, value, carry, i_pass, 0.0, problem, flags, dims, M, N, True, False
        )
        finish(
            m_r, b_acc, b_max, b_sum, rows, i_split, out, lse, carry, partial, numbered, sinks, i_pass, problem,
            flags, dims,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "row_tiles", "splits", "numbered"])
def combine_kernel(
    out, lse, carry, partial, numbered, row_tiles, splits,
    kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
    key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    flags: tl.constexpr, dims: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Split-KV's second step: out = sum_i w_i out_i, lse = log sum_i exp(lse_i), with w_i = exp(lse_i - lse) (Dao et
    al., "Flash-Decoding for long-context inference"). The state that an earlier call has left is one more part."""
    problem = Problem(
        kv_heads, group, q_len, k_len, low, high, shift, scale, softcap, bias, slopes, slopes_batch, kept, threshold,
        key0, key1, first_keys, tables, batch, groups, q_rows, k_rows, bitmaps, page, page_width, pages,
    )  # fmt: skip
    place, r_first = place_of_rows(tl.program_id(0), row_tiles, problem, flags, M)
    rows = describe(r_first + tl.arange(0, M), place, problem, flags)
    m_r, o_number = rows.m_r, rows.o_number
    p_acc, m_acc = tile_at(partial.out + o_number * dims.value_dim, m_r, dims.value_dim, dims.value_block)
    b_carried = tl.full([M], -INF, tl.float32)
    if flags.carried:
        b_carried = tl.load(carry.max + o_number, mask=m_r, other=-INF)
    b_highest = b_carried
    p_lse = partial.lse + o_number
    for _ in range(0, splits):
        b_highest = tl.maximum(b_highest, tl.load(p_lse, mask=m_r, other=-INF))
        p_lse += numbered
    b_shift = tl.where(b_highest == -INF, 0.0, b_highest)
    b_sum = tl.zeros([M], tl.float32)
    b_acc = zeros(M, dims.value_block)
    if flags.carried:
        b_rescale = tl.exp2((b_carried - b_shift) * LOG2_E)
        b_sum = b_rescale * tl.load(carry.sum + o_number, mask=m_r, other=0.0)
        p_state, _ = tile_at(carry.acc + o_number * dims.value_dim, m_r, dims.value_dim, dims.value_block)
        b_acc = b_rescale[:, None] * tl.load(p_state, mask=m_acc, other=0.0)
        b_acc = tl.where(b_rescale[:, None] == 0.0, 0.0, b_acc)
    p_lse = partial.lse + o_number
    for _ in range(0, splits):
        b_weight = tl.exp2((tl.load(p_lse, mask=m_r, other=-INF) - b_shift) * LOG2_E)
        b_sum += b_weight
        # A part that saw nothing has no say, whatever it holds.
        m_part = m_acc & (b_weight != 0.0)[:, None]
        b_acc += b_weight[:, None] * tl.load(p_acc, mask=m_part, other=0.0)
        p_lse += numbered
        p_acc += numbered.to(tl.int64) * dims.value_dim
    if flags.suspends:
        tl.store(carry.max + o_number, b_highest, mask=m_r)
        tl.store(carry.sum + o_number, b_sum, mask=m_r)
        store_sums(
            carry.acc + o_number * dims.value_dim, m_r, b_acc, 1.0, PLAIN, dims.value_dim, dims.value_block, False
        )
    else:
        m_empty = b_sum == 0.0
        b_sum = tl.where(m_empty, 1.0, b_sum)
        b_lse = (b_highest.to(tl.float64) + tl.log(b_sum.to(tl.float64))).to(tl.float32)
        tl.store(lse + o_number, tl.where(m_empty, -INF, b_lse), mask=m_r)
        b_factor = tl.where(m_empty, 0.0, 1.0 / b_sum)[:, None]
        p_out = rows_of(out, rows.o_b, rows.o_h, rows.o_row)
        store_sums(p_out, m_r, b_acc, b_factor, PLAIN, dims.value_dim, dims.value_block, False)
