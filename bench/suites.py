"""Named protocols: shapes that are published somewhere, so that their figures can be put beside others'.

``scale`` makes them fit a small machine: tokens, heads and batches shrink with it. At 1 they are as published.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .cases import CAUSAL, FULL, Case, Dense, Direction
from .prefixes import SharedPrefix, Tree
from .ragged import Decode, Varlen
from .sparse import BlockSparse, Neighborhood

# (most CPUs, scale) of a machine without a GPU.
CPU_SCALES = ((4, 1 / 8), (16, 1 / 4), (10**9, 1 / 2))

# Trees of Pan et al., "FastTree" (MLSys 2025): nodes per level, and tokens of each.
TREES = (
    ((1, 10), (4000, 400)),
    ((1, 256), (256, 32)),
    ((1, 4, 256), (8, 256, 32)),
    ((1, 16, 64), (1024, 256, 32)),
    ((1, 4, 16, 512), (1024, 256, 128, 32)),
    ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
)
# Hassani et al., "Generalized Neighborhood Attention": grid, window, strides.
NEIGHBORHOODS = (
    ((32768,), (2048,), ((1,), (256,), (2048,))),
    ((256, 256), (80, 80), ((1, 1), (16, 16))),
    ((30, 48, 80), (18, 24, 24), ((1, 1, 1), (16, 8, 8))),
)


@dataclass(frozen=True, slots=True)
class Suite:
    """A protocol: ``make`` gives its cases for a scale, forward and in its own dtype."""

    text: str
    make: Callable[[float], list[Case]]
    directions: tuple[Direction, ...] = ("fwd",)

    def cases(
        self, scale: float, dtype: str | None = None, directions: Sequence[Direction] | None = None
    ) -> list[Case]:
        """The cases, in another dtype or in other directions if asked; each direction of a case beside the others."""
        return [
            replace(case, direction=direction, dtype=dtype or case.dtype)
            for case in dict.fromkeys(self.make(scale))  # small scales make some of them the same
            for direction in directions or self.directions
            if direction == "fwd" or not case.FORWARD_ONLY
        ]


def default_scale(device: str) -> float:
    """What finishes in minutes: 1 on a GPU, less on a CPU, the fewer cores it has."""
    if device == "cuda":
        return 1.0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return next(scale for most, scale in CPU_SCALES if cpus <= most)


def _scaled(value: int, scale: float, least: int = 1) -> int:
    return max(round(value * scale), least)


def _up_to(first: int, last: float) -> list[int]:
    """first and its doublings, up to last; first at least."""
    sizes = [first]
    while 2 * sizes[-1] <= last:
        sizes.append(2 * sizes[-1])
    return sizes


def fa2_grid(scale: float) -> list[Case]:
    """As many tokens and as wide a model whatever the length and head dim."""
    tokens, hidden = _scaled(16384, scale, 512), _scaled(2048, scale, 256)
    return [
        Dense(
            length, length, batch=max(tokens // length, 1), head_dim=dim, value_dim=dim,
            q_heads=max(hidden // dim, 1), kv_heads=max(hidden // dim, 1), dtype="bf16", window=window,
        )
        for dim in (64, 128, 256)
        for window in (FULL, CAUSAL)
        for length in _up_to(512, tokens)
    ]  # fmt: skip


def hydragen(scale: float) -> list[Case]:
    return [
        SharedPrefix(
            _scaled(batch, scale), _scaled(2 * batch, scale, 16), _scaled(suffix, scale),
            q_heads=8, kv_heads=1, head_dim=128, value_dim=128, dtype="bf16",
        )
        for batch in (512, 1024, 2048, 4096)
        for suffix in (16, 128, 512)
    ]  # fmt: skip


def relay(scale: float) -> list[Case]:
    heads = _scaled(52, scale, 2)
    return [
        SharedPrefix(
            batch, _scaled(prefix, scale, 64), 128,
            q_heads=heads, kv_heads=heads, head_dim=128, value_dim=128, dtype="fp16",
        )
        for batch in (1, 8, 32, 64)
        if batch == 1 or batch <= 256 * scale
        for prefix in (1024, 4096, 16384)
    ]  # fmt: skip


def beam(scale: float) -> list[Case]:
    return [
        SharedPrefix(
            _scaled(128, scale, 8), prefix, 3,
            q_heads=_scaled(32, scale, 4), kv_heads=_scaled(8, scale), head_dim=128, value_dim=128, dtype="bf16",
        )
        for prefix in _up_to(128, 4096)
    ]  # fmt: skip


def tree(scale: float) -> list[Case]:
    return [
        Tree(
            nodes, tuple(_scaled(count, scale, min(count, 8)) for count in tokens),
            q_heads=_scaled(32, scale, 4), kv_heads=_scaled(8, scale), head_dim=128, value_dim=128, dtype="bf16",
        )
        for nodes, tokens in TREES
    ]  # fmt: skip


def block_sparse(scale: float) -> list[Case]:
    heads = _scaled(32, scale, 2)
    return [
        BlockSparse(
            _scaled(8192, 2 * scale if scale < 1 else 1, 512), sparsity=sparsity, causal=True,
            q_heads=heads, kv_heads=heads, head_dim=128, value_dim=128, dtype="bf16",
        )
        for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
    ]  # fmt: skip


def window(scale: float) -> list[Case]:
    heads = _scaled(16, scale, 2)
    lengths = _up_to(1024, 32768 * scale)
    sizes = [(length, 256) for length in lengths] + [(lengths[-1], width) for width in (64, 128, 512, 1024)]
    return [
        Dense(length, length, window=(width, 0), q_heads=heads, kv_heads=heads, dtype="bf16") for length, width in sizes
    ]


def neighborhood(scale: float) -> list[Case]:
    cases: list[Case] = []
    for grid, kernel, strides in NEIGHBORHOODS:
        # Peers attend densely: their cost grows with the square of the tokens.
        factor = scale ** (1.5 / len(grid))
        spatial, widths = (tuple(_scaled(size, factor, 2) for size in sizes) for sizes in (grid, kernel))
        for stride in strides:
            cases.append(
                Neighborhood(
                    spatial, widths, tuple(_scaled(size, factor) if size > 1 else 1 for size in stride),
                    (1,) * len(grid), q_heads=_scaled(24, scale, 2), kv_heads=_scaled(24, scale, 2),
                    head_dim=128, value_dim=128, dtype="bf16",
                )
            )  # fmt: skip
    return cases


def decode(scale: float) -> list[Case]:
    one = [(length,) for length in _up_to(1024, 131072 * scale)[::2]]
    many = [(4096,) * _scaled(32, scale, 2), _drawn(_scaled(32, scale, 2), 512, 8192, seed=1)]
    return [
        Decode(lens, page=page, q_heads=32, kv_heads=8, head_dim=128, value_dim=128, dtype="bf16")
        for page in (0, 16)
        for lens in (*one, *many)
    ]


def varlen(scale: float) -> list[Case]:
    heads = _scaled(16, scale, 2)
    longest = _scaled(8192, scale, 256)
    batches = [
        _drawn(16, longest // 16, longest, seed=2),
        (longest, *_drawn(31, longest // 64, longest // 8, seed=3)),
        (longest // 4,) * 16,
    ]
    return [
        Varlen(lens, causal, q_heads=heads, kv_heads=heads, head_dim=128, value_dim=128, dtype="bf16")
        for causal in (True, False)
        for lens in batches
    ]


def sinks(scale: float) -> list[Case]:
    q_heads, kv_heads = _scaled(64, scale, 8), _scaled(8, scale)
    prefill = [
        Dense(length, length, window=width, sinks=True, dtype="bf16", q_heads=q_heads, kv_heads=kv_heads)
        for width in ((127, 0), CAUSAL)
        for length in _up_to(1024, 16384 * scale)
    ]
    cached = [
        Decode((length,) * 4, window=127, sinks=True, dtype="bf16", q_heads=64, kv_heads=8) for length in (1024, 8192)
    ]
    return [*prefill, *cached]


def _drawn(count: int, least: int, most: int, seed: int) -> tuple[int, ...]:
    """Lengths, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(max(least, 1), most + 1, (count,), generator=generator).tolist())


SUITES: dict[str, Suite] = {
    "fa2-grid": Suite(
        "FlashAttention-2's grid: 16k tokens, hidden 2048, D 64/128/256, N 512..16k, causal and not",
        fa2_grid,
        ("fwd", "bwd", "both"),
    ),
    "hydragen": Suite("Hydragen's microbenchmark: one query, 8/1 heads, D 128, prefixes 1k..8k", hydragen),
    "relay": Suite("RelayAttention's: a system prompt of 1k..16k, 52 heads, D 128, batches 1..64", relay),
    "beam": Suite("beam search: 128 beams with 3 keys each, prefix 128..4096", beam),
    "tree": Suite("FastTree's prefix trees, 2 to 6 levels, 32/8 heads, D 128", tree),
    "block-sparse": Suite("blocks of 64, causal, 0 to 95 % of them hidden", block_sparse),
    "window": Suite("sliding windows: 256 keys over 1k..32k, and 64..1024 over the longest", window, ("fwd", "both")),
    "neighborhood": Suite("NATTEN's 1-D, 2-D and 3-D grids, with strides", neighborhood),
    "decode": Suite("one query over a cache, 32/8 heads, contiguous and in pages of 16", decode),
    "varlen": Suite("packed sequences: mixed, one long among short, equal; causal and not", varlen, ("fwd", "both")),
    "sinks": Suite("gpt-oss: learned sinks, window 128 or none, 64/8 heads, prefill and decode", sinks),
}
