"""Attention through a small fast memory, with every load and store counted: the formulas, shown to be true.

``FastMemory`` holds at most M elements and does all arithmetic on what it holds. Three schedules compute exact
attention through it, for one head, (N, d) float64 tensors:

- ``flash``: keys and values in the outer loop (FlashAttention's order), blocks that fit.
- ``flash2``: query rows in the outer loop (FlashAttention-2's).
- ``small``: two tiled matrix products with square tiles of about sqrt(M), S written in between. For M < d^2, where not
  even one row block of FlashAttention's pays, it moves least, and no standard product moves less but for a constant
  (Saha and Ye, "The I/O Complexity of Attention", section on small caches).

``*_count`` are their closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .tiles import ceil_div


class OutOfMemory(ValueError):
    """A schedule holds more than its fast memory has room for."""


class Counts(NamedTuple):
    """Elements that a schedule moves.

    Attributes:
        loads: from slow memory.
        stores: to slow memory.
    """

    loads: int
    stores: int

    @property
    def total(self) -> int:
        """Loads and stores."""
        return self.loads + self.stores


class Tile:
    """A matrix in fast memory. Nothing but its FastMemory touches what it holds."""

    __slots__ = ("_data",)

    def __init__(self, data: torch.Tensor) -> None:
        self._data: torch.Tensor | None = data


class FastMemory:
    """At most ``capacity`` elements; counts what it loads and stores.

    Arithmetic is in place on tiles that it holds, so nothing is held that is not counted but the scalars of a step.

    Attributes:
        capacity: elements.
        loads, stores: elements moved so far.
        held, peak: elements held now, and at most so far.

    Raises:
        OutOfMemory: by ``new`` and ``load``, where there is no room.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1, got {capacity}")
        self.capacity = capacity
        self.loads = self.stores = self.held = self.peak = 0

    @property
    def counts(self) -> Counts:
        """Loads and stores so far."""
        return Counts(self.loads, self.stores)

    def new(self, rows: int, columns: int, value: float = 0.0) -> Tile:
        """A tile that moves nothing."""
        return self._hold(torch.full((rows, columns), value, dtype=torch.float64))

    def load(self, slow: torch.Tensor) -> Tile:
        """A tile of slow memory, (rows, columns)."""
        tile = self._hold(slow.to(torch.float64).clone())
        self.loads += slow.numel()
        return tile

    def store(self, tile: Tile, slow: torch.Tensor) -> None:
        """Writes a tile to slow memory."""
        slow.copy_(self._of(tile))
        self.stores += slow.numel()

    def free(self, *tiles: Tile) -> None:
        """Makes room; the tiles may not be used again."""
        for tile in tiles:
            self.held -= self._of(tile).numel()
            tile._data = None

    def multiply_add(self, out: Tile, a: Tile, b: Tile, transposed: bool = False) -> None:
        """out += a b, or a b^T."""
        right = self._of(b)
        self._of(out).addmm_(self._of(a), right.T if transposed else right)

    def apply(self, function: Callable[..., torch.Tensor], out: Tile, *operands: Tile) -> None:
        """out = function(operands), elementwise or by rows, written over what out held."""
        self._of(out).copy_(function(*(self._of(tile) for tile in operands)))

    def _hold(self, data: torch.Tensor) -> Tile:
        if self.held + data.numel() > self.capacity:
            raise OutOfMemory(f"{self.held} of {self.capacity} elements are held: no room for {data.numel()} more")
        self.held += data.numel()
        self.peak = max(self.peak, self.held)
        return Tile(data)

    @staticmethod
    def _of(tile: Tile) -> torch.Tensor:
        if tile._data is None:
            raise ValueError("tile must be in fast memory, got one that was freed")
        return tile._data


@dataclass(frozen=True, slots=True)
class Run:
    """A schedule's result.

    Attributes:
        out: (N, d), float64.
        counts: elements moved.
        peak: elements held at most.
    """

    out: torch.Tensor
    counts: Counts
    peak: int


def flash_blocks(head_dim: int, fast_elements: int) -> tuple[int, int] | None:
    """Blocks (query rows, keys) of ``flash`` that fit; None if none do.

    As many keys as there is room for with ``min(keys, d)`` rows (FlashAttention's proportions): K, V and S, Q and O,
    and four numbers a row.
    """

    def fits(keys: int) -> bool:
        rows = min(keys, head_dim)
        return 2 * (keys + rows) * head_dim + rows * keys + 4 * rows <= fast_elements

    return _largest(fits, lambda keys: (min(keys, head_dim), keys))


def flash2_blocks(head_dim: int, fast_elements: int) -> tuple[int, int] | None:
    """Blocks (query rows, keys) of ``flash2`` that fit; None if none do.

    One key at a time leaves most room for rows.
    """
    room = fast_elements - 2 * head_dim
    rows = room // (2 * head_dim + 5)
    return (rows, 1) if rows >= 1 else None


def small_block(fast_elements: int) -> int | None:
    """The side of the tiles of ``small``: b^2 + 4 b <= M; None if not even 1 fits."""
    side = math.isqrt(fast_elements + 4) - 2
    return side if side >= 1 else None


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fast_elements: int) -> Run:
    """FlashAttention's loop order: for each block of K and V, for each block of Q and O (algorithm 1).

    Args:
        query, key, value: (N, d) each, scaled beforehand: the logits are ``query @ key.T``.
        fast_elements: M.

    Raises:
        OutOfMemory: M is too small for blocks of one row and one key.
    """
    length, dim = _check(query, key, value)
    blocks = flash_blocks(dim, fast_elements)
    if blocks is None:
        raise OutOfMemory(f"fast_elements must be >= {4 * dim + 5} for head dim {dim}, got {fast_elements}")
    rows, keys = blocks
    memory = FastMemory(fast_elements)
    out, largest, total = (torch.empty(length, n, dtype=torch.float64) for n in (dim, 1, 1))
    for k in range(0, length, keys):
        key_tile, value_tile = memory.load(key[k : k + keys]), memory.load(value[k : k + keys])
        for q in range(0, length, rows):
            here = slice(q, q + rows)
            query_tile = memory.load(query[here])
            count = min(rows, length - q)
            if k == 0:
                acc, top, sums = memory.new(count, dim), memory.new(count, 1, -math.inf), memory.new(count, 1)
            else:
                acc, top, sums = memory.load(out[here]), memory.load(largest[here]), memory.load(total[here])
            scores = memory.new(count, min(keys, length - k))
            memory.multiply_add(scores, query_tile, key_tile, transposed=True)
            _online_softmax(memory, scores, value_tile, acc, top, sums)
            if k + keys >= length:
                memory.apply(lambda a, s: a / s, acc, acc, sums)
            for tile, slow in ((acc, out), (top, largest), (sums, total)):
                memory.store(tile, slow[here])
            memory.free(query_tile, acc, top, sums, scores)
        memory.free(key_tile, value_tile)
    return Run(out, memory.counts, memory.peak)


def flash_count(length: int, head_dim: int, fast_elements: int) -> Counts | None:
    """What ``flash`` moves; None if it does not fit.

    K and V once; with T = ceil(N / keys) blocks of them Q is loaded T times, O, l and m T - 1 times and stored T times.
    """
    blocks = flash_blocks(head_dim, fast_elements)
    if blocks is None:
        return None
    passes, state = ceil_div(length, blocks[1]), length * (head_dim + 2)
    loads = 2 * length * head_dim + passes * length * head_dim + (passes - 1) * state
    return Counts(loads, passes * state)


def flash2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fast_elements: int) -> Run:
    """FlashAttention-2's loop order: for each block of Q and O, for each key and value.

    Args and errors as ``flash``.
    """
    length, dim = _check(query, key, value)
    blocks = flash2_blocks(dim, fast_elements)
    if blocks is None:
        raise OutOfMemory(f"fast_elements must be >= {4 * dim + 5} for head dim {dim}, got {fast_elements}")
    rows, keys = blocks
    memory, out = FastMemory(fast_elements), torch.empty(length, dim, dtype=torch.float64)
    for q in range(0, length, rows):
        count = min(rows, length - q)
        query_tile = memory.load(query[q : q + rows])
        acc, top, sums = memory.new(count, dim), memory.new(count, 1, -math.inf), memory.new(count, 1)
        for k in range(0, length, keys):
            key_tile, value_tile = memory.load(key[k : k + keys]), memory.load(value[k : k + keys])
            scores = memory.new(count, min(keys, length - k))
            memory.multiply_add(scores, query_tile, key_tile, transposed=True)
            _online_softmax(memory, scores, value_tile, acc, top, sums)
            memory.free(key_tile, value_tile, scores)
        memory.apply(lambda a, s: a / s, acc, acc, sums)
        memory.store(acc, out[q : q + rows])
        memory.free(query_tile, acc, top, sums)
    return Run(out, memory.counts, memory.peak)


def flash2_count(length: int, head_dim: int, fast_elements: int) -> Counts | None:
    """What ``flash2`` moves; None if it does not fit. Q and O once, K and V once per block of query rows."""
    blocks = flash2_blocks(head_dim, fast_elements)
    if blocks is None:
        return None
    passes = ceil_div(length, blocks[0])
    return Counts((1 + 2 * passes) * length * head_dim, length * head_dim)


def small(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fast_elements: int) -> Run:
    """Attention for M < d^2: S = Q K^T and O = P V tile by tile, tiles of b x b with b about sqrt(M), S written.

    A tile of S stays while columns of Q and K pass by; its rows' max and sum are kept up from left to right. A tile of
    O stays while columns of S and rows of V pass by; P is made of S on its way.

    Args and errors as ``flash``; M >= 5.
    """
    length, dim = _check(query, key, value)
    side = small_block(fast_elements)
    if side is None:
        raise OutOfMemory(f"fast_elements must be >= 5, got {fast_elements}")
    memory = FastMemory(fast_elements)
    scores = torch.empty(length, length, dtype=torch.float64)
    out, largest, total = (torch.empty(length, n, dtype=torch.float64) for n in (dim, 1, 1))
    for q in range(0, length, side):
        rows = slice(q, min(q + side, length))
        count = rows.stop - q
        top, sums = memory.new(count, 1, -math.inf), memory.new(count, 1)
        for k in range(0, length, side):
            keys = slice(k, min(k + side, length))
            tile = memory.new(count, keys.stop - k)
            for d in range(dim):
                left, right = memory.load(query[rows, d : d + 1]), memory.load(key[keys, d : d + 1])
                memory.multiply_add(tile, left, right, transposed=True)
                memory.free(left, right)
            memory.store(tile, scores[rows, keys])
            new = memory.new(count, 1)
            memory.apply(lambda t, s: torch.maximum(t, s.amax(1, keepdim=True)), new, top, tile)
            memory.apply(lambda t, n, a: a * torch.exp(t - n), sums, top, new, sums)
            memory.apply(lambda s, n: torch.exp(s - n), tile, tile, new)
            memory.apply(lambda a, s: a + s.sum(1, keepdim=True), sums, sums, tile)
            memory.free(top, tile)
            top = new
        memory.store(top, largest[rows])
        memory.store(sums, total[rows])
        memory.free(top, sums)
    for q in range(0, length, side):
        rows = slice(q, min(q + side, length))
        top, sums = memory.load(largest[rows]), memory.load(total[rows])
        for d in range(0, dim, side):
            columns = slice(d, min(d + side, dim))
            acc = memory.new(rows.stop - q, columns.stop - d)
            for k in range(length):
                weights, values = memory.load(scores[rows, k : k + 1]), memory.load(value[k : k + 1, columns])
                memory.apply(lambda s, t, a: torch.exp(s - t) / a, weights, weights, top, sums)
                memory.multiply_add(acc, weights, values)
                memory.free(weights, values)
            memory.store(acc, out[rows, columns])
            memory.free(acc)
        memory.free(top, sums)
    return Run(out, memory.counts, memory.peak)


def small_count(length: int, head_dim: int, fast_elements: int) -> Counts | None:
    """What ``small`` moves; None if it does not fit.

    First product: each of the ceil(N / b)^2 tiles loads its rows of Q and K, S is stored. Second: S is loaded for each
    of the ceil(d / b) columns of tiles, V for each of the ceil(N / b) rows of them. About 4 N^2 d / sqrt(M) + N^2.
    """
    side = small_block(fast_elements)
    if side is None:
        return None
    rows, columns = ceil_div(length, side), ceil_div(head_dim, side)
    loads = 2 * rows * length * head_dim + 2 * length + columns * length**2 + rows * length * head_dim
    return Counts(loads, length**2 + 2 * length + length * head_dim)


def crossover(length: int, head_dim: int, schedule: str = "flash") -> int:
    """The fast memory, in elements, from which on a schedule moves no more than ``small``: about d^2.

    Args:
        schedule: "flash" (4 to 5 d^2, its blocks being what the paper chose) or "flash2" (0.7 to 1 d^2).

    Raises:
        ValueError: another schedule.
    """
    counts = {"flash": flash_count, "flash2": flash2_count}
    if schedule not in counts:
        raise ValueError(f"schedule must be flash or flash2, got {schedule!r}")
    low, high = 4 * head_dim + 5, 4 * head_dim + 6

    def better(fast: int) -> bool:
        ours, theirs = counts[schedule](length, head_dim, fast), small_count(length, head_dim, fast)
        return ours is not None and theirs is not None and ours.total <= theirs.total

    while not better(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if better(middle) else (middle, high)
    return high


def _online_softmax(memory: FastMemory, scores: Tile, value: Tile, acc: Tile, top: Tile, sums: Tile) -> None:
    """Scores become weights relative to the running max; sums so far are rescaled to it. Takes two numbers a row."""
    rows = memory._of(top).shape[0]
    new, rescale = memory.new(rows, 1), memory.new(rows, 1)
    memory.apply(lambda t, s: torch.maximum(t, s.amax(1, keepdim=True)), new, top, scores)
    memory.apply(lambda t, n: torch.exp(t - n), rescale, top, new)
    memory.apply(lambda s, n: torch.exp(s - n), scores, scores, new)
    memory.apply(lambda a, r, s: a * r + s.sum(1, keepdim=True), sums, sums, rescale, scores)
    memory.apply(lambda a, r: a * r, acc, acc, rescale)
    memory.apply(lambda n: n, top, new)
    memory.multiply_add(acc, scores, value)
    memory.free(new, rescale)


def _largest(fits: Callable[[int], bool], made: Callable[[int], tuple[int, int]]) -> tuple[int, int] | None:
    """made(n) for the largest n that fits; fits never becomes true again."""
    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return made(low)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2 or tensor.shape != query.shape or 0 in tensor.shape:
            raise ValueError(f"{name} must have query's shape (N, d), not empty, got {tuple(tensor.shape)}")
    return query.shape[0], query.shape[1]
