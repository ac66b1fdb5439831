"""Where a program works: a key head of one sequence, or of sequences that share keys. csrc/cuda/place.cuh's twin.

Packed row r is query r // heads // members of member r // heads % members and of head r % heads, the heads of a group
(GQA) that share their keys: rows keep the order of their positions, which is what schedules need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .problem import (
    FAR,
    SEQUENCE_FIELDS,
    clamp,
    group_of,
    member_of,
    shifted,
)

_MEMBERS_AT_ONCE = tl.constexpr(64)


class Limits(NamedTuple):
    """Row q sees the keys [q + low, q + high), and the first ones before its last."""

    low: Any
    high: Any
    first: Any


class Place(NamedTuple):
    """early and late: the limits of the member that sees the earliest keys, and of the one that sees the latest."""

    i_b: Any  # batch entry of the keys: a sequence, or a group of members
    i_kv: Any
    q_begin: Any
    q_len: Any
    k_begin: Any
    k_len: Any
    member: Any  # the first one's place among all members
    members: Any
    early: Any
    late: Any
    shift: Any


class Rows(NamedTuple):
    """Query rows, [M] each; what they all share is a scalar."""

    m_r: Any  # which there are
    o_b: Any  # sequences
    o_h: Any
    o_q: Any  # in their sequences; -FAR for a row that there is not
    o_row: Any  # in the tensor
    o_number: Any  # in lse and delta
    limits: Any
    o_diagonal: Any  # the key at distance 0


@triton.jit
def _first_keys(offset, problem, flags: tl.constexpr):
    """Sink tokens of keys that `offset` others come before."""
    first = problem.first_keys
    if flags.sequences:
        first = tl.maximum(first - tl.maximum(offset, 0), 0)
    return first


@triton.jit
def _limits(shift, offset, problem, flags: tl.constexpr):
    low, high = shifted(problem.low, shift, problem), shifted(problem.high, shift, problem)
    return Limits(low, high, _first_keys(offset, problem, flags))


@triton.jit
def _of_group(i_group, i_kv, problem, flags: tl.constexpr):
    """The place of a group of members, or, without members, of a sequence of the table."""
    member, members = i_group, i_group * 0 + 1
    i_b = i_group
    if flags.members:
        member, members = group_of(problem, i_group)
        i_b = member_of(problem, member, members > 0)
    p_its = problem.tables.sequences + i_b * SEQUENCE_FIELDS
    q_begin, k_begin = clamp(tl.load(p_its), 0, problem.q_rows), clamp(tl.load(p_its + 2), 0, problem.k_rows)
    q_len = clamp(tl.load(p_its + 1), 0, tl.minimum(problem.q_len, problem.q_rows - q_begin))
    k_len = clamp(tl.load(p_its + 3), 0, tl.minimum(problem.k_len, problem.k_rows - k_begin))
    shift, offset = tl.load(p_its + 4), tl.load(p_its + 5)
    early = _limits(shift, offset, problem, flags)
    late = early
    if flags.members:
        q_len, k_len = tl.where(members > 0, q_len, 0), tl.where(members > 0, k_len, 0)
        shift_last, offset_last = shift, offset
        for i in range(0, members, _MEMBERS_AT_ONCE):
            o_m = i + tl.arange(0, _MEMBERS_AT_ONCE)
            # The first member stands in for those past the last.
            o_b = member_of(problem, member + tl.where(o_m < members, o_m, 0), o_m >= 0)
            p_some = problem.tables.sequences + o_b * SEQUENCE_FIELDS
            b_shift, b_offset = tl.load(p_some + 4), tl.load(p_some + 5)
            shift, shift_last = tl.minimum(shift, tl.min(b_shift, 0)), tl.maximum(shift_last, tl.max(b_shift, 0))
            offset, offset_last = tl.minimum(offset, tl.min(b_offset, 0)), tl.maximum(offset_last, tl.max(b_offset, 0))
        # Sink tokens: most of them where fewest keys come before.
        early = _limits(shift, offset, problem, flags)
        late = _limits(shift_last, offset_last, problem, flags)
    return Place(i_group, i_kv, q_begin, q_len, k_begin, k_len, member, members, early, late, shift)


@triton.jit
def place_of(i_b, i_kv, problem, flags: tl.constexpr):
    """The place of a key head of a batch entry of the keys."""
    if flags.sequences:
        place = _of_group(i_b, i_kv, problem, flags)
    else:
        limits = Limits(problem.low, problem.high, problem.first_keys)
        place = Place(i_b, i_kv, 0, problem.q_len, 0, problem.k_len, i_b, problem.group, limits, limits, problem.shift)
    return place


@triton.jit
def _first_tile(problem, i_group, M: tl.constexpr):
    """Where a group's row tiles begin: its place among the members gives it, so that a tile's group is found by
    bisection; at most one tile a group is empty."""
    begin = clamp(tl.load(problem.tables.member_begin + i_group), 0, problem.batch)
    return begin * problem.q_len * problem.group // M + i_group


@triton.jit
def place_of_rows(i_program, tiles, problem, flags: tl.constexpr, M: tl.constexpr):
    """Of a program that owns rows: its place and its first row. Last row tiles first: under a causal mask they are the
    longest."""
    i_place = i_program // tiles
    i_tile = tiles - 1 - i_program % tiles
    if flags.members:
        # The last group whose first tile is not behind this one.
        i_group, end = i_place * 0, problem.groups
        while end - i_group > 1:
            middle = i_group + (end - i_group) // 2
            if _first_tile(problem, middle, M) <= i_tile:
                i_group = middle
            else:
                end = middle
        place = place_of(i_group, i_place, problem, flags)
        i_tile -= _first_tile(problem, i_group, M)
        i_tile = tl.where(i_tile < 0, tiles, i_tile)  # before the first group: no rows
    else:
        place = place_of(i_place // problem.kv_heads, i_place % problem.kv_heads, problem, flags)
    return place, i_tile * M


@triton.jit
def row_count(place, problem, flags: tl.constexpr):
    """Packed rows of the place."""
    rows = place.q_len * problem.group
    if flags.members:
        rows *= place.members
    return rows


@triton.jit
def query_of(r, place, problem, flags: tl.constexpr):
    """The query of a packed row."""
    q = r // problem.group
    if flags.members:
        q = q // tl.maximum(place.members, 1)
    return q


@triton.jit
def describe(o_r, place, problem, flags: tl.constexpr):
    """The packed rows o_r.

    A row past the last is taken for the last: what it reads exists, what it gives nobody keeps. But its query lies so
    far before all keys that it sees none: it is loaded as zeros, and zeros times an infinite key are NaN.
    """
    count = row_count(place, problem, flags)
    m_r = o_r < count
    o_r = tl.minimum(o_r, count - 1)
    if flags.sequences:
        o_r = tl.maximum(o_r, 0)
    o_q = query_of(o_r, place, problem, flags)
    o_h = place.i_kv * problem.group + o_r % problem.group
    o_b, limits, shift, o_row, length = place.i_b, place.early, place.shift, o_q, problem.q_len
    if flags.sequences:
        o_row, length = place.q_begin + o_q, problem.q_rows
    if flags.members:
        o_m = o_r // problem.group % tl.maximum(place.members, 1)
        o_b = member_of(problem, place.member + o_m, m_r)
        p_its = problem.tables.sequences + o_b * SEQUENCE_FIELDS
        q_begin = clamp(tl.load(p_its, mask=m_r, other=0), 0, problem.q_rows)
        q_len = tl.load(p_its + 1, mask=m_r, other=0)
        m_r &= o_q < tl.minimum(q_len, problem.q_rows - q_begin)
        o_row = q_begin + o_q
        shift = tl.load(p_its + 4, mask=m_r, other=0)
        limits = _limits(shift, tl.load(p_its + 5, mask=m_r, other=0), problem, flags)
    o_diagonal = o_q
    if flags.alibi:
        o_diagonal = o_q + clamp(shift, -FAR, FAR)
    i_entry = o_b
    if flags.packed:
        i_entry = o_b * 0
    o_number = (i_entry.to(tl.int64) * problem.kv_heads * problem.group + o_h) * length + o_row
    return Rows(m_r, o_b, o_h, tl.where(m_r, o_q, -FAR), o_row, o_number, limits, o_diagonal)
