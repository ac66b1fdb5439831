"""Cases of sequences with lengths of their own: packed ones, and key-value caches."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

import flashx
from flashx.masks import IntervalMask

from .cases import CAUSAL, FULL, Call, Case, Inputs, Leaves, Size, Window, visible_pairs


@dataclass(frozen=True, slots=True)
class Varlen(Case):
    """flashx.varlen_attention: self-attention of sequences that lie one after the other, (total, H, D)."""

    VARIANT: ClassVar[str] = "varlen"
    AXES: ClassVar[dict[str, str]] = {"lens": "tokens"}

    lens: tuple[int, ...]
    causal: bool = True

    def __str__(self) -> str:
        spread = f"{min(self.lens)}..{max(self.lens)}" if len(set(self.lens)) > 1 else f"{self.lens[0]}"
        size = f"{self.VARIANT} B{len(self.lens)} {self.heads_label} N{spread} ({sum(self.lens)} tokens)"
        return self.describe(size, "causal" if self.causal else "full")

    @property
    def sequences(self) -> int:
        return len(self.lens)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        total = sum(self.lens)
        return {
            "query": (total, self.q_heads, self.head_dim),
            "key": (total, self.kv_heads, self.head_dim),
            "value": (total, self.kv_heads, self.value_dim),
        }

    def place(self, axis: str) -> float | None:
        return sum(self.lens)

    def ends(self, device: torch.device) -> torch.Tensor:
        """cu_seqlens: 0, then where each sequence ends."""
        return torch.tensor([0, *itertools.accumulate(self.lens)], dtype=torch.int32, device=device)

    def call(self, inputs: Inputs) -> Call:
        ends, longest = self.ends(inputs.device), max(self.lens)
        options = {"causal": self.causal, **self.options(inputs)}
        return Call(flashx.varlen_attention, lambda *leaves: (*leaves, ends, ends, longest, longest), options)

    def lengths(self, sequence: int) -> Size:
        return self.lens[sequence], self.lens[sequence]

    def pairs(self) -> int:
        return sum(length * (length + 1) // 2 if self.causal else length * length for length in self.lens)

    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        mask = IntervalMask(right=0 if self.causal else None, shift=rows.start)
        return mask.dense(len(rows), self.lens[sequence], device)

    def mask(self, device: torch.device) -> Window | torch.Tensor:
        # Padding is on the right, where causal rows do not look.
        if self.causal:
            return CAUSAL
        lens = torch.tensor(self.lens, device=device)
        return (torch.arange(max(self.lens), device=device) < lens[:, None])[:, None, None]

    def rows(self, tensor: torch.Tensor, sequence: int | None = None) -> torch.Tensor:
        if sequence is None:
            return tensor[_padded(self.lens, tensor.device)].transpose(1, 2)
        start = sum(self.lens[:sequence])
        return tensor[start : start + self.lens[sequence]].transpose(0, 1)[None]

    def unrows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)[_unpadded(self.lens, tensor.device)]

    def keys(self, leaves: Leaves, sequence: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows(leaves["key"], sequence), self.rows(leaves["value"], sequence)


@functools.lru_cache(maxsize=8)
def _padded(lens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(B, longest): the row of each position; that of padding is the sequence's last."""
    sizes = torch.tensor(lens)
    place = torch.minimum(torch.arange(max(lens)), sizes[:, None] - 1)
    return (place + (sizes.cumsum(0) - sizes)[:, None]).to(device)


@functools.lru_cache(maxsize=8)
def _unpadded(lens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(total,): where each row is in a padded batch."""
    longest = max(lens)
    return torch.cat([torch.arange(length) + b * longest for b, length in enumerate(lens)]).to(device)


@dataclass(frozen=True, slots=True)
class Decode(Case):
    """flashx.decode_attention: the last ``q_len`` positions of each sequence over its cache, ``lens`` keys each.

    ``page``: keys of a page, in an order drawn at random; 0 is a contiguous cache. ``window``: keys seen to the left,
    beside the first ``sink_tokens``; None is all.
    """

    VARIANT: ClassVar[str] = "decode"
    AXES: ClassVar[dict[str, str]] = {"lens": "keys in the cache", "page": "page", "window": "window"}
    FORWARD_ONLY: ClassVar[bool] = True

    lens: tuple[int, ...]
    q_len: int = 1
    page: int = 0
    window: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        Case.__post_init__(self)
        if min(self.lens) < self.q_len:
            raise ValueError(f"a cache must hold its queries, got {min(self.lens)} keys and {self.q_len} queries")

    def __str__(self) -> str:
        spread = f"{min(self.lens)}..{max(self.lens)}" if len(set(self.lens)) > 1 else f"{self.lens[0]}"
        rows = f" Q{self.q_len}" if self.q_len > 1 else ""
        return self.describe(
            f"{self.VARIANT} B{len(self.lens)} {self.heads_label} N{spread}{rows}",
            f"page {self.page}" if self.page else "",
            f"window {self.window}" if self.window is not None else "",
            f"{self.sink_tokens} sink tokens" if self.sink_tokens else "",
        )

    @property
    def sequences(self) -> int:
        return len(self.lens)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        store = (len(self.lens), self.kv_heads, max(self.lens))
        if self.page:
            store = (int(self.pages().max()) + 1, self.page, self.kv_heads)
        return {
            "query": (len(self.lens), self.q_heads, self.q_len, self.head_dim),
            "key": (*store, self.head_dim),
            "value": (*store, self.value_dim),
        }

    def place(self, axis: str) -> float | None:
        return {"lens": max(self.lens), "page": self.page, "window": self.window}[axis]

    def head_axis(self, name: str) -> int:
        return 2 if self.page and name != "query" else 1

    def pages(self) -> torch.Tensor:
        """(B, pages of the longest) int32, the page table; entries that nothing needs are 0."""
        return _drawn_pages(self.lens, self.page)

    def call(self, inputs: Inputs) -> Call:
        _, key, value = inputs.leaves.values()
        lens = torch.tensor(self.lens, dtype=torch.int32, device=inputs.device)
        cache: flashx.KVCache | flashx.PagedKVCache
        if self.page:
            cache = flashx.PagedKVCache(key, value, self.pages().to(inputs.device), lens)
        else:
            cache = flashx.KVCache(key, value, lens)
        window = None if self.window is None else (self.window, 0)
        options = {"window": window, "sink_tokens": self.sink_tokens, **self.options(inputs)}
        return Call(flashx.decode_attention, lambda query, *_: (query, cache), options)

    def interval(self, sequence: int) -> IntervalMask:
        """The keys that each row of a sequence sees."""
        return IntervalMask(self.window, 0, self.lens[sequence] - self.q_len, self.sink_tokens)

    def lengths(self, sequence: int) -> Size:
        return self.q_len, self.lens[sequence]

    def pairs(self) -> int:
        return sum(visible_pairs(self.interval(b), self.q_len, length) for b, length in enumerate(self.lens))

    def visible(self, sequence: int, rows: range, device: torch.device) -> torch.Tensor:
        mask = self.interval(sequence)
        moved = IntervalMask(mask.left, mask.right, mask.shift + rows.start, mask.first)
        return moved.dense(len(rows), self.lens[sequence], device)

    def mask(self, device: torch.device) -> Window | torch.Tensor:
        if self.q_len == 1 and len(set(self.lens)) == 1 and self.window is None:
            return FULL
        longest = max(self.lens)
        return torch.stack([self.interval(b).dense(self.q_len, longest, device) for b in range(len(self.lens))])[
            :, None
        ]

    def keys(self, leaves: Leaves, sequence: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (self._contiguous(leaves[name], sequence) for name in ("key", "value"))
        return key, value

    def _contiguous(self, store: torch.Tensor, sequence: int | None) -> torch.Tensor:
        """(B, Hkv, longest, D), or (1, Hkv, its keys, D)."""
        if self.page:
            pages = self.pages() if sequence is None else self.pages()[sequence : sequence + 1]
            store = store[pages.to(store.device).long()].flatten(1, 2).transpose(1, 2)
        elif sequence is not None:
            store = store[sequence : sequence + 1]
        return store[:, :, : max(self.lens) if sequence is None else self.lens[sequence]]

    def elements(self) -> int:
        """Of the cache only the keys that some row sees."""
        seen = 0
        for b, length in enumerate(self.lens):
            low = self.interval(b).lo(0, length)
            seen += length - low + min(low, self.sink_tokens)
        rows = len(self.lens) * self.q_heads * self.q_len
        return (rows + seen * self.kv_heads) * (self.head_dim + self.value_dim)


@functools.lru_cache(maxsize=16)
def _drawn_pages(lens: tuple[int, ...], page: int) -> torch.Tensor:
    counts = [-(-length // page) for length in lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    start = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[start : start + count]
        start += count
    return table
