"""What a kernel is told of its problem: the twin of csrc/core/problem.h, in the form that Triton's arguments have."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Arguments of every kernel whose values it is not compiled for: another length would be another kernel.
UNSPECIALIZED = [
    "kv_heads", "group", "q_len", "k_len", "low", "high", "shift", "slopes_batch", "threshold", "key0", "key1",
    "first_keys", "batch", "groups", "q_rows", "k_rows", "bitmaps", "page", "page_width", "pages",
]  # fmt: skip
# Distances past this are no longer told apart; positions stay within 32 bits.
FAR = tl.constexpr(2**30)
SEQUENCE_FIELDS = tl.constexpr(6)


class Flags(NamedTuple):
    """What a problem has, known when a kernel is compiled."""

    bias: str  # "none", "add" or "bool"
    alibi: bool
    softcap: bool
    sinks: bool
    dropout: bool
    general: bool  # logits are more than the scores times a positive factor
    precision: str  # of float32 products
    first_keys: bool = False  # sink tokens
    blocks: bool = False  # a block mask
    block_q: int = 0  # its blocks' sizes
    block_k: int = 0
    block_batch: bool = False  # whether it is another one for each batch entry, for each head
    block_heads: bool = False
    sequences: bool = False
    packed: bool = False
    members: bool = False
    pages: bool = False
    carried: bool = False  # a state is loaded
    suspends: bool = False  # and left
    split: bool = False
    unified: bool = False
    adds: bool = False  # the query's gradient is added to


class Bias(NamedTuple):
    """The bias; strides in elements, 0 where it broadcasts."""

    data: Any
    batch: Any
    head: Any
    query: Any
    key: Any


class Tables(NamedTuple):
    """int32 tables of the variants, None where there is none. What they hold is not trusted."""

    sequences: Any  # (batch, SEQUENCE_FIELDS)
    members: Any  # (batch)
    member_begin: Any  # (groups + 1)
    pages: Any  # (batch, page_width)
    block_map: Any  # (batch or 1, heads or 1, blocks of queries, blocks of keys)
    block_bits: Any  # (bitmaps, block_q, words)


class Problem(NamedTuple):
    """What a problem has at run time. Row q sees the keys [q + low, q + high), and the first keys before its last.

    Of ragged sequences q_len and k_len are the longest, and low and high leave out the shift.
    """

    kv_heads: Any
    group: Any  # query heads that read one key head
    q_len: Any
    k_len: Any
    low: Any
    high: Any
    shift: Any
    scale: Any
    softcap: Any
    bias: Any
    slopes: Any  # ALiBi's
    slopes_batch: Any  # their batch stride
    kept: Any  # dropout's factor of what it keeps: words from threshold on
    threshold: Any
    key0: Any
    key1: Any
    first_keys: Any
    tables: Any
    batch: Any
    groups: Any  # of members
    q_rows: Any  # lengths of the tensors; of a paged cache, of all its pages
    k_rows: Any
    bitmaps: Any
    page: Any  # rows of a page
    page_width: Any
    pages: Any


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def member_of(problem, i, m):
    """The sequence that is member i, where m says that there is one."""
    return clamp(tl.load(problem.tables.members + i, mask=m, other=0), 0, problem.batch - 1)


@triton.jit
def group_of(problem, i_group):
    """Where a group's members begin, and how many they are."""
    p_begin = problem.tables.member_begin + i_group
    begin = clamp(tl.load(p_begin), 0, problem.batch)
    return begin, clamp(tl.load(p_begin + 1), begin, problem.batch) - begin


@triton.jit
def shifted(limit, shift, problem):
    """low or high of a sequence whose row 0 has its diagonal at key `shift`; clamped where no row can tell."""
    limit = limit.to(tl.int64) + shift.to(tl.int64)
    return clamp(limit, -problem.q_len.to(tl.int64), problem.k_len.to(tl.int64)).to(tl.int32)
