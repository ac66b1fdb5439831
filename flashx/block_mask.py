"""BlockMask: an exact boolean mask stored block by block; only partly visible blocks carry elements."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .block_bits import (
    FULL,
    HIDDEN,
    PARTIAL,
    WIDEST,
    Bits,
    CheckedMod,
    Grid,
    MaskMod,
    check_contents,
    check_length,
    checked_grid,
    chunks,
    count_bits,
    listed_kinds,
    map_by_distance,
    map_of_blocks,
    map_of_tiles,
    pack,
    tiles,
    unpack,
)
from .checks import check_tensor
from .problem import shape


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockMask:
    """An exact boolean mask (B|1, H|1, q_len, k_len), H query heads, of which attention skips the hidden blocks.

    Every block is hidden, fully visible or partly visible, and only the latter store their elements, one bit each.
    The map is the schedule of both directions: the forward walks its rows, the gradients of key and value its columns.
    Blocks with the same elements may share their bits: a causal mask stores one block.

    Masks are made by the class methods, combined with ``&`` and ``|``, and never change. ``==`` is identity; ``equal``
    compares. On a GPU they are made without waiting for it as long as the bits of all blocks, hidden ones included,
    take at most 256 MiB, which is then what is stored. Beyond that, and on the CPU, only partial blocks are, and the
    GPU is waited for once per 2**24 elements.

    Attributes:
        map: (B|1, H|1, ceil(q_len / bq), ceil(k_len / bk)), int32: 0 is a hidden block, 1 a fully visible one,
            2 + n one with the elements bits[n]. A block at the edge counts only the elements that exist.
        bits: (n, bq, ceil(bk / 32)), int32: bit c (lowest first) of word w of row r is element (r, 32 w + c) of the
            block. 0 beyond bk; beyond q_len and k_len they mean nothing.
        block: (bq, bk), multiples of 16 from 16 to 256.
        q_len: queries.
        k_len: keys.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value. An entry of map outside [0, 2 + n) is
            refused on the CPU; on a GPU it is not looked at here, and hides its block.

    Example:
        >>> mask = flashx.BlockMask.causal(4096, 4096) & flashx.BlockMask.random(4096, 4096, density=0.5, seed=0)
        >>> mask.shape
        (1, 1, 4096, 4096)
    """

    map: torch.Tensor
    bits: torch.Tensor
    block: tuple[int, int]
    q_len: int
    k_len: int

    def __post_init__(self) -> None:
        grid = checked_grid(self.q_len, self.k_len, self.block)
        for name, tensor, dims in (("map", self.map, 4), ("bits", self.bits, 3)):
            check_tensor(name, tensor)
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {tensor.dtype}")
            if tensor.dim() != dims:
                raise ValueError(f"{name} must have {dims} dimensions, got shape {shape(tensor)}")
        if shape(self.map)[2:] != grid.blocks:
            raise ValueError(
                f"map must have shape (B, H, {grid.blocks[0]}, {grid.blocks[1]}) for q_len {self.q_len}, "
                f"k_len {self.k_len} and block {grid.block}, got {shape(self.map)}"
            )
        if shape(self.bits)[1:] != (grid.bq, grid.words):
            raise ValueError(
                f"bits must have shape (n, {grid.bq}, {grid.words}) for block {grid.block}, got {shape(self.bits)}"
            )
        if self.bits.device != self.map.device:
            raise ValueError(f"bits must be on map's device {self.map.device}, got {self.bits.device}")
        check_contents(grid, self.map, self.bits)
        object.__setattr__(self, "block", grid.block)
        object.__setattr__(self, "map", self.map.contiguous())
        object.__setattr__(self, "bits", self.bits.contiguous())

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block={self.block}, bitmaps={len(self.bits)}, device={self.device})"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B|1, H|1, q_len, k_len)."""
        return (self.map.shape[0], self.map.shape[1], self.q_len, self.k_len)

    @property
    def device(self) -> torch.device:
        """Where map and bits are."""
        return self.map.device

    @classmethod
    def from_dense(cls, mask: torch.Tensor, block: int | tuple[int, int] = (64, 64)) -> BlockMask:
        """The mask given by its elements, on their device. Reads them once.

        Args:
            mask: (q_len, k_len), (H|1, q_len, k_len) or (B|1, H|1, q_len, k_len), bool, any strides; True where
                visible. A batch or head dimension that is only expanded (stride 0) is stored with size 1.
            block: (bq, bk), or one number for both.
        """
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"mask must have 2 to 4 dimensions ([[batch,] heads,] q, k), got shape {shape(mask)}")
        mask = mask[(None,) * (4 - mask.dim())]
        for dim in (0, 1):
            if mask.shape[dim] > 1 and mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
        batch, heads, q_len, k_len = mask.shape
        grid = checked_grid(q_len, k_len, block)
        flat = mask.flatten(0, 1)
        made = map_of_tiles(grid, batch, heads, mask.device, lambda head, q, k: flat[head, q, k])
        return cls(*made, grid.block, q_len, k_len)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        B: int | None,
        H: int | None,
        q_len: int,
        k_len: int,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The mask ``mask_mod(b, h, q_idx, kv_idx)``, as torch's flex_attention takes it.

        It is called a few block rows at a time: on int64 index tensors that broadcast against each other if it works
        element by element, and on scalars under ``torch.vmap``, as in torch, if not (and on a GPU).

        Args:
            mask_mod: returns a bool tensor, True where visible.
            B: batch size; None is 1, one mask for every batch.
            H: query heads; None is 1.
            q_len: queries.
            k_len: keys.
            block: (bq, bk), or one number for both.
            device: where the index tensors and the mask are.

        Example:
            >>> document = torch.arange(1024) // 300
            >>> def same_document(b, h, q, k):
            ...     return document[q] == document[k]
            >>> flashx.BlockMask.from_mask_mod(same_document, None, None, 1024, 1024).shape
            (1, 1, 1024, 1024)
        """
        batch = 1 if B is None else check_length("B", B)
        heads = 1 if H is None else check_length("H", H)
        grid = checked_grid(q_len, k_len, block)
        device = torch.device(device)
        mod = CheckedMod(mask_mod, (batch, heads, q_len, k_len), device)
        # Batches and heads that mask_mod does not tell apart share their blocks.
        own_batch, own_heads = batch if mod.uses_batch else min(batch, 1), heads if mod.uses_heads else min(heads, 1)

        def read(head: slice, q: slice, k: slice) -> torch.Tensor:
            index = torch.arange(head.start, head.stop, device=device)[:, None, None]
            rows = torch.arange(q.start, q.stop, device=device)[None, :, None]
            columns = torch.arange(k.start, k.stop, device=device)[None, None, :]
            return mod(index // own_heads, index % own_heads, rows, columns)

        block_map, bits = map_of_tiles(grid, own_batch, own_heads, device, read)
        return cls(block_map.expand(batch, heads, -1, -1), bits, grid.block, q_len, k_len)

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMask:
        """A mask of torch's flex_attention, on its device.

        Its full blocks are taken as they are; mask_mod gives the elements of the others and is called on them alone.
        On a GPU it is called on all blocks, where that saves waiting for how many the others are.

        Args:
            block_mask: torch.nn.attention.flex_attention.BlockMask. BLOCK_SIZE must be multiples of 16 from 16 to
                256. Lists with counts or indices out of range, or with a block twice, are refused on the CPU; on a
                GPU what is out of range is left out.
        """
        from torch.nn.attention import flex_attention

        if not isinstance(block_mask, flex_attention.BlockMask):
            raise TypeError(
                f"block_mask must be a torch.nn.attention.flex_attention.BlockMask, got {type(block_mask).__name__}"
            )
        grid = checked_grid(
            *block_mask.seq_lengths, block_mask.BLOCK_SIZE, names=("seq_lengths[0]", "seq_lengths[1]", "BLOCK_SIZE")
        )
        kinds = listed_kinds(grid, block_mask)
        batch, heads = kinds.shape[:2]
        device = kinds.device
        mod = CheckedMod(block_mask.mask_mod, (batch, heads, grid.q_len, grid.k_len), device)

        def words(chosen: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            head = (chosen // max(grid.blocks[0] * grid.blocks[1], 1))[:, None, None]
            elements = mod(head // heads, head % heads, *grid.positions(i, j))
            packed = pack(elements.expand(len(chosen), grid.bq, grid.bk), grid.block)
            kind = kinds.view(-1)[chosen][:, None, None]
            return torch.where(kind == PARTIAL, packed, torch.where(kind == FULL, grid.full_words(device), 0))

        return cls(*map_of_blocks(grid, kinds, words), grid.block, grid.q_len, grid.k_len)

    @classmethod
    def causal(
        cls,
        q_len: int,
        k_len: int,
        *,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Row i sees key j only if ``j <= i + k_len - q_len``."""
        return cls._windowed(q_len, k_len, None, 0, 0, block, device)

    @classmethod
    def sliding_window(
        cls,
        q_len: int,
        k_len: int,
        window: int | Sequence[int | None],
        causal: bool = True,
        sink_tokens: int = 0,
        *,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Row i sees keys ``[p - left, p + right]`` with ``p = i + k_len - q_len``, and the first ones far behind.

        Args:
            q_len: queries.
            k_len: keys.
            window: (left, right), ints >= 0, None is unbounded; an int is both.
            causal: hides the keys after p, whatever right is.
            sink_tokens: keys at the start that left does not hide (Xiao et al., "Efficient Streaming Language Models
                with Attention Sinks").
            block: (bq, bk), or one number for both.
            device: where the mask is.
        """
        left, right = _window(window)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
        sink_tokens = check_length("sink_tokens", sink_tokens)
        return cls._windowed(q_len, k_len, left, 0 if causal else right, sink_tokens, block, device)

    @classmethod
    def streaming(
        cls,
        q_len: int,
        k_len: int,
        sink: int,
        local: int,
        *,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Causal; row i sees keys ``j < sink`` and ``p - j < local`` with ``p = i + k_len - q_len``.

        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", section 3.2; exact by element.
        """
        sink, local = check_length("sink", sink), check_length("local", local)
        return cls._windowed(q_len, k_len, local - 1, 0, sink, block, device)

    @classmethod
    def strided(
        cls,
        q_len: int,
        k_len: int,
        stride: int,
        local: int | None = None,
        *,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Causal; row i sees the last local keys up to its own and every stride-th one before: ``p - j < local`` or
        ``(p - j) % stride == 0`` with ``p = i + k_len - q_len`` (Child et al., "Generating Long Sequences with Sparse
        Transformers", section 4.2; exact by element).

        Args:
            q_len: queries.
            k_len: keys.
            stride: at least 1.
            local: the paper's is stride, the default.
            block: (bq, bk), or one number for both.
            device: where the mask is.
        """
        grid = checked_grid(q_len, k_len, block)
        stride = check_length("stride", stride, at_least=1)
        local = stride if local is None else check_length("local", local)

        def visible(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            back = q + (k_len - q_len) - k
            return (back >= 0) & ((back < local) | (back % stride == 0))

        return cls(*map_by_distance(grid, visible), grid.block, q_len, k_len).to(device)

    @classmethod
    def butterfly(
        cls,
        q_len: int,
        k_len: int,
        max_stride: int | None = None,
        *,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Flat block butterfly: block (i, j) is visible, all of it, if ``i ^ j`` is 0 or a power of two of at most
        ``max_stride / 2`` (Dao et al., "Pixelated Butterfly", section 3.2). Not causal; ``& BlockMask.causal(...)`` is.

        Block rows and columns are aligned at the last count_bits, where their numbers differ.

        Args:
            q_len: queries.
            k_len: keys.
            max_stride: largest butterfly factor in blocks, a power of two; 1 is the diagonal alone, None no limit.
            block: (bq, bk), or one number for both.
            device: where the mask is.
        """
        grid = checked_grid(q_len, k_len, block)
        if max_stride is not None:
            max_stride = check_length("max_stride", max_stride, at_least=1)
            if max_stride & (max_stride - 1):
                raise ValueError(f"max_stride must be a power of two, got {max_stride}")
        rows, columns = grid.blocks
        i = torch.arange(rows) + max(columns - rows, 0)
        j = torch.arange(columns) + max(rows - columns, 0)
        difference = i[:, None] ^ j
        visible = difference & (difference - 1) == 0
        if max_stride is not None:
            visible &= 2 * difference <= max_stride
        return cls(visible.int()[None, None], grid.no_bits(), grid.block, q_len, k_len).to(device)

    @classmethod
    def random(
        cls,
        q_len: int,
        k_len: int,
        density: float,
        seed: int,
        B: int = 1,
        H: int = 1,
        *,
        block: int | tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """Of each row of blocks ``round(density * number of blocks)`` are visible, all of them, drawn by seed.

        The same seed gives the same mask on every device.

        Args:
            q_len: queries.
            k_len: keys.
            density: in [0, 1].
            seed: of the torch.Generator that draws.
            B: batch size.
            H: query heads.
            block: (bq, bk), or one number for both.
            device: where the mask is.
        """
        grid = checked_grid(q_len, k_len, block)
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"density must be a number, got {type(density).__name__}")
        if not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1], got {density}")
        seed = check_length("seed", seed)
        full_shape = (check_length("B", B), check_length("H", H), *grid.blocks)
        order = torch.rand(full_shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        visible = torch.zeros(full_shape, dtype=torch.int32)
        visible.scatter_(-1, order[..., : round(density * grid.blocks[1])], FULL)
        return cls(visible, grid.no_bits(), grid.block, q_len, k_len).to(device)

    def to_dense(self) -> torch.Tensor:
        """(B|1, H|1, q_len, k_len), bool, True where visible."""
        grid = self._grid()
        out = torch.empty(self.shape, dtype=torch.bool, device=self.device)
        flat_out, flat_map = out.flatten(0, 1), self.map.flatten(0, 1)
        for tile in tiles(grid, len(flat_map), self.device):
            entries = flat_map[tile]
            elements = unpack(self._words(entries.flatten()), grid.bk).view(*entries.shape, *grid.block)
            part = flat_out[tile[0], grid.queries(tile[1]), grid.keys(tile[2])]
            part.copy_(elements.transpose(2, 3).flatten(3).flatten(1, 2)[:, : part.shape[1], : part.shape[2]])
        return out

    @property
    def density(self) -> float:
        """Visible elements / all elements (0 if there are none). Waits for a GPU."""
        grid = self._grid()
        total = self.map.shape[0] * self.map.shape[1] * self.q_len * self.k_len
        if total == 0:
            return 0.0
        full = (self.map == FULL).sum((0, 1))
        heights, widths = (grid.extents(dim, self.device) for dim in (0, 1))
        visible = int((full * heights[:, None] * widths).sum())
        flat = self.map.flatten()
        for chosen in chunks((flat >= PARTIAL).nonzero().flatten(), grid):
            words = self._words(flat[chosen]) & grid.valid(*grid.coordinates(chosen))
            visible += int(count_bits(words).sum())
        return visible / total

    @property
    def block_density(self) -> float:
        """Blocks that are not hidden / all blocks (0 if there are none). Waits for a GPU."""
        return int(self.map.count_nonzero()) / max(self.map.numel(), 1)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Visible in both. Block sizes and lengths must be the same; batches and heads broadcast."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return self._combined(other, operator.and_)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Visible in either. Block sizes and lengths must be the same; batches and heads broadcast."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return self._combined(other, operator.or_)

    def equal(self, other: BlockMask) -> bool:
        """The same shape, block size, device and elements. Waits for a GPU."""
        if not isinstance(other, BlockMask):
            raise TypeError(f"other must be a BlockMask, got {type(other).__name__}")
        if (self.shape, self.block, self.device) != (other.shape, other.block, other.device):
            return False
        return not bool(self._combined(other, operator.xor).map.any())

    def transpose(self) -> BlockMask:
        """The mask with queries and keys exchanged."""
        grid = self._grid()
        turned = Grid(self.k_len, self.q_len, grid.bk, grid.bq).no_bits(len(self.bits), self.device)
        for start in range(0, len(self.bits), grid.per_tile(self.device)):
            part = self.bits[start : start + grid.per_tile(self.device)]
            turned[start : start + len(part)] = pack(unpack(part, grid.bk).transpose(1, 2), (grid.bk, grid.bq))
        return BlockMask(self.map.transpose(2, 3), turned, (grid.bk, grid.bq), self.k_len, self.q_len)

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on another device; itself if it is there. To a GPU it does not wait for it."""
        # CUDA stages pageable memory before it returns, so this is safe; only the way back needs to wait.
        no_wait = self.device.type == "cpu"
        moved_map, moved_bits = (tensor.to(device, non_blocking=no_wait) for tensor in (self.map, self.bits))
        if moved_map is self.map:
            return self
        return BlockMask(moved_map, moved_bits, self.block, self.q_len, self.k_len)

    def plot(self, path: str | os.PathLike[str] | None = None, batch: int = 0, head: int = 0) -> Any:
        """Draws the blocks of one head: hidden, partly and fully visible. Needs matplotlib.

        Args:
            path: file to write; its suffix says the format.
            batch: whose map; 0 where all share one.
            head: whose map; 0 where all share one.

        Returns:
            matplotlib.figure.Figure.
        """
        for name, index, size in (("batch", batch, self.map.shape[0]), ("head", head, self.map.shape[1])):
            if check_length(name, index) >= size:
                raise ValueError(f"{name} must be < {size}, got {index}")
        try:
            from matplotlib.colors import ListedColormap
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError("BlockMask.plot needs matplotlib: pip install matplotlib") from error
        kinds = self.map[batch, head].clamp(HIDDEN, PARTIAL).cpu()
        colors = {HIDDEN: "#eeeeee", FULL: "#1f4e79", PARTIAL: "#e8973a"}
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.add_subplot()
        if kinds.numel():
            axes.imshow(
                kinds.tolist(),
                cmap=ListedColormap([colors[kind] for kind in sorted(colors)]),
                vmin=HIDDEN,
                vmax=PARTIAL,
                interpolation="nearest",
                extent=(0, kinds.shape[1], kinds.shape[0], 0),
            )
        axes.set_xlabel(f"block of {self.block[1]} keys")
        axes.set_ylabel(f"block of {self.block[0]} queries")
        axes.set_title(f"{self.q_len} x {self.k_len}, batch {batch}, head {head}")
        names = {FULL: "full", PARTIAL: "partial", HIDDEN: "hidden"}
        axes.legend(
            handles=[
                Patch(facecolor=colors[kind], edgecolor="#888888", label=f"{name}: {int((kinds == kind).sum())}")
                for kind, name in names.items()
            ],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.1),
            ncols=3,
            frameon=False,
        )
        if path is not None:
            figure.savefig(path)
        return figure

    @classmethod
    def _windowed(
        cls,
        q_len: int,
        k_len: int,
        left: int | None,
        right: int | None,
        sink: int,
        block: int | tuple[int, int],
        device: torch.device | str,
    ) -> BlockMask:
        """Keys of the window, and those before sink that it has left behind."""
        grid = checked_grid(q_len, k_len, block)

        def visible(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            ahead = k - q - (k_len - q_len)
            seen = torch.ones_like(ahead, dtype=torch.bool)
            if left is not None:
                seen &= (ahead >= -left) | (k < sink)
            if right is not None:
                seen &= ahead <= right
            return seen

        made = map_by_distance(grid, visible, cuts=(sink // grid.bk, -(-sink // grid.bk)))
        return cls(*made, grid.block, q_len, k_len).to(device)

    def _combined(self, other: BlockMask, operation: Callable[[Any, Any], Any]) -> BlockMask:
        """Element by element; operation is a bitwise one."""
        for name in ("block", "q_len", "k_len", "device"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"both masks must have the same {name}, got {getattr(self, name)} and {getattr(other, name)}"
                )
        try:
            full_shape = torch.broadcast_shapes(self.map.shape, other.map.shape)
        except RuntimeError:
            raise ValueError(
                f"batches and heads must be equal or 1, got shapes {self.shape} and {other.shape}"
            ) from None
        left, right = (mask.map.expand(full_shape).flatten() for mask in (self, other))
        grid = self._grid()

        def words(chosen: torch.Tensor, _i: torch.Tensor, _j: torch.Tensor) -> torch.Tensor:
            return operation(self._words(left[chosen]), other._words(right[chosen]))

        # On 0 and 1 the operation on entries is the one on blocks.
        plain = (left < PARTIAL) & (right < PARTIAL)
        entries = torch.where(plain, operation(left, right), PARTIAL)
        bits = Bits(grid, len(entries), self.device)
        if bits.untrimmed:
            entries = bits.add_blocks(torch.arange(len(entries), device=self.device), words)
        else:
            # Pairs that occur again and again, as those of patterns do, are computed and stored once; those at a
            # ragged edge apart, as what makes a block full is another thing there.
            chosen = (~plain).nonzero().flatten()
            i, j = grid.coordinates(chosen)
            edge = 2 * (i >= self.q_len // grid.bq) + (j >= self.k_len // grid.bk)
            pair = left[chosen].long() * (PARTIAL + len(other.bits)) + right[chosen]
            pairs, inverse = torch.unique(4 * pair + edge, return_inverse=True)
            first = torch.empty_like(pairs).index_put_((inverse,), chosen)
            entries[chosen] = bits.add_blocks(first, words)[inverse]
        return BlockMask(entries.view(full_shape), bits.stored(), self.block, self.q_len, self.k_len)

    def _words(self, entries: torch.Tensor) -> torch.Tensor:
        """(n, bq, words) of the blocks with these entries (n,); entries out of range are hidden."""
        grid, count = self._grid(), len(self.bits)
        entry = entries[:, None, None]
        words = torch.where(entry == FULL, grid.full_words(self.device), 0).expand(-1, grid.bq, -1)
        if count == 0:
            return words
        stored = self.bits[(entries.long() - PARTIAL).clamp(0, count - 1)]
        return torch.where((entry >= PARTIAL) & (entry < PARTIAL + count), stored, words)

    def _grid(self) -> Grid:
        return Grid(self.q_len, self.k_len, *self.block)


def _window(window: Any) -> tuple[int | None, int | None]:
    if isinstance(window, int):
        window = (window, window)
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise TypeError(f"window must be an int or a pair (left, right), got {window!r}")
    for side, width in zip(("left", "right"), window, strict=True):
        if width is None:
            continue
        if isinstance(width, bool) or not isinstance(width, int):
            raise TypeError(f"window's {side} width must be an int or None, got {width!r}")
        if not 0 <= width <= WIDEST:
            raise ValueError(f"window's {side} width must be >= 0 and at most 2**62 (None is unbounded), got {width}")
    return window[0], window[1]
