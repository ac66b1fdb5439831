"""Which tiles a program visits: the twin of csrc/core/mask.h and schedule.h, and of place.cuh's Walk.

Row q sees the keys [lo(q), hi(q)), both clamped to [0, k_len], and of the first keys those before hi(q). Tiles are
visited in two loops: those that are wholly visible, then those that a mask cuts. Under a block mask that is so for each
WALK tiles: their entries of the map are looked at together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .place import query_of, row_count
from .problem import clamp

WALK = tl.constexpr(32)
_ENTRIES_AT_ONCE = tl.constexpr(8)


class Tiles(NamedTuple):
    """The tiles [lead_first, lead_last) and [first, last), of the latter the full ones [full_first, full_last).

    The former are those of the first keys that lie before the window's.
    """

    lead_first: Any
    lead_last: Any
    first: Any
    last: Any
    full_first: Any
    full_last: Any


@triton.jit
def lo(q, limits, k_len, flags: tl.constexpr):
    low = clamp(q + limits.low, 0, k_len)
    if flags.first_keys:
        low = tl.where(low <= limits.first, 0, low)  # the first keys and the window are one interval
    return low


@triton.jit
def hi(q, limits, k_len):
    return clamp(q + limits.high, 0, k_len)


@triton.jit
def row_schedule(q_first, q_last, place, flags: tl.constexpr, N: tl.constexpr):
    """The key tiles that the rows of the queries [q_first, q_last] see, and those that they see wholly."""
    k_len = place.k_len
    begin, end = lo(q_first, place.early, k_len, flags), hi(q_last, place.late, k_len)
    if flags.sequences:
        end = tl.where(q_first <= q_last, end, 0)  # beyond a short sequence's last row
    first = begin // N
    last = tl.where(begin < end, tl.cdiv(end, N), first)
    full_first = tl.cdiv(lo(q_last, place.late, k_len, flags), N)
    lead = first * 0
    if flags.first_keys:
        lead = tl.cdiv(tl.minimum(place.early.first, end), N)
        first = tl.maximum(first, lead)
        last = tl.maximum(first, last)
    full_first = clamp(full_first, first, last)
    full_last = clamp(hi(q_first, place.early, k_len) // N, full_first, last)
    return Tiles(lead * 0, lead, first, last, full_first, full_last)


@triton.jit
def tiles_of_rows(r_first, place, problem, flags: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The first and last query of the packed rows [r_first, r_first + M), and row_schedule of these."""
    q_first = query_of(r_first, place, problem, flags)
    q_last = query_of(tl.minimum(r_first + M, row_count(place, problem, flags)) - 1, place, problem, flags)
    return (q_first, q_last), row_schedule(q_first, q_last, place, flags, N)


@triton.jit
def column_schedule(k_begin, place, problem, flags: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The tiles of packed rows that see any of the keys [k_begin, k_begin + N), and those that see them all.

    A tile with rows past the last is not one of them.
    """
    k_end = k_begin + N
    q_len, k_len, step = place.q_len, place.k_len, problem.group
    if flags.members:
        step *= place.members
    early, late = place.early, place.late
    begin = clamp(k_begin - late.high + 1, 0, q_len)
    end = clamp(tl.minimum(k_end, k_len) - early.low, 0, q_len)
    full_begin = clamp(k_end - early.high, 0, q_len)
    full_to = k_begin
    if flags.first_keys:
        end = tl.where(k_begin < early.first, q_len, end)
        full_to = tl.maximum(k_begin, late.first)
    full_end = tl.where(k_end <= k_len, clamp(full_to - late.low + 1, 0, q_len), 0)
    if flags.sequences:
        end = tl.where(k_begin < k_len, end, 0)
    first = begin * step // M
    last = tl.where(begin < end, tl.cdiv(end * step, M), first)
    full_first = clamp(tl.cdiv(full_begin * step, M), first, last)
    full_last = clamp(full_end * step // M, full_first, last)
    return Tiles(first * 0, first * 0, first, last, full_first, full_last)


@triton.jit
def within(tiles, begin, end):
    """Of the tiles those in [begin, end)."""
    lead_first = clamp(tiles.lead_first, begin, end)
    first = clamp(tiles.first, begin, end)
    last = clamp(tiles.last, first, end)
    full_first = clamp(tiles.full_first, first, last)
    return Tiles(
        lead_first, clamp(tiles.lead_last, lead_first, end), first, last,
        full_first, clamp(tiles.full_last, full_first, last),
    )  # fmt: skip


@triton.jit
def tile_count(tiles, flags: tl.constexpr):
    count = tiles.last - tiles.first
    if flags.first_keys:
        count += tiles.lead_last - tiles.lead_first
    return count


@triton.jit
def visited_tile(i, tiles, flags: tl.constexpr):
    """The i-th tile in the order of visits: the full ones, then the others."""
    full = tiles.full_last - tiles.full_first
    i_other, first = i - full, tiles.first
    if flags.first_keys:
        lead = tiles.lead_last - tiles.lead_first
        first = tl.where(i_other < lead, tiles.lead_first, first - lead)
    j = first + i_other
    return tl.where(i < full, tiles.full_first + i, tl.where(j < tiles.full_first, j, j + full))


@triton.jit
def known(b_entry, problem):
    """Entries of a block map; one without a bitmap hides."""
    return tl.where((b_entry < 0) | (b_entry - 2 >= problem.bitmaps), 0, b_entry)


@triton.jit
def block_map_at(o_b, o_h, problem, flags: tl.constexpr):
    """Address of the map of a batch entry and head, and how many blocks of queries and of keys it has."""
    q_blocks, k_blocks = tl.cdiv(problem.q_len, flags.block_q), tl.cdiv(problem.k_len, flags.block_k)
    i_map = o_h * 0
    if flags.block_batch:
        i_map = o_b + i_map
    if flags.block_heads:
        i_map = i_map * (problem.kv_heads * problem.group) + o_h
    return problem.tables.block_map + i_map.to(tl.int64) * q_blocks * k_blocks, q_blocks, k_blocks


@triton.jit
def _sights(o_j, q_first, q_last, k_first, k_last, place, problem, flags: tl.constexpr):
    """Of WALK tiles which the block map shows to some row, and which wholly to all of them.

    [q_first, q_last], [k_first, k_last]: their queries and keys.
    """
    q_block, q_blocks_each = q_first // flags.block_q, q_last // flags.block_q - q_first // flags.block_q + 1
    k_block, k_blocks_each = k_first // flags.block_k, k_last // flags.block_k - k_first // flags.block_k + 1
    across_q, across_k = tl.max(q_blocks_each, 0), tl.max(k_blocks_each, 0)
    count = across_q * across_k
    if flags.block_heads:
        count *= problem.group
    b_seen = tl.zeros([_ENTRIES_AT_ONCE, WALK], tl.int32)
    b_whole = tl.full([_ENTRIES_AT_ONCE, WALK], 1, tl.int32)
    for i in range(0, count, _ENTRIES_AT_ONCE):
        o_i = tl.minimum(i + tl.arange(0, _ENTRIES_AT_ONCE), count - 1)
        o_h = place.i_kv * problem.group + o_i // (across_q * across_k)
        p_map, q_blocks, k_blocks = block_map_at(place.i_b, o_h, problem, flags)
        o_q = tl.minimum((o_i // across_k % across_q)[:, None], q_blocks_each[None, :] - 1) + q_block[None, :]
        o_k = tl.minimum((o_i % across_k)[:, None], k_blocks_each[None, :] - 1) + k_block[None, :]
        m_in = (o_q >= 0) & (o_q < q_blocks) & (o_k >= 0) & (o_k < k_blocks)
        b_entry = tl.load(p_map[:, None] + (o_q.to(tl.int64) * k_blocks + o_k), mask=m_in, other=0)
        b_entry = known(b_entry, problem)
        b_seen = tl.where(b_entry != 0, 1, b_seen)
        b_whole = tl.where(b_entry == 1, b_whole, 0)
    return tl.max(b_seen, 0) > 0, tl.min(b_whole, 0) > 0


@triton.jit
def _chunk(o_j, m_seen, m_whole, tiles, FULL: tl.constexpr):
    """As bits, of the tiles o_j those to visit that are whole, and those that are not; and how many of each.

    FULL: whole ones are visited as such.
    """
    m_seen &= ((o_j >= tiles.first) & (o_j < tiles.last)) | ((o_j >= tiles.lead_first) & (o_j < tiles.lead_last))
    m_whole &= m_seen & (o_j >= tiles.full_first) & (o_j < tiles.full_last) & FULL
    o_bit = tl.full([WALK], 1, tl.int64) << (o_j % WALK).to(tl.int64)
    m_cut = m_seen & (m_whole == 0)
    whole, cut = tl.sum(tl.where(m_whole, o_bit, 0), 0), tl.sum(tl.where(m_cut, o_bit, 0), 0)
    return whole, tl.sum(m_whole.to(tl.int32), 0), cut, tl.sum(m_cut.to(tl.int32), 0)


@triton.jit
def row_chunk(
    i_chunk, tiles, q_first, q_last, place, problem, flags: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr
):
    """Which of the key tiles [WALK * i_chunk, + WALK) the rows of the queries [q_first, q_last] visit: see _chunk."""
    o_j = i_chunk * WALK + tl.arange(0, WALK)
    k_first = o_j * N
    k_last = tl.minimum(k_first + N, place.k_len) - 1
    k_last = tl.maximum(k_first, k_last)  # past the last tile
    m_seen, m_whole = _sights(o_j, o_j * 0 + q_first, o_j * 0 + q_last, k_first, k_last, place, problem, flags)
    return _chunk(o_j, m_seen, m_whole, tiles, FULL)


@triton.jit
def column_chunk(
    i_chunk, tiles, k_begin, place, problem,
    flags: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Which of the row tiles [WALK * i_chunk, + WALK) visit the keys [k_begin, k_begin + N): see _chunk."""
    o_j = i_chunk * WALK + tl.arange(0, WALK)
    count = row_count(place, problem, flags)
    r_first = tl.minimum(o_j * M, count - 1)
    q_first = query_of(r_first, place, problem, flags)
    q_last = query_of(tl.minimum(r_first + M, count) - 1, place, problem, flags)
    k_last = tl.minimum(k_begin + N, place.k_len) - 1
    m_seen, m_whole = _sights(o_j, q_first, q_last, o_j * 0 + k_begin, o_j * 0 + k_last, place, problem, flags)
    return _chunk(o_j, m_seen, m_whole, tiles, FULL)


@triton.jit
def lowest_bit(bits):
    """Index of the lowest bit that is set, of an int64: the exponent of that power of two."""
    return (((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
