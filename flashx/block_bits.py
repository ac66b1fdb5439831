"""The parts of a BlockMask: the grid of its blocks, the words of their elements, and how they are made, tile by tile.

A block is bq rows of ceil(bk / 32) int32 words, an element a bit. On a GPU, where nobody can look at values without
waiting, the words of every block are kept as long as there is room, not those of the partial ones alone (``Bits``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_int, check_tensor
from .problem import shape

# Entries of the map; PARTIAL + n is bits[n].
HIDDEN, FULL, PARTIAL = 0, 1, 2

# The product of eight bytes of 0 or 1 with this has the first byte's bit in bit 56, ..., the last one's in bit 63.
_GATHER_BITS = sum(1 << (56 - 7 * byte) for byte in range(8))

# Elements evaluated at a time: on the CPU what the caches hold, on a GPU what hides the launches.
_CPU_TILE = 2**20
_GPU_TILE = 2**24

# Up to here a GPU gets room for the bits of every block, so that nobody waits to learn how many are partial.
_UNTRIMMED_BYTES = 2**28

WIDEST = 2**62

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Visible or not, from a query's and a key's indices, both (n, q, k) or broadcastable to it.
Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the blocks of a mask lie. Blocks are numbered row by row, head after head."""

    q_len: int
    k_len: int
    bq: int
    bk: int

    @property
    def block(self) -> tuple[int, int]:
        return self.bq, self.bk

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.q_len // self.bq), -(-self.k_len // self.bk)

    @property
    def words(self) -> int:
        return -(-self.bk // 32)

    def per_tile(self, device: torch.device) -> int:
        """Blocks to work on at a time."""
        return max(1, (_CPU_TILE if _on_host(device) else _GPU_TILE) // (self.bq * self.bk))

    def no_bits(self, count: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
        """Room for the bits of count blocks."""
        return torch.empty(count, self.bq, self.words, dtype=torch.int32, device=device)

    def queries(self, rows: slice) -> slice:
        return slice(rows.start * self.bq, min(rows.stop * self.bq, self.q_len))

    def keys(self, columns: slice) -> slice:
        return slice(columns.start * self.bk, min(columns.stop * self.bk, self.k_len))

    def coordinates(self, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block row and column of the blocks with these numbers."""
        rows, columns = self.blocks
        return number // max(columns, 1) % max(rows, 1), number % max(columns, 1)

    def positions(self, i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (n, bq, 1) and keys (n, 1, bk) of blocks (i, j); beyond the edge the last one again."""
        q = (i[:, None] * self.bq + torch.arange(self.bq, device=i.device)).clamp(max=self.q_len - 1)
        k = (j[:, None] * self.bk + torch.arange(self.bk, device=j.device)).clamp(max=self.k_len - 1)
        return q[:, :, None], k[:, None, :]

    def extents(self, dim: int, device: torch.device) -> torch.Tensor:
        """How many rows (dim 0) or keys (dim 1) each block row or column has."""
        length, size = ((self.q_len, self.bq), (self.k_len, self.bk))[dim]
        return (length - size * torch.arange(self.blocks[dim], device=device)).clamp(max=size)

    def full_words(self, device: torch.device) -> torch.Tensor:
        """(words,): a row of a full block."""
        return _low_bits(torch.full((), self.bk, device=device), self.words)

    def valid(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """(n, bq, words): the bits of blocks (i, j) that stand for existing elements."""
        row = i[:, None] * self.bq + torch.arange(self.bq, device=i.device) < self.q_len
        return torch.where(
            row[:, :, None], _low_bits((self.k_len - j * self.bk).clamp(max=self.bk), self.words)[:, None], 0
        )


class Bits:
    """The bits of partial blocks, put together tile by tile.

    untrimmed: every block keeps its place, partial or not, so that no size depends on data and nothing waits.
    """

    def __init__(self, grid: Grid, blocks: int, device: torch.device) -> None:
        self._grid = grid
        self._device = device
        self.untrimmed = not _on_host(device) and 4 * blocks * grid.bq * grid.words <= _UNTRIMMED_BYTES
        self._all = grid.no_bits(blocks if self.untrimmed else 0, device)
        self._parts: list[torch.Tensor] = []
        self._count = 0

    def add(self, words: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Keeps what is partial of blocks (i, j), words (n, bq, words); returns their entries (n,), int32."""
        valid = self._grid.valid(i, j)
        visible = words & valid
        some, every = visible.flatten(1).any(1), (visible == valid).flatten(1).all(1)
        partial = some & ~every
        if self.untrimmed:
            self._all[self._count : self._count + len(words)] = words
            number = torch.arange(self._count, self._count + len(words), device=words.device)
            self._count += len(words)
        else:
            number = self._count + partial.cumsum(0) - 1
            kept = words[partial]
            self._parts.append(kept)
            self._count += len(kept)
        return torch.where(partial, PARTIAL + number, some).int()

    def add_blocks(self, chosen: torch.Tensor, words: Callable[..., torch.Tensor]) -> torch.Tensor:
        """add() for the blocks with these numbers, a tile at a time; their words from words(chosen, i, j)."""
        entries = []
        for part in chunks(chosen, self._grid):
            i, j = self._grid.coordinates(part)
            entries.append(self.add(words(part, i, j), i, j))
        return torch.cat(entries) if entries else chosen.int()

    def stored(self) -> torch.Tensor:
        """All that was kept, (n, bq, words)."""
        return self._all if self.untrimmed else torch.cat([self._grid.no_bits(0, self._device), *self._parts])


class CheckedMod:
    """A mask_mod of flex_attention, called on index tensors.

    Its meaning is torch's: what it returns for scalars, under vmap. Calling it once on tensors that broadcast is
    faster, and right if it works element by element. A trial on a few indices tells on the CPU, where the values can be
    looked at, whether that is so; and everywhere whether batch and head matter to it.
    """

    def __init__(self, mask_mod: Any, sizes: tuple[int, int, int, int], device: torch.device) -> None:
        if not callable(mask_mod):
            raise TypeError(f"mask_mod must be callable, got {type(mask_mod).__name__}")
        self._mod: MaskMod = mask_mod
        self._broadcasts = False
        self.uses_batch = self.uses_heads = True
        if 0 in sizes:
            return
        # Sizes that differ, so that a dimension which a mask_mod reduces or moves shows in the result's shape.
        trial = (2, 3, 5, 7)
        b, h, q, k = (
            torch.arange(count, device=device) * (size - 1) // (count - 1)
            for count, size in zip(trial, sizes, strict=True)
        )
        exact = _by_scalars(lambda ib, ih, iq, ik: mask_mod(b[ib], h[ih], q[iq], k[ik]), trial, device)
        if exact.dtype != torch.bool:
            raise TypeError(f"mask_mod must return a bool tensor, got {exact.dtype}")
        self.uses_batch, self.uses_heads = exact.stride(0) != 0, exact.stride(1) != 0
        if _on_host(device):
            try:
                index = (
                    axis.view([-1 if dim == at else 1 for dim in range(4)]) for at, axis in enumerate((b, h, q, k))
                )
                result = mask_mod(*index)
                self._broadcasts = (
                    result.dim() == 4
                    and all(have in (want, 1) for have, want in zip(result.shape, trial, strict=True))
                    and torch.equal(result.expand(trial), exact)
                )
            except Exception:  # It wants scalars, and has shown above that it works on them.
                pass

    def __call__(self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """b and h (n, 1, 1), q (n|1, Q, 1), k (n|1, 1, K): bool, broadcastable to (n, Q, K)."""
        if self._broadcasts:
            return self._mod(b, h, q, k)
        n = len(b)
        b, h, q, k = b.flatten(), h.flatten(), q.squeeze(2).expand(n, -1), k.squeeze(1).expand(n, -1)
        return _by_scalars(
            lambda at, _, row, column: self._mod(b[at], h[at], q[at, row], k[at, column]),
            (n, 1, q.shape[1], k.shape[1]),
            b.device,
        )[:, 0]


def _by_scalars(mask_mod: MaskMod, sizes: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """mask_mod of all indices below sizes, each a scalar to it; stride 0 where it does not look at one."""
    # Not torch.vmap alone, under which tables cannot be indexed with scalars.
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask_mod, *sizes, device=str(device))


def map_by_distance(grid: Grid, visible: Formula, cuts: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Map and bits, on the CPU, of a formula of q - k alone within the ranges of block columns that cuts bound.

    One block is evaluated for each distance from the diagonal, and each range; ragged edges are ranges too, as what
    makes a block full is another thing there. This is O(blocks), and without any wait for a GPU.
    """
    rows, columns = grid.blocks
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    step = math.gcd(grid.bq, grid.bk)
    up, left = grid.bq // step, grid.bk // step
    distances = up * rows + left * columns + 1
    row_range = (i >= grid.q_len // grid.bq).long()
    column_range = sum((j >= cut).long() for cut in (grid.k_len // grid.bk, *cuts))
    ranges = 2 + len(cuts)
    key = (up * i - left * j + left * columns) + distances * (column_range + ranges * row_range)
    key = key.flatten()
    chosen = torch.full((2 * ranges * distances,), -1).index_put_((key,), torch.arange(len(key)))
    number = (chosen >= 0).cumsum(0) - 1
    chosen = chosen[chosen >= 0]
    bits = Bits(grid, len(chosen), torch.device("cpu"))

    def words(_: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return pack(visible(*grid.positions(i, j)).expand(len(i), *grid.block), grid.block)

    entries = bits.add_blocks(chosen, words)
    return entries[number[key]].view(1, 1, rows, columns), bits.stored()


def map_of_tiles(
    grid: Grid,
    batch: int,
    heads: int,
    device: torch.device,
    read: Callable[[slice, slice, slice], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map and bits of what read(heads, queries, keys) returns: elements that broadcast to these.

    Heads are counted through all batches.
    """
    block_map = torch.empty(batch * heads, *grid.blocks, dtype=torch.int32, device=device)
    bits = Bits(grid, block_map.numel(), device)
    i, j = (torch.arange(size, device=device) for size in grid.blocks)
    for tile in tiles(grid, batch * heads, device):
        part = block_map[tile]
        q, k = grid.queries(tile[1]), grid.keys(tile[2])
        elements = read(tile[0], q, k).expand(len(part), q.stop - q.start, k.stop - k.start)
        rows, columns = i[tile[1], None].expand(part.shape), j[tile[2]].expand(part.shape)
        part.copy_(bits.add(pack(elements, grid.block), rows.flatten(), columns.flatten()).view(part.shape))
    return block_map.view(batch, heads, *grid.blocks), bits.stored()


def map_of_blocks(
    grid: Grid, entries: torch.Tensor, words: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map and bits of entries: 0 and 1 as they are; the others' words from words(block numbers, rows, columns).

    Where everything is kept anyway words is asked for every block, of any entry.
    """
    flat = entries.flatten()
    bits = Bits(grid, len(flat), flat.device)
    if bits.untrimmed:
        flat = bits.add_blocks(torch.arange(len(flat), device=flat.device), words)
    else:
        chosen = (flat >= PARTIAL).nonzero().flatten()
        flat[chosen] = bits.add_blocks(chosen, words)
    return flat.view(entries.shape), bits.stored()


def tiles(grid: Grid, heads: int, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of heads, block rows and block columns that together are all blocks."""
    rows, columns = grid.blocks
    budget = grid.per_tile(device)
    per_row = min(max(columns, 1), budget)
    row_count = min(max(rows, 1), max(1, budget // per_row))
    head_count = max(1, budget // (per_row * row_count))
    for head in range(0, heads, head_count):
        for row in range(0, rows, row_count):
            for column in range(0, columns, per_row):
                yield (
                    slice(head, min(head + head_count, heads)),
                    slice(row, min(row + row_count, rows)),
                    slice(column, min(column + per_row, columns)),
                )


def chunks(chosen: torch.Tensor, grid: Grid) -> Iterator[torch.Tensor]:
    """chosen in tiles; nothing if it is empty."""
    return iter(chosen.split(grid.per_tile(chosen.device)) if len(chosen) else ())


def _on_host(device: torch.device) -> bool:
    """Values there can be looked at without waiting."""
    return device.type == "cpu"


def pack(elements: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """(n, q, k) bool -> (blocks, bq, words) int32, blocks in order; 0 beyond q and k."""
    bq, bk = block
    n, q, k = elements.shape
    rows, columns = -(-q // bq), -(-k // bk)
    if (q, k) != (rows * bq, columns * bk) or not elements.is_contiguous() or elements.storage_offset() % 8:
        padded = torch.zeros(n, rows * bq, columns * bk, dtype=torch.bool, device=elements.device)
        padded[:, :q, :k] = elements
        elements = padded
    gathered = (elements.view(torch.int64) * _GATHER_BITS).view(torch.uint8)
    packed = gathered.view(n, rows, bq, columns, bk // 8, 8)[..., 7].transpose(2, 3)
    out = torch.zeros if bk % 32 else torch.empty
    words = out(n, rows, columns, bq, -(-bk // 32) * 4, dtype=torch.uint8, device=elements.device)
    words[..., : bk // 8] = packed
    return words.view(torch.int32).view(n * rows * columns, bq, -(-bk // 32))


def unpack(words: torch.Tensor, bk: int) -> torch.Tensor:
    """(n, bq, words) int32 -> (n, bq, bk) bool."""
    packed = words.contiguous().view(torch.uint8)[..., : bk // 8, None]
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((packed & masks) != 0).flatten(2)


def _low_bits(count: torch.Tensor, words: int) -> torch.Tensor:
    """(...) numbers of bits -> (..., words) int32 with the lowest that many bits set."""
    in_word = (count[..., None] - 32 * torch.arange(words, device=count.device)).clamp(0, 32)
    return ((1 << in_word.long()) - 1).int()


def count_bits(words: torch.Tensor) -> torch.Tensor:
    """How many bits of each int32 are set."""
    # The sign that >> brings along never passes the masks.
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


def listed_kinds(grid: Grid, block_mask: Any) -> torch.Tensor:
    """(B, H, rows, columns) int32: HIDDEN, FULL or PARTIAL, as the lists of a flex_attention BlockMask say."""
    partial = _listed(grid, block_mask.kv_num_blocks, block_mask.kv_indices, "kv_num_blocks", "kv_indices")
    batch, heads = partial.shape[:2]
    device = partial.device
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        full = _listed(grid, counts, indices, "full_kv_num_blocks", "full_kv_indices")
        if full.shape != partial.shape or full.device != device:
            raise ValueError(
                f"full_kv_indices must have kv_indices' batch and heads {(batch, heads)} and device {device}, "
                f"got {shape(full)[:2]} on {full.device}"
            )
        if _on_host(device) and bool((full & partial).any()):
            raise ValueError("full_kv_indices must not hold a block of kv_indices, got one in both")
    return torch.where(full, FULL, torch.where(partial, PARTIAL, HIDDEN)).int()


def _listed(grid: Grid, counts: torch.Tensor, indices: Any, counts_name: str, indices_name: str) -> torch.Tensor:
    """(B, H, rows, columns) bool: the blocks that flex_attention's lists name."""
    rows, columns = grid.blocks
    for name, tensor in ((counts_name, counts), (indices_name, indices)):
        check_tensor(name, tensor)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if not 2 <= indices.dim() <= 4 or indices.shape[-2] != rows:
        raise ValueError(f"{indices_name} must have shape ([B,] [H,] {rows}, n), got {shape(indices)}")
    if counts.shape != indices.shape[:-1]:
        raise ValueError(f"{counts_name} must have shape {shape(indices)[:-1]}, got {shape(counts)}")
    if counts.device != indices.device:
        raise ValueError(f"{counts_name} must be on {indices_name}' device {indices.device}, got {counts.device}")
    lead = (None,) * (4 - indices.dim())
    counts, indices = counts[lead].long(), indices[lead].long()
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    inside = (indices >= 0) & (indices < columns)
    if _on_host(indices.device):
        wrong = (counts < 0) | (counts > indices.shape[-1])
        if bool(wrong.any()):
            raise ValueError(f"{counts_name} must be >= 0 and at most {indices.shape[-1]}, got {int(counts[wrong][0])}")
        wrong = listed & ~inside
        if bool(wrong.any()):
            raise ValueError(f"{indices_name} must be >= 0 and < {columns}, got {int(indices[wrong][0])}")
    times = torch.zeros(*indices.shape[:3], columns + 1, dtype=torch.int32, device=indices.device)
    times.scatter_add_(-1, torch.where(listed & inside, indices, columns), torch.ones_like(indices, dtype=torch.int32))
    times = times[..., :columns]
    if _on_host(indices.device) and bool((times > 1).any()):
        twice = int((times > 1).nonzero()[0, 3])
        raise ValueError(f"{indices_name} must name each block of a row once, got {twice} twice")
    return times > 0


def checked_grid(q_len: Any, k_len: Any, block: Any, names: tuple[str, str, str] = ("q_len", "k_len", "block")) -> Grid:
    """Lengths and block size, checked."""
    q_len, k_len = check_length(names[0], q_len), check_length(names[1], k_len)
    if isinstance(block, int):
        block = (block, block)
    if not isinstance(block, Sequence) or isinstance(block, str) or len(block) != 2:
        raise TypeError(f"{names[2]} must be a pair (q, k), got {block!r}")
    if any(isinstance(size, bool) or not isinstance(size, int) for size in block):
        raise TypeError(f"{names[2]} must hold ints, got {block!r}")
    if any(size % 16 or not 16 <= size <= 256 for size in block):
        raise ValueError(f"{names[2]} must be multiples of 16 from 16 to 256, got {tuple(block)}")
    return Grid(q_len, k_len, *block)


def check_length(name: str, value: Any, at_least: int = 0) -> int:
    """An int that leaves room for arithmetic in 64 bits."""
    if check_int(name, value, at_least) > WIDEST:
        raise ValueError(f"{name} must be at most 2**62, got {value}")
    return value


def check_contents(grid: Grid, block_map: torch.Tensor, bits: torch.Tensor) -> None:
    """What a map and bits of the right shapes hold, where that waits for nobody."""
    if _on_host(bits.device):
        low, high = (int(limit) for limit in block_map.aminmax()) if block_map.numel() else (0, 0)
        if low < 0 or high >= PARTIAL + len(bits):
            worst = low if low < 0 else high
            raise ValueError(f"map's entries must be >= 0 and < 2 + {len(bits)} (bits' length), got {worst}")
        if grid.bk % 32 and bool((bits[..., -1] >> 16).any()):
            raise ValueError(f"bits must be 0 beyond the block's {grid.bk} keys, got others")
