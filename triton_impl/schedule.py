"""Which tiles a program visits: the twin of csrc/core/mask.h and schedule.h.

Row q sees the keys [lo(q), hi(q)), both clamped to [0, k_len]. Tiles are visited in two loops: those that are wholly
visible, then those that the mask cuts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def lo(q, problem):
    return clamp(q + problem.low, 0, problem.k_len)


@triton.jit
def hi(q, problem):
    return clamp(q + problem.high, 0, problem.k_len)


@triton.jit
def row_schedule(q_first, q_last, problem, N: tl.constexpr):
    """The key tiles [first, last) that the rows [q_first, q_last] see, those that they see wholly among them."""
    begin, end = lo(q_first, problem), hi(q_last, problem)
    first = begin // N
    last = tl.where(begin < end, tl.cdiv(end, N), first)
    full_first = clamp(tl.cdiv(lo(q_last, problem), N), first, last)
    full_last = clamp(hi(q_first, problem) // N, full_first, last)
    return first, last, full_first, full_last


@triton.jit
def column_schedule(k_begin, problem, M: tl.constexpr, N: tl.constexpr):
    """The tiles [first, last) of packed rows that see any of the keys [k_begin, k_begin + N), those that see them all
    among them; a tile with rows past the last is not."""
    k_end = k_begin + N
    begin = clamp(k_begin - problem.high + 1, 0, problem.q_len)
    end = clamp(tl.minimum(k_end, problem.k_len) - problem.low, 0, problem.q_len)
    full_begin = clamp(k_end - problem.high, 0, problem.q_len)
    full_end = tl.where(k_end <= problem.k_len, clamp(k_begin - problem.low + 1, 0, problem.q_len), 0)
    first = begin * problem.group // M
    last = tl.where(begin < end, tl.cdiv(end * problem.group, M), first)
    full_first = clamp(tl.cdiv(full_begin * problem.group, M), first, last)
    full_last = clamp(full_end * problem.group // M, full_first, last)
    return first, last, full_first, full_last


@triton.jit
def visited_tile(i, first, full_first, full_last):
    """The i-th tile in the order of visits: the full ones, then the others."""
    full = full_last - full_first
    j = first + i - full
    return tl.where(i < full, full_first + i, tl.where(j < full_first, j, j + full))
