"""Tiles: addresses of rows, loads and stores, and the two products that attention is made of. tile.cuh's twin.

Head dims are padded to powers of two: loads give zeros there, stores skip them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# tile.cuh's Pass: 0 * NaN is NaN, so a hidden NaN would leak through its weight of 0. Sums that are not finite at the
# end of a sweep are made again, in passes: first with NaN and inf taken out of the stream, then, for each way in which
# they give inf or -inf, as a count of the weights other than 0 that meet them: positive weights and inf, positive and
# -inf, negative and inf, negative and -inf. NaN is both inf and -inf.
PLAIN = tl.constexpr(0)
FINITE = tl.constexpr(1)
POSITIVE_UP = tl.constexpr(2)
POSITIVE_DOWN = tl.constexpr(3)
NEGATIVE_UP = tl.constexpr(4)
NEGATIVE_DOWN = tl.constexpr(5)


class View(NamedTuple):
    """A (batch, heads, length, dim) tensor; strides in elements, that of dim is 1."""

    data: Any
    batch: Any
    head: Any
    row: Any


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def rows_of(view, i_b, o_h, o_q):
    """Addresses of rows: batch entry, heads, positions."""
    return view.data + (i_b.to(tl.int64) * view.batch + o_h.to(tl.int64) * view.head + o_q.to(tl.int64) * view.row)


@triton.jit
def keys_of(view, p_rows, k_begin, m_k, place, problem, flags: tl.constexpr, N: tl.constexpr):
    """Addresses of the keys [k_begin, k_begin + N), p_rows being those of tile 0; m_k: which there are."""
    if flags.pages:
        o_k = place.k_begin + k_begin + tl.arange(0, N)
        i_page = tl.minimum(o_k // problem.page, problem.page_width - 1)
        p_page = problem.tables.pages + (place.i_b.to(tl.int64) * problem.page_width + i_page)
        o_page = tl.minimum(tl.maximum(tl.load(p_page, mask=m_k, other=0), 0), problem.pages - 1)
        p_some = rows_of(view, o_page, place.i_kv, o_k % problem.page)
    else:
        p_some = p_rows + k_begin.to(tl.int64) * view.row
    return p_some


@triton.jit
def tile_at(p_rows, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses and mask of the tile of these rows."""
    o_d = tl.arange(0, BLOCK)
    return p_rows[:, None] + o_d[None, :], m_rows[:, None] & (o_d < DIM)[None, :]  # [rows, BLOCK]


@triton.jit
def load_tile(p_rows, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """[rows, BLOCK], zeros past DIM. RAGGED: some rows may not exist, as m_rows says; they are zeros."""
    p_tile, m_tile = tile_at(p_rows, m_rows, DIM, BLOCK)
    if RAGGED:
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif DIM != BLOCK:
        b_tile = tl.load(p_tile, mask=(tl.arange(0, BLOCK) < DIM)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def own_tile(p_rows, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """What a program keeps of the rows that it owns: their tile, or, where multiply_pieces reads them, addresses."""
    if PIECE:
        b_own = p_rows
    else:
        b_own = load_tile(p_rows, m_rows, DIM, BLOCK, True)
    return b_own


@triton.jit
def dot(b_a, b_b, b_sums, flags: tl.constexpr):
    """sums + a . b"""
    if INTERPRETED:  # the interpreter takes bfloat16 for integers here; float32 holds the same numbers
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sums, input_precision=flags.precision)


@triton.jit
def multiply_rows(b_own, b_stream, flags: tl.constexpr):
    """own . stream, summed over the head dim: S = Q K^T, dP = dO V^T."""
    b_sums = tl.zeros([b_own.shape[0], b_stream.shape[0]], tl.float32)
    return dot(b_own, tl.trans(b_stream), b_sums, flags)


@triton.jit
def _load_piece(p_rows, m_rows, d, DIM: tl.constexpr, PIECE: tl.constexpr):
    """load_tile's columns [d, d + PIECE)."""
    o_d = d + tl.arange(0, PIECE)
    return tl.load(p_rows[:, None] + o_d[None, :], mask=m_rows[:, None] & (o_d < DIM)[None, :], other=0.0)


@triton.jit
def multiply_pieces(p_own, m_own, p_stream, m_stream, DIM: tl.constexpr, PIECE: tl.constexpr, flags: tl.constexpr):
    """multiply_rows of tiles whose operands, as parts of float32, are more than registers hold: PIECE columns at a
    time."""
    b_sums = tl.zeros([p_own.shape[0], p_stream.shape[0]], tl.float32)
    for d in range(0, DIM, PIECE):
        b_own = _load_piece(p_own, m_own, d, DIM, PIECE)  # [M, PIECE]
        b_stream = _load_piece(p_stream, m_stream, d, DIM, PIECE)  # [N, PIECE]
        b_sums = dot(b_own, tl.trans(b_stream), b_sums, flags)
    return b_sums


@triton.jit
def multiply_columns(b_sums, b_weights, b_stream, i_pass, CAREFUL: tl.constexpr, flags: tl.constexpr):
    """sums + weights . stream, summed over the stream's rows: O += P V, dQ += dS K."""
    b_weights = b_weights.to(b_stream.dtype)
    if CAREFUL:
        b_w, b_x = b_weights.to(tl.float32), b_stream.to(tl.float32)
        b_sign = tl.where(i_pass >= NEGATIVE_UP, -1.0, 1.0)
        b_other = tl.where((i_pass == POSITIVE_UP) | (i_pass == NEGATIVE_UP), -INF, INF)  # another pass's
        m_finite = tl.abs(b_x) < INF
        m_counts = (m_finite == 0) & (b_x != b_other)
        b_w = tl.where(i_pass == FINITE, b_w, tl.where(b_w * b_sign > 0, 1.0, 0.0))
        b_x = tl.where(i_pass == FINITE, tl.where(m_finite, b_x, 0.0), tl.where(m_counts, 1.0, 0.0))
        b_weights, b_stream = b_w.to(b_stream.dtype), b_x.to(b_stream.dtype)
    return dot(b_weights, b_stream, b_sums, flags)


@triton.jit
def nonfinite_rows(b_sums):
    return tl.max(tl.where(tl.abs(b_sums) < INF, 0, 1), 1) > 0


@triton.jit
def has_nonfinite(b_sums):
    # All at once: for sm_100, Triton 3.6 dies of the maximum of a maximum.
    return tl.max(tl.where(tl.abs(b_sums) < INF, 0, 1)) > 0


@triton.jit
def store_sums(p_rows, m_rows, b_sums, b_factor, i_pass, DIM: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    """Writes sums times factor, or, ADDS, adds them to what is there; in a pass that counts, adds inf or -inf to what
    the count names."""
    p_tile, m_tile = tile_at(p_rows, m_rows, DIM, BLOCK)
    if i_pass <= FINITE:
        b_sums = b_sums * b_factor
        if ADDS:
            b_sums += tl.load(p_tile, mask=m_tile, other=0.0)
        tl.store(p_tile, b_sums.to(p_tile.dtype.element_ty), mask=m_tile)
    else:
        b_more = tl.where((i_pass == POSITIVE_UP) | (i_pass == NEGATIVE_DOWN), INF, -INF) * b_factor
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_tile = tl.where(b_sums > 0, b_tile + b_more, b_tile)
        tl.store(p_tile, b_tile.to(p_tile.dtype.element_ty), mask=m_tile)
    tl.debug_barrier()  # the next pass reads what this one wrote
