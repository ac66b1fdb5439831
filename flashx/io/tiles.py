"""Tile sizes and schedules of the CUDA kernels, as numbers.

The same as csrc/cuda/sm80/config.h, csrc/core/schedule.h and csrc/cuda/place.cuh.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..masks import IntervalMask
from ..problem import Problem
from .calls import Sequence, Tables, mask_of

HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # classes that head dims are rounded up to
SPLIT_KEYS, MEMBER_SPLIT_KEYS, SPLIT_ROWS = 1024, 4096, 64
LANES = 32
WORD = 4  # bytes of an entry of a table, of an lse, of a partial result's element


class Tiles(NamedTuple):
    """A kernel's tiles: ``rows`` that a block owns, ``stream`` rows of a tile that passes by."""

    rows: int
    stream: int
    warps: int


def head_dim_class(problem: Problem) -> int:
    """The head dim that the kernel is compiled for."""
    dim = max(problem.head_dim, problem.value_dim)
    for size in HEAD_DIMS:
        if dim <= size:
            return size
    raise ValueError(f"head_dim and value_dim must be at most {HEAD_DIMS[-1]} for the CUDA kernels, got {dim}")


def is_plain(problem: Problem) -> bool:
    """Whether the plain kernels run it: a dense batch and nothing but an interval mask (logits.cuh)."""
    return (
        problem.bias is None and problem.softcap == 0 and not problem.alibi and problem.dropout_p == 0
        and problem.scale > 0 and problem.mask.first == 0 and problem.block is None and not problem.ragged
        and problem.groups is None and problem.page is None and problem.unified_max is None
    )  # fmt: skip


def forward_tiles(element_bytes: int, dim: int, general: bool) -> Tiles:
    """Of the forward; dim is a head dim class."""
    if element_bytes == 4:
        return Tiles(64, 16 if dim == 256 or (dim == 128 and not general) else 32, 4)
    if general or dim >= 192:
        return Tiles(64, 32 if general and dim == 256 else 64, 4)
    return Tiles(128, 64, 4)


def backward_tiles(element_bytes: int, dim: int, general: bool) -> Tiles:
    """Of the backward's sweeps; dim is a head dim class."""
    if element_bytes == 4:
        if dim <= 64:
            return Tiles(64, 16 if general else 32, 4)
        return Tiles(64, 16, 4) if dim <= 128 else Tiles(32, 32 if dim <= 192 else 16, 2)
    if dim <= 64:
        return Tiles(64, 32 if general else 64, 4)
    if dim <= 128:
        return Tiles(64, 16 if general else 32, 4)
    return Tiles(64, 64 if dim <= 192 else 32, 4)


def one_sweep(element_bytes: int, dim: int) -> bool:
    """Whether dK and dV are summed by one sweep."""
    return dim <= (96 if element_bytes == 4 else 128)


def splits(problem: Problem) -> int:
    """Parts that a call's keys are cut into (machine.cu)."""
    if problem.q_len * group(problem) > SPLIT_ROWS or problem.q_len == 0:
        return 1
    keys = problem.k_len if problem.ragged else problem.mask.hi(problem.q_len - 1, problem.k_len)
    return max(ceil_div(keys, split_keys(problem)), 1)


def split_keys(problem: Problem) -> int:
    """Keys of a split."""
    return SPLIT_KEYS if problem.groups is None else MEMBER_SPLIT_KEYS


def group(problem: Problem) -> int:
    """Query heads of a key head."""
    return problem.q_heads // problem.kv_heads if problem.kv_heads else 1


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class Row(NamedTuple):
    """A packed row: its query, its head in its group, and the first key that its interval ends before."""

    query: int
    head: int
    high: int


class Span(NamedTuple):
    """Keys that rows see together: each row's limits lie between these."""

    lo_min: int
    lo_max: int
    hi_min: int
    hi_max: int
    first: int

    def seen(self, begin: int, end: int) -> bool:
        """Whether some row sees one of the keys [begin, end)."""
        return begin < self.hi_max and (end > self.lo_min or begin < self.first)

    def whole(self, begin: int, end: int) -> bool:
        """Whether every row sees all of them."""
        return self.lo_max <= begin and end <= self.hi_min

    def tiles(self, tile: int) -> tuple[range, range]:
        """Indices of the tiles that are seen: those of the first keys, and those of the window behind them."""
        leading = ceil_div(min(self.first, self.hi_max), tile)
        window = self.lo_min // tile
        last = max(leading, ceil_div(self.hi_max, tile) if self.lo_min < self.hi_max else 0)
        return range(min(leading, last)), range(max(leading, window), last)


@dataclass(frozen=True, slots=True)
class Strip:
    """Packed rows that read the same keys: a batch entry's, or a group's, of one key head.

    Packed row r is query ``r // step``; ``count`` strips are alike. ``batch``, ``kv_head``: which one, for block maps.
    """

    rows: int
    step: int
    q_len: int
    k_len: int
    early: IntervalMask
    late: IntervalMask
    members: int
    count: int
    batch: int = 0
    kv_head: int = 0

    def span(self, first: int, last: int) -> Span:
        """What the packed rows [first, last] see."""
        a, b, keys = first // self.step, last // self.step, self.k_len
        early, late = self.early, self.late
        return Span(early.lo(a, keys), late.lo(b, keys), early.hi(a, keys), late.hi(b, keys), min(early.first, keys))

    def rows_of(self, begin: int, end: int) -> range:
        """Packed rows among which are all that see the keys [begin, end)."""
        late, early = self.late, self.early
        low = 0 if late.right is None else _clamp(begin - late.shift - late.right, self.q_len)
        if early.left is None or begin < early.first:
            high = self.q_len
        else:
            high = _clamp(end - early.shift + early.left, self.q_len)
        return range(low * self.step, high * self.step)

    def row_tiles(self, tile: int) -> Iterator[tuple[int, int]]:
        """First and last packed row of each tile."""
        for first in range(0, self.rows, tile):
            yield first, min(first + tile, self.rows) - 1

    def packed(self, first: int, tile: int) -> list[Row]:
        """The rows of a tile. Those past the last are taken for the last, but see nothing."""
        heads = self.step // self.members
        return [
            Row(last // self.step, last % heads, self.early.hi(last // self.step, self.k_len) if r == last else 0)
            for r in range(first, first + tile)
            for last in (min(r, self.rows - 1),)
        ]


def strips(problem: Problem, tables: Tables) -> list[Strip]:
    """All strips of a call; those that are alike, and have the same block map, as one."""
    step, block_map = group(problem), tables.block_map
    batches, heads = (1, 1) if block_map is None else block_map.shape[:2]
    kv_heads = [(0, problem.kv_heads)] if heads == 1 else [(h, 1) for h in range(problem.kv_heads)]
    if tables.sequences is None:
        one = [Sequence(problem.q_len, problem.k_len, problem.mask.shift)]
        entries = [(0, problem.batch)] if batches == 1 else [(b, 1) for b in range(problem.batch)]
        return [_strip(problem, one, step, n * m, b, h) for b, n in entries for h, m in kv_heads]
    groups = tables.groups if tables.groups is not None else tuple((b,) for b in range(problem.batch))
    members = [[tables.sequences[m] for m in its] for its in groups]
    return [_strip(problem, its, step * len(its), m, b, h) for b, its in enumerate(members) if its for h, m in kv_heads]


def _strip(
    problem: Problem, sequences: list[Sequence], step: int, count: int, batch: int = 0, kv_head: int = 0
) -> Strip:
    # The first member says how long they are.
    lies, masks = sequences[0], [mask_of(problem.mask, it) for it in sequences]
    shifts, firsts = [mask.shift for mask in masks], [mask.first for mask in masks]
    left, right = problem.mask.left, problem.mask.right
    return Strip(
        rows=lies.q_len * step, step=step, q_len=lies.q_len, k_len=lies.k_len,
        early=IntervalMask(left, right, min(shifts), max(firsts)),
        late=IntervalMask(left, right, max(shifts), min(firsts)),
        members=len(sequences), count=count, batch=batch, kv_head=kv_head,
    )  # fmt: skip


class Map:
    """A block map as one strip's kernels walk it: which tiles are seen, and how many entries are looked at.

    Entries of the heads of a group are looked at one after the other, until one is seen and one is not full.
    """

    def __init__(self, problem: Problem, block_map: torch.Tensor, strip: Strip) -> None:
        assert problem.block is not None
        heads = group(problem)
        mine = block_map[strip.batch if block_map.shape[0] > 1 else 0]
        if block_map.shape[1] > 1:
            mine = mine[strip.kv_head * heads : (strip.kv_head + 1) * heads]
        self.entries: list[list[list[int]]] = mine.tolist()  # of each map, row and column of blocks
        self.q_block, self.k_block = problem.block
        self.q_blocks, self.k_blocks = mine.shape[1:]
        self.k_len = strip.k_len

    def look(self, span: Span, queries: tuple[int, int], begin: int, end: int) -> tuple[bool, bool, int]:
        """Whether the keys [begin, end) are seen by some row, wholly by all; entries read to find out."""
        if not span.seen(begin, end):
            return False, False, 0
        seen, whole, read = False, span.whole(begin, end), 0
        lines = range(queries[0] // self.q_block, min(queries[1] // self.q_block + 1, self.q_blocks))
        columns = range(begin // self.k_block, min((min(end, self.k_len) - 1) // self.k_block + 1, self.k_blocks))
        for entries, line, column in itertools.product(self.entries, lines, columns):
            entry = entries[line][column]
            read += 1
            seen |= entry != 0
            whole &= entry == 1
            if seen and not whole:
                break
        return seen, seen and whole, read

    def pieces(self, rows: list[Row], step: int, begin: int, end: int) -> tuple[int, int]:
        """Entries of the map, and 16-bit pieces of bitmaps, that a warp reads to hide elements of its rows.

        The rows of a query are one line if they share a map, and read its pieces once. The first piece of a block in
        the tile reads its entry. ``step``: rows of a query.
        """
        of_line = step if len(self.entries) == 1 else 1
        missing = rows[0].head % of_line
        entries = pieces = 0
        for line, first in enumerate((0, *range(of_line - missing, len(rows), of_line))):
            query, head, high = rows[first]
            opens = line < step // of_line or query % self.q_block == 0
            of_row = self.entries[head % len(self.entries)][query // self.q_block]
            for key in range(begin, min(end, self.k_blocks * self.k_block), 16):
                entries += opens and (key == begin or key % self.k_block == 0)
                pieces += key < high and of_row[key // self.k_block] >= 2
        return entries, pieces


def _clamp(value: int, most: int) -> int:
    return min(max(value, 0), most)
