"""Cases of shared keys: a prefix that groups of sequences share, and prefix trees."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import flashx
from flashx.masks import IntervalMask

from .cases import CAUSAL, FULL, Call, Case, Inputs, Leaves, Size, Window, visible_pairs


@dataclass(frozen=True, slots=True)
class Shared(Case):
    """Sequences that share keys level by level, and then have keys of their own; queries are the last positions.

    Leaves: query, key0, value0, key1, ... of the levels' nodes, key, value of the sequences.
    """

    @property
    @abstractmethod
    def levels(self) -> tuple[Size, ...]:
        """(nodes, keys of each) of each level; node n of a level belongs to the n-th part of the sequences."""

    @property
    @abstractmethod
    def own_keys(self) -> int:
        """Keys that each sequence has to itself."""

    @property
    @abstractmethod
    def rows_each(self) -> int:
        """Queries of each sequence."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "query": (self.sequences, self.q_heads, self.rows_each, self.head_dim),
        }
        stores = [(str(i), *level) for i, level in enumerate(self.levels)]
        for suffix, nodes, length in [*stores, ("", self.sequences, self.own_keys)]:
            shapes[f"key{suffix}"] = (nodes, self.kv_heads, length, self.head_dim)
            shapes[f"value{suffix}"] = (nodes, self.kv_heads, length, self.value_dim)
        return shapes

    @property
    def interval(self) -> IntervalMask:
        q_len, k_len = self.lengths(0)
        return IntervalMask(right=0, shift=k_len - q_len)

    def lengths(self, sequence: int) -> Size:
        return self.rows_each, sum(length for _, length in self.levels) + self.own_keys

    def pairs(self) -> int:
        return self.sequences * visible_pairs(self.interval, *self.lengths(0))

    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        k_len = self.lengths(sequence)[1]
        return IntervalMask(right=0, shift=self.interval.shift + rows.start).dense(len(rows), k_len, device)

    def mask(self, device: torch.device) -> Window | torch.Tensor:
        if self.rows_each == 1:
            return FULL
        return CAUSAL if self.interval.shift == 0 else self.interval.dense(*self.lengths(0), device)

    def keys(self, leaves: Leaves, sequence: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        def joined(name: str) -> torch.Tensor:
            parts = []
            for i, (nodes, _) in enumerate(self.levels):
                level, each = leaves[f"{name}{i}"], self.sequences // nodes
                node = None if sequence is None else sequence // each
                parts.append(level.repeat_interleave(each, 0) if node is None else level[node : node + 1])
            own = leaves[name]
            return torch.cat([*parts, own if sequence is None else own[sequence : sequence + 1]], dim=2)

        return joined("key"), joined("value")

    def families(self) -> list[Sequence[int]]:
        each = self.sequences // self.levels[0][0]
        return [range(start, start + each) for start in range(0, self.sequences, each)]


@dataclass(frozen=True, slots=True)
class SharedPrefix(Shared):
    """flashx.shared_prefix_attention: each of ``groups`` parts of the batch shares a prefix."""

    VARIANT: ClassVar[str] = "shared-prefix"
    AXES: ClassVar[dict[str, str]] = {"prefix": "keys of the prefix", "suffix": "own keys", "batch": "sequences"}

    batch: int
    prefix: int
    suffix: int
    groups: int = 1
    q_len: int = 1

    def __post_init__(self) -> None:
        Case.__post_init__(self)
        if self.batch % self.groups:
            raise ValueError(f"batch must be a multiple of groups, got {self.batch} and {self.groups}")

    def __str__(self) -> str:
        groups = f"{self.groups}x" if self.groups > 1 else ""
        rows = f" Q{self.q_len}" if self.q_len > 1 else ""
        size = f"B{self.batch} {self.heads_label} P{groups}{self.prefix}+{self.suffix}{rows}"
        return self.describe(f"{self.VARIANT} {size}")

    @property
    def sequences(self) -> int:
        return self.batch

    @property
    def levels(self) -> tuple[Size, ...]:
        return ((self.groups, self.prefix),)

    @property
    def own_keys(self) -> int:
        return self.suffix

    @property
    def rows_each(self) -> int:
        return self.q_len

    def call(self, inputs: Inputs) -> Call:
        return Call(flashx.shared_prefix_attention, lambda *leaves: leaves, self.options(inputs))


@dataclass(frozen=True, slots=True)
class Tree(Shared):
    """flashx.tree_attention: ``nodes`` of each level and their ``tokens``; the last level's are the sequences."""

    VARIANT: ClassVar[str] = "tree"
    AXES: ClassVar[dict[str, str]] = {"nodes": "sequences"}

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    q_len: int = 1

    def __post_init__(self) -> None:
        Case.__post_init__(self)
        if len(self.nodes) != len(self.tokens) or len(self.nodes) < 2:
            raise ValueError(f"a tree needs as many nodes as tokens, two levels or more, got {self._shape()!r}")
        if any(below % above for above, below in zip(self.nodes, self.nodes[1:], strict=False)):
            raise ValueError(f"the nodes of a level must be a multiple of those above, got {self._shape()!r}")

    def place(self, axis: str) -> float | None:
        return self.sequences

    def _shape(self) -> str:
        return "/".join(",".join(map(str, counts)) for counts in (self.nodes, self.tokens))

    def __str__(self) -> str:
        rows = f" Q{self.q_len}" if self.q_len > 1 else ""
        return self.describe(f"{self.VARIANT} {self._shape()} {self.heads_label}{rows}")

    @property
    def sequences(self) -> int:
        return self.nodes[-1]

    @property
    def levels(self) -> tuple[Size, ...]:
        return tuple(zip(self.nodes[:-1], self.tokens[:-1], strict=True))

    @property
    def own_keys(self) -> int:
        return self.tokens[-1]

    @property
    def rows_each(self) -> int:
        return self.q_len

    def call(self, inputs: Inputs) -> Call:
        batch = torch.arange(self.sequences, device=inputs.device)
        node_of = [batch // (self.sequences // nodes) for nodes, _ in self.levels]

        def bind(query: torch.Tensor, *stores: torch.Tensor) -> tuple[object, ...]:
            *shared, key, value = stores
            levels = list(map(flashx.PrefixLevel, shared[::2], shared[1::2], node_of))
            return query, levels, key, value

        return Call(flashx.tree_attention, bind, self.options(inputs))
