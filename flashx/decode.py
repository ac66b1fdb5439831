"""Decoding: attention of the newest positions over a KV cache, and the two caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from . import ops, quick
from .attention import EXPLAINERS, AttentionResult, Explanation, _number, explain_problem, operator_arguments
from .checks import check_tensor, on_host
from .problem import DTYPES, SEQUENCE_FIELDS, check_finite, shape
from .varlen import with_sequences

# A sequence's number of queries in the table: kernels clamp it to query's length, so one table serves every length.
_ALL_ROWS = 2**31 - 1


class _Cache(ABC):
    """What the caches share: lens, the table that kernels read it from, and writing at each sequence's end."""

    # key and value so that two indices choose a row: (entries, rows, Hkv, D or Dv).
    _key_rows: torch.Tensor
    _value_rows: torch.Tensor

    def __init__(
        self, key_rows: torch.Tensor, value_rows: torch.Tensor, lens: torch.Tensor | None, batch: int, capacity: int
    ) -> None:
        self._key_rows, self._value_rows, self._capacity = key_rows, value_rows, capacity
        # k_len is lens itself, shift is written by each call.
        self._table = torch.zeros(batch, len(SEQUENCE_FIELDS), dtype=torch.int32, device=key_rows.device)
        self._table[:, 1] = _ALL_ROWS
        self._lens, self._shift = self._table[:, 3], self._table[:, 4]
        self._sequence = torch.arange(batch, device=key_rows.device)[:, None]
        self._token = object()  # what calls over this cache are kept under
        if lens is not None:
            self.lens = lens

    @property
    def lens(self) -> torch.Tensor:
        """(B,) int32: number of keys of each sequence. The cache's own; may be changed in place or assigned."""
        return self._lens

    @lens.setter
    def lens(self, lens: torch.Tensor) -> None:
        if lens is self._lens:  # what `cache.lens -= 1` ends with
            return
        if not isinstance(lens, torch.Tensor):
            raise TypeError(f"lens must be a torch.Tensor, got {type(lens).__name__}")
        if lens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lens must be int32 or int64, got {lens.dtype}")
        if lens.shape != self._lens.shape:
            raise ValueError(f"lens must have shape {shape(self._lens)}, got {shape(lens)}")
        if lens.device != self._lens.device:
            raise ValueError(f"lens must be on the cache's device {self._lens.device}, got {lens.device}")
        if on_host(lens):
            self._check_lens(lens.tolist())
        self._lens.copy_(lens)

    @property
    def capacity(self) -> int:
        """Keys that a sequence has room for."""
        return self._capacity

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes n more keys and values at the end of each sequence, and adds n to lens.

        Nothing waits for a GPU. There, keys beyond the capacity, or whose page does not exist, are dropped, and lens
        stops at the capacity; on the CPU that is an error, raised before anything is written.

        Args:
            key: (B, Hkv, n, D), the cache's dtype.
            value: (B, Hkv, n, Dv).

        Raises:
            ValueError, TypeError: naming the argument, the rule and the value.
        """
        self._check_new(key, value)
        batch, _, count, _ = key.shape
        if batch * count == 0:
            return
        positions = self._lens[:, None] + torch.arange(count, device=self._lens.device)
        if on_host(self._lens):
            self._check_room(count)
            where, news = self._where(positions), [key.transpose(1, 2), value.transpose(1, 2)]
            self._check_entries(where[0])
        elif self._capacity == 0:
            return
        else:
            where, news = self._without_dropped(positions, key, value)
        for rows, new in zip((self._key_rows, self._value_rows), news, strict=True):
            rows.index_put_(where, new)
        self._lens.add_(count).clamp_(max=self._capacity)

    def _without_dropped(
        self, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
        """Where to write what. A key that is dropped becomes one more copy of the first one that is not.

        Where all are dropped, what lies in the place of the first one is written back to it.
        """
        entries = self._key_rows.shape[0]
        inside = (positions >= 0) & (positions < self._capacity)
        entry, row = (index.flatten() for index in self._where(positions.clamp(0, self._capacity - 1)))
        kept = inside.flatten() & (entry >= 0) & (entry < entries)
        source = torch.where(kept, torch.arange(len(kept), device=kept.device), kept.int().argmax())
        where = entry.clamp(0, entries - 1)[source], row[source]
        news = []
        for store, tensor in ((self._key_rows, key), (self._value_rows, value)):
            new = tensor.transpose(1, 2).flatten(0, 1)[source]
            news.append(torch.where(kept.any(), new, store[where]))
        return where, news

    def _check_new(self, key: Any, value: Any) -> None:
        for name, tensor, store in (("key", key, self._key_rows), ("value", value, self._value_rows)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype != store.dtype:
                raise TypeError(f"{name} must have the cache's dtype {store.dtype}, got {tensor.dtype}")
            if tensor.device != store.device:
                raise ValueError(f"{name} must be on the cache's device {store.device}, got {tensor.device}")
            want = (len(self._lens), store.shape[2], store.shape[3])
            if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != want:
                raise ValueError(
                    f"{name} must have shape ({want[0]}, {want[1]}, number of keys, {want[2]}), got {shape(tensor)}"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} must not require a gradient (a cache has none), got requires_grad=True")
        if value.shape[2] != key.shape[2]:
            raise ValueError(f"value must have key's length {key.shape[2]}, got shape {shape(value)}")

    def _check_lens(self, lens: list[int]) -> None:
        for b, length in enumerate(lens):
            if not 0 <= length <= self._capacity:
                raise ValueError(f"lens must be from 0 to the capacity {self._capacity}, got {length} (sequence {b})")

    def _check_room(self, count: int) -> None:
        lens = self._lens.tolist()
        self._check_lens(lens)
        for b, length in enumerate(lens):
            if length + count > self._capacity:
                raise ValueError(
                    f"key must fit into the cache, of capacity {self._capacity}, got {count} more keys for sequence "
                    f"{b}, which has {length}"
                )

    def _check(self) -> None:
        """Looks at every value that kernels read, if they are on the CPU."""
        if on_host(self._lens):
            self._check_lens(self._lens.tolist())

    def _sequences(self, q_len: int) -> torch.Tensor:
        """The table of a call with q_len queries, the last positions of each sequence."""
        self._shift.copy_(self._lens - q_len)
        return self._table

    @abstractmethod
    def _views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """key, value and page_table as the operator takes them."""

    @abstractmethod
    def _where(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry and row of _key_rows that positions (B, n) lie in."""

    def _check_entries(self, entry: torch.Tensor) -> None:
        """That the entries (B, n) of _key_rows exist."""
        return


class KVCache(_Cache):
    """Keys and values of B sequences, each with room for Lmax of them.

    Args:
        key: (B, Hkv, Lmax, D); written in place. Any strides, the last dimension contiguous.
        value: (B, Hkv, Lmax, Dv).
        lens: (B,) int32 or int64, how many of the keys there are; copied. None: no keys yet. What lies beyond is never
            read.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> cache = flashx.KVCache(torch.zeros(2, 8, 1024, 64), torch.zeros(2, 8, 1024, 64))
        >>> cache.append(torch.randn(2, 8, 5, 64), torch.randn(2, 8, 5, 64))
        >>> cache.lens
        tensor([5, 5], dtype=torch.int32)
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, lens: torch.Tensor | None = None) -> None:
        _check_stores(("key", key), ("value", value), "batch, heads, capacity, dim")
        self._key, self._value = key, value
        super().__init__(key.transpose(1, 2), value.transpose(1, 2), lens, key.shape[0], key.shape[2])

    @property
    def key(self) -> torch.Tensor:
        """(B, Hkv, Lmax, D)."""
        return self._key

    @property
    def value(self) -> torch.Tensor:
        """(B, Hkv, Lmax, Dv)."""
        return self._value

    def _views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self._key, self._value, None

    def _where(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._sequence.expand_as(positions), positions


class PagedKVCache(_Cache):
    """Keys and values of B sequences in pages that a table hands out (Kwon et al., "PagedAttention", section 4).

    Key i of sequence b is row ``i % page`` of page ``page_table[b, i // page]``. Pages are the caller's to manage:
    page_table may be changed in place between calls, and sequences may share pages that neither of them appends to.
    Entries beyond what lens needs may hold anything.

    Args:
        key_pages: (P, page, Hkv, D); written in place. page is at least 1. Any strides, the last dimension contiguous.
        value_pages: (P, page, Hkv, Dv).
        page_table: (B, W) int32, contiguous: room for ``W * page`` keys of a sequence. Kept, not copied.
        lens: (B,) int32 or int64, how many keys there are; copied. None: no keys yet.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Example:
        >>> pages = torch.zeros(10, 16, 8, 64)
        >>> table = torch.tensor([[7, 2], [0, 5]], dtype=torch.int32)
        >>> cache = flashx.PagedKVCache(pages, pages.clone(), table)
        >>> cache.append(torch.randn(2, 8, 20, 64), torch.randn(2, 8, 20, 64))
        >>> flashx.decode_attention(torch.randn(2, 32, 1, 64), cache).shape
        torch.Size([2, 32, 1, 64])
    """

    def __init__(
        self,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        page_table: torch.Tensor,
        lens: torch.Tensor | None = None,
    ) -> None:
        _check_stores(("key_pages", key_pages), ("value_pages", value_pages), "pages, page, heads, dim")
        if key_pages.shape[0] < 1 or key_pages.shape[1] < 1:
            raise ValueError(f"key_pages must have at least one page of at least one key, got {shape(key_pages)}")
        if not isinstance(page_table, torch.Tensor):
            raise TypeError(f"page_table must be a torch.Tensor, got {type(page_table).__name__}")
        if page_table.dtype != torch.int32:
            raise TypeError(f"page_table must be int32, got {page_table.dtype}")
        if page_table.dim() != 2 or page_table.shape[1] < 1 or not page_table.is_contiguous():
            raise ValueError(
                f"page_table must be contiguous and have shape (batch, at least 1), got {shape(page_table)}"
            )
        if page_table.device != key_pages.device:
            raise ValueError(f"page_table must be on key_pages' device {key_pages.device}, got {page_table.device}")
        batch, width = page_table.shape
        super().__init__(key_pages, value_pages, lens, batch, width * key_pages.shape[1])
        self._page_table = page_table
        self._first_key = key_pages.shape[1] * torch.arange(width, device=page_table.device)  # of each page
        self._check()

    @property
    def key_pages(self) -> torch.Tensor:
        """(P, page, Hkv, D)."""
        return self._key_rows

    @property
    def value_pages(self) -> torch.Tensor:
        """(P, page, Hkv, Dv)."""
        return self._value_rows

    @property
    def page_table(self) -> torch.Tensor:
        """(B, W) int32."""
        return self._page_table

    def _check(self) -> None:
        super()._check()
        if on_host(self._page_table):
            self._check_entries(torch.where(self._first_key < self._lens[:, None], self._page_table, 0))

    def _views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self._key_rows.transpose(1, 2), self._value_rows.transpose(1, 2), self._page_table

    def _where(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        page = self._key_rows.shape[1]
        return self._page_table.gather(1, positions // page).long(), positions % page

    def _check_entries(self, entry: torch.Tensor) -> None:
        pages = self._key_rows.shape[0]
        low, high = (int(limit) for limit in entry.aminmax()) if entry.numel() else (0, 0)
        if low < 0 or high >= pages:
            b = int(((entry < 0) | (entry >= pages)).any(1).nonzero()[0])
            page = low if low < 0 else high
            raise ValueError(f"page_table must hold pages from 0 to {pages - 1}, got {page} (sequence {b})")


@overload
def decode_attention(
    query: torch.Tensor,
    cache: KVCache | PagedKVCache,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    unified_max: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def decode_attention(
    query: torch.Tensor,
    cache: KVCache | PagedKVCache,
    *,
    causal: bool = ...,
    window: Sequence[int | None] | None = ...,
    sink_tokens: int = ...,
    alibi_slopes: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    unified_max: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> AttentionResult: ...


def decode_attention(
    query: torch.Tensor,
    cache: KVCache | PagedKVCache,
    *,
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    unified_max: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | AttentionResult:
    """Attention of the last Lq positions of each sequence over all of its keys in the cache.

    Query i of sequence b stands at position ``lens[b] - Lq + i``: append the new keys first. Where queries are few and
    keys many, the keys are cut at fixed positions, the parts run in parallel, and their results are merged in order
    (split-KV; Dao et al., "Flash-Decoding for long-context inference"): a sequence's bits depend neither on the rest of
    the batch nor on how its keys are stored. There is no derivative. On a GPU nothing waits for lens and page table:
    what they hold is clamped to what there is, not checked.

    Args:
        query: (B, Hq, Lq, D), Lq at least 1 (more in speculative decoding), the cache's dtype. Query heads that share
            a key head read each key once.
        cache: ``flashx.KVCache`` or ``flashx.PagedKVCache``; Hq must be a multiple of its heads.
        causal: a query sees keys up to its own position; False: all keys.
        window: (left, right): the query at position p sees keys ``[p - left, p + right]``; ints >= 0, None is
            unbounded.
        sink_tokens: the first keys stay visible however far the window is (still causal).
        alibi_slopes: (Hq,) or (B, Hq), floating.
        softcap: c > 0 gives ``c * tanh(x / c)``; 0 switches it off.
        sinks: (Hq,), floating: one more logit per head, with a zero value.
        scale: factor on ``query . key``; default ``1 / sqrt(D)``.
        unified_max: a logit, in natural units, that most rows' largest logits are near to. Softmax weights are then
            relative to it, and no partial result is rescaled; rows whose sums show that it does not fit are computed
            again, with their own maximum (Hong et al., "FlashDecoding++", section 3). None: always their own.
        return_lse: also return the log-sum-exp.
        backend: as in ``flashx.attention``.

    Returns:
        out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``, lse (B, Hq, Lq). A row that sees no key has out 0, lse
        -inf (the sink logit, if there are sinks).

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value. UnsupportedError if no backend, or not the
            one asked for, can run the problem.

    Example:
        >>> cache = flashx.KVCache(torch.zeros(2, 8, 1024, 64), torch.zeros(2, 8, 1024, 64))
        >>> query, key, value = torch.randn(2, 32, 1, 64), torch.randn(2, 8, 1, 64), torch.randn(2, 8, 1, 64)
        >>> cache.append(key, value)
        >>> flashx.decode_attention(query, cache).shape
        torch.Size([2, 32, 1, 64])
    """
    repeated = None
    if (
        alibi_slopes is None and sinks is None and not return_lse
        and type(sink_tokens) is int and (unified_max is None or type(unified_max) is float)
        and (options := quick.options_of("decode", causal, window, softcap, scale, backend, sink_tokens, unified_max))
    ):  # fmt: skip
        _check_query(query, cache, sinks)
        key, value, _ = cache._views()
        repeated = quick.key_of((options, cache._token), query, key, value)
        if repeated is not None and quick.is_kept(repeated):
            cache._check()
            cache._sequences(query.shape[2])
            known = quick.run(repeated, query, key, value)
            if known is not None:
                return known
    arguments = _arguments(
        query, cache, causal=causal, window=window, sink_tokens=sink_tokens, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, scale=scale, unified_max=unified_max, backend=backend,
    )  # fmt: skip
    out, lse = torch.ops.flashx.attention(*arguments)
    if repeated is not None and quick.came_before(repeated, query, out):
        problem, inputs, chosen = ops.described(arguments)
        quick.keep(repeated, [(problem, inputs)], chosen, (query, key, value), out)
    return AttentionResult(out, lse) if return_lse else out


def _arguments(
    query: torch.Tensor,
    cache: KVCache | PagedKVCache,
    *,
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    sink_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    unified_max: float | None = None,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The operator's arguments."""
    _check_query(query, cache, sinks)
    if unified_max is not None:
        unified_max = _number("unified_max", unified_max)
        check_finite("unified_max", unified_max)
    cache._check()
    key, value, page_table = cache._views()
    arguments = operator_arguments(
        query, key, value, causal, window, None, None, alibi_slopes, softcap, sinks, 0.0, scale, backend,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    return with_sequences(arguments, cache._sequences(query.shape[2]), page_table, unified_max=unified_max)


def _explain(*arguments: Any, return_lse: bool = False, **options: Any) -> Explanation:
    return explain_problem(ops.describe(_arguments(*arguments, **options)), options.get("backend"))


EXPLAINERS[decode_attention] = _explain


def _check_query(query: Any, cache: Any, sinks: Any) -> None:
    if not isinstance(cache, _Cache):
        raise TypeError(f"cache must be a flashx.KVCache or a flashx.PagedKVCache, got {type(cache).__name__}")
    if not isinstance(query, torch.Tensor):
        raise TypeError(f"query must be a torch.Tensor, got {type(query).__name__}")
    rows = cache._key_rows
    if query.dim() != 4 or query.shape[2] < 1:
        raise ValueError(f"query must have shape (batch, heads, at least 1, dim), got {shape(query)}")
    if query.shape[0] != len(cache.lens):
        raise ValueError(f"query must have the cache's batch size {len(cache.lens)}, got shape {shape(query)}")
    if query.shape[3] != rows.shape[3]:
        raise ValueError(f"query must have the cache's head dim {rows.shape[3]}, got shape {shape(query)}")
    if query.dtype != rows.dtype:
        raise TypeError(f"query must have the cache's dtype {rows.dtype}, got {query.dtype}")
    if query.device != rows.device:
        raise ValueError(f"query must be on the cache's device {rows.device}, got {query.device}")
    if torch.is_grad_enabled():
        for name, tensor in (("query", query), ("sinks", sinks)):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient, since decode_attention has none (use torch.no_grad), "
                    "got requires_grad=True"
                )


def _check_stores(keys: tuple[str, Any], values: tuple[str, Any], layout: str) -> None:
    """A cache's keys and values, by name."""
    for name, tensor in (keys, values):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions ({layout}), got shape {shape(tensor)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient (a cache has none), got requires_grad=True")
    (name, key), (other, value) = keys, values
    if value.dtype != key.dtype:
        raise TypeError(f"{other} must have {name}'s dtype {key.dtype}, got {value.dtype}")
    if value.device != key.device:
        raise ValueError(f"{other} must be on {name}'s device {key.device}, got {value.device}")
    if shape(value)[:3] != shape(key)[:3]:
        raise ValueError(
            f"{other} must have {name}'s shape {shape(key)} but for the last dimension, got {shape(value)}"
        )
