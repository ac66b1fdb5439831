"""Cases of sparse masks: blocks, and neighborhoods of a grid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

import flashx

from .cases import Call, Case, Inputs, Leaves, Size, Window


@dataclass(frozen=True, slots=True)
class BlockSparse(Case):
    """flashx.block_sparse_attention: of each row of blocks a share is hidden, but never the block on the diagonal.

    ``sparsity``: the share that is hidden, in [0, 1). ``causal`` hides more.
    """

    VARIANT: ClassVar[str] = "block-sparse"
    AXES: ClassVar[dict[str, str]] = {"sparsity": "% of blocks hidden", "length": "keys"}

    length: int
    batch: int = 1
    sparsity: float = 0.5
    block: int = 64
    causal: bool = False

    def __post_init__(self) -> None:
        Case.__post_init__(self)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}")
        if self.block % 16 or not 16 <= self.block <= 256:
            raise ValueError(f"block must be a multiple of 16 from 16 to 256, got {self.block}")

    def __str__(self) -> str:
        size = f"{self.VARIANT} {self.block}x{self.block} B{self.batch} {self.heads_label} N{self.length}"
        return self.describe(size, f"{100 * self.sparsity:g}%-hidden", "causal" if self.causal else "")

    def place(self, axis: str) -> float | None:
        return 100 * self.sparsity if axis == "sparsity" else self.length

    @property
    def sequences(self) -> int:
        return self.batch

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "query": (self.batch, self.q_heads, self.length, self.head_dim),
            "key": (self.batch, self.kv_heads, self.length, self.head_dim),
            "value": (self.batch, self.kv_heads, self.length, self.value_dim),
        }

    def blocks(self) -> torch.Tensor:
        """(query blocks, key blocks): which are visible, causal aside."""
        return _drawn_blocks(self.length, self.block, self.sparsity)

    def call(self, inputs: Inputs) -> Call:
        visible = self.blocks().to(inputs.device, torch.int32)[None, None]
        bits = torch.empty((0, self.block, -(-self.block // 32)), dtype=torch.int32, device=inputs.device)
        mask = flashx.BlockMask(visible, bits, (self.block, self.block), self.length, self.length)
        options = {"causal": self.causal, **self.options(inputs)}
        return Call(flashx.block_sparse_attention, lambda *leaves: (*leaves, mask), options)

    def lengths(self, sequence: int) -> Size:
        return self.length, self.length

    def pairs(self) -> int:
        blocks = self.blocks().double()
        sizes = torch.full((len(blocks),), float(self.block), dtype=torch.float64)
        sizes[-1] = self.length - self.block * (len(blocks) - 1)
        pairs = blocks * sizes[:, None] * sizes
        if self.causal:
            pairs = pairs.tril()
            pairs.diagonal().copy_(sizes * (sizes + 1) / 2)
        return self.batch * int(pairs.sum())

    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        row, key = torch.arange(rows.start, rows.stop), torch.arange(self.length)
        seen = self.blocks()[row[:, None] // self.block, key // self.block]
        return (seen & (key <= row[:, None]) if self.causal else seen).to(device)

    def mask(self, device: torch.device) -> Window | torch.Tensor:
        return self.visible(0, range(self.length), device)


@functools.lru_cache(maxsize=16)
def _drawn_blocks(length: int, block: int, sparsity: float) -> torch.Tensor:
    blocks = flashx.BlockMask.random(length, length, 1 - sparsity, seed=0, block=block).map[0, 0] == 1
    return blocks | torch.eye(len(blocks), dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Neighborhood(Case):
    """flashx.neighborhood_attention: tokens of a grid, each sees a window around it. NATTEN's semantics."""

    VARIANT: ClassVar[str] = "neighborhood"
    AXES: ClassVar[dict[str, str]] = {"stride": "stride", "kernel": "window", "spatial": "tokens"}

    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        Case.__post_init__(self)
        # flashx's own checks.
        flashx.neighborhood.simulate(
            self.spatial, self.kernel, stride=self.stride, dilation=self.dilation, is_causal=self.causal
        )

    def __str__(self) -> str:
        grid, kernel = "x".join(map(str, self.spatial)), "x".join(map(str, self.kernel))
        extras = [
            f"{name} {'x'.join(map(str, sizes))}"
            for name, sizes in (("stride", self.stride), ("dilation", self.dilation))
            if set(sizes) != {1}
        ]
        size = f"{self.VARIANT} {grid} window {kernel} B{self.batch} {self.heads_label}"
        return self.describe(size, *extras, "causal" if self.causal else "")

    @property
    def sequences(self) -> int:
        return self.batch

    def place(self, axis: str) -> float | None:
        sizes: tuple[int, ...] = getattr(self, axis)
        return math.prod(sizes)

    @property
    def tokens(self) -> int:
        return math.prod(self.spatial)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "query": (self.batch, self.q_heads, *self.spatial, self.head_dim),
            "key": (self.batch, self.kv_heads, *self.spatial, self.head_dim),
            "value": (self.batch, self.kv_heads, *self.spatial, self.value_dim),
        }

    def call(self, inputs: Inputs) -> Call:
        options = {
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.causal,
            **self.options(inputs),
        }
        return Call(flashx.neighborhood_attention, lambda *leaves: (*leaves, self.kernel), options)

    def lengths(self, sequence: int) -> Size:
        return self.tokens, self.tokens

    def _axes(self) -> list[_Axis]:
        axes = zip(self.spatial, self.kernel, self.stride, self.dilation, strict=True)
        return [_axis(*axis, self.causal) for axis in axes]

    def pairs(self) -> int:
        return self.batch * math.prod(int((axis.end - axis.begin).sum()) for axis in self._axes())

    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        query, key = (
            torch.unravel_index(torch.arange(tokens.start, tokens.stop), self.spatial)
            for tokens in (rows, range(self.tokens))
        )
        shown = torch.ones(len(rows), self.tokens, dtype=torch.bool)
        for axis, dilation, i, j in zip(self._axes(), self.dilation, query, key, strict=True):
            place = j // dilation
            shown &= (place >= axis.begin[i][:, None]) & (place < axis.end[i][:, None])
            shown &= i[:, None] % dilation == j % dilation
        return shown.to(device)

    def mask(self, device: torch.device) -> Window | torch.Tensor:
        return self.visible(0, range(self.tokens), device)

    def rows(self, tensor: torch.Tensor, sequence: int | None = None) -> torch.Tensor:
        flat = tensor.flatten(2, -2)
        return flat if sequence is None else flat[sequence : sequence + 1]

    def unrows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(2, self.spatial)

    def keys(self, leaves: Leaves, sequence: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows(leaves["key"], sequence), self.rows(leaves["value"], sequence)


class _Axis(NamedTuple):
    """Which places of its own sub-axis, [begin, end), each coordinate of an axis sees."""

    begin: torch.Tensor
    end: torch.Tensor


@functools.lru_cache(maxsize=64)
def _axis(length: int, kernel: int, stride: int, dilation: int, causal: bool) -> _Axis:
    """The rule of Hassani et al., spelled out, coordinate by coordinate.

    Within each of the dilation's interleaved sub-axes, a group of stride queries shares the window around its leader,
    which is shifted so that it stays inside; a causal window ends with the query itself.
    """
    begins, ends = [], []
    for coordinate in range(length):
        place, sub = coordinate // dilation, len(range(coordinate % dilation, length, dilation))
        if causal:
            leader = min(place // stride * stride + stride - 1, sub - 1)
            begins.append(max(leader - kernel + 1, 0))
            ends.append(place + 1)
        else:
            leader = min(place // stride * stride + stride // 2, sub - 1)
            begins.append(min(max(leader - kernel // 2, 0), sub - kernel))
            ends.append(begins[-1] + kernel)
    return _Axis(torch.tensor(begins), torch.tensor(ends))
