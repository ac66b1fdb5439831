"""Cases: the attention problems that are measured, as data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from flashx.masks import IntervalMask
from flashx.problem import Problem

Direction = Literal["fwd", "bwd", "both"]
Size = tuple[int, int]
Window = tuple[int | None, int | None]

DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd", "both")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

FULL: Window = (None, None)
CAUSAL: Window = (None, 0)

# The backward has five matrix products where the forward has two: S, dP, dQ, dK and dV, against S and O.
_FLOP_FACTOR: dict[Direction, float] = {"fwd": 1.0, "bwd": 2.5, "both": 3.5}


class Inputs(NamedTuple):
    """A case's tensors; grad_out is the gradient that comes in from above."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One attention problem and the direction to run it in. Sizes are in elements.

    ``window`` is flashx.attention's: (None, None) sees everything, (None, 0) is causal, aligned bottom-right.
    ``direction`` "both" is the forward followed by the backward.
    """

    q_len: int
    k_len: int
    head_dim: int = 64
    value_dim: int = 64
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 4
    dtype: str = "fp32"
    window: Window = FULL
    direction: Direction = "fwd"

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        length = _pair(self.q_len, self.k_len)
        dim = _pair(self.head_dim, self.value_dim)
        left, right = (str(width) if width is not None else "none" for width in self.window)
        mask = {FULL: "full", CAUSAL: "causal"}.get(self.window, f"window {left},{right}")
        return f"B{self.batch} H{heads} N{length} D{dim} {self.dtype} {mask}"

    @property
    def mask(self) -> IntervalMask:
        """The keys that each query row sees."""
        return IntervalMask(*self.window, shift=self.k_len - self.q_len)

    def problem(self) -> Problem:
        """The case as flashx's dispatch sees it."""
        return Problem(
            batch=self.batch,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            q_len=self.q_len,
            k_len=self.k_len,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=DTYPES[self.dtype],
            device="cpu",
            mask=self.mask,
            scale=1 / math.sqrt(self.head_dim),
        )

    def inputs(self, seed: int = 0) -> Inputs:
        """The case's tensors, the same ones for the same seed; float64 ones hold float32's values (see check.py)."""
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, length: int, dim: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, length, dim, generator=generator).to(DTYPES[self.dtype])

        return Inputs(
            draw(self.q_heads, self.q_len, self.head_dim),
            draw(self.kv_heads, self.k_len, self.head_dim),
            draw(self.kv_heads, self.k_len, self.value_dim),
            draw(self.q_heads, self.q_len, self.value_dim),
        )

    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that the mask shows: the only ones that attention needs to compute."""
        mask = self.mask
        return sum(max(mask.hi(row, self.k_len) - mask.lo(row, self.k_len), 0) for row in range(self.q_len))

    def flops(self) -> float:
        """Multiplications and additions of the matrix products over visible pairs.

        Forward 2 D + 2 Dv a pair (4 D where D = Dv), backward 2.5 times that, as Dao, "FlashAttention-2", section 4.1.
        """
        pairs = self.batch * self.q_heads * self.visible_pairs()
        return pairs * 2 * (self.head_dim + self.value_dim) * _FLOP_FACTOR[self.direction]

    def bytes(self) -> int:
        """Compulsory traffic: each input read and each result written once, with nothing kept in between.

        Forward: query, key, value, out. Backward: the same four and grad_out read, three gradients written.
        """
        query = self.batch * self.q_heads * self.q_len * self.head_dim
        out = self.batch * self.q_heads * self.q_len * self.value_dim
        key_value = self.batch * self.kv_heads * self.k_len * (self.head_dim + self.value_dim)
        forward, backward = query + key_value + out, 2 * (query + key_value + out)
        elements = {"fwd": forward, "bwd": backward, "both": forward + backward}[self.direction]
        return elements * DTYPES[self.dtype].itemsize


def _pair(first: int, second: int) -> str:
    return f"{first}" if first == second else f"{first}x{second}"


def default_cases(directions: Iterable[Direction]) -> list[Case]:
    """What a first look should show, in about a minute on two cores."""
    short = Case(1024, 1024)
    wide = Case(2048, 2048, 128, 128, q_heads=2, kv_heads=2, window=CAUSAL)
    long = Case(4096, 4096, q_heads=2, kv_heads=2, window=CAUSAL)
    decode = Case(1, 4096, 128, 128, batch=4, q_heads=32, kv_heads=8, dtype="bf16", window=CAUSAL)
    cases = [
        short,
        replace(short, window=CAUSAL),
        replace(short, window=CAUSAL, dtype="bf16"),
        wide,
        replace(wide, dtype="bf16"),
        long,
        replace(long, window=(256, 0)),
        decode,
    ]
    directions = list(directions)
    # Nobody trains through a single query.
    return [
        replace(case, direction=direction)
        for case in cases
        for direction in directions
        if direction == "fwd" or case is not decode
    ]


def grid(
    seqlens: Iterable[Size],
    head_dims: Iterable[Size],
    heads: Iterable[int],
    kv_heads: Iterable[int] | None,
    batches: Iterable[int],
    dtypes: Iterable[str],
    windows: Iterable[Window],
    directions: Iterable[Direction],
) -> list[Case]:
    """Every combination once; kv_heads None is one key head per query head.

    Raises:
        ValueError: heads that are not a multiple of kv_heads.
    """
    cases = []
    key_heads: list[int | None] = [None] if kv_heads is None else list(kv_heads)
    axes = itertools.product(dtypes, batches, heads, key_heads, seqlens, head_dims, windows, directions)
    for dtype, batch, q_heads, kv, (q_len, k_len), (head_dim, value_dim), window, direction in axes:
        kv = q_heads if kv is None else kv
        if q_heads % kv:
            raise ValueError(f"heads must be a multiple of kv-heads, got {q_heads} and {kv}")
        cases.append(Case(q_len, k_len, head_dim, value_dim, batch, q_heads, kv, dtype, window, direction))
    return list(dict.fromkeys(cases))
