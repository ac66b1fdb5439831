"""PrefixTree: what the sequences of a batch share, found in the page table of their cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .attention import AttentionResult
from .checks import check_int, check_tensor
from .prefix_calls import PrefixLevel, TreeCall, check_integers, check_values, checked_options, last_rows
from .prefix_plan import COPY_LAUNCHES, TREE_LAUNCHES, launch_bytes
from .problem import accumulation_dtype, shape


class PrefixNode(NamedTuple):
    """Pages that several sequences have in common.

    Attributes:
        level: 0 for a root.
        begin: position of the first token.
        pages: indices into the pool, in order.
        sequences: those that share them, ascending.
    """

    level: int
    begin: int
    pages: tuple[int, ...]
    sequences: tuple[int, ...]


class _Gather(NamedTuple):
    """A level's pages, (nodes, longest) padded; and the rest of a PrefixLevel."""

    pages: torch.Tensor
    node_of_sequence: torch.Tensor
    lens: torch.Tensor


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """What the sequences of a batch share, found in the page table of their cache; made by ``from_page_table``.

    It holds page numbers and no keys, so one tree serves all layers. It is a plan: made on the CPU once per composition
    of the batch (a page table on a GPU is copied from there, and waited for), and then used without waiting.

    Attributes:
        nodes: every shared run of pages, parents before children.
        lens: tokens of each sequence.
        shared_lens: of those, the tokens that lie in nodes.
        page_size: tokens of a page.

    Example:
        >>> table = torch.tensor([[7, 3, 0], [7, 3, 1], [7, 5, 2], [4, 6, 8]])
        >>> tree = flashx.PrefixTree.from_page_table(table, torch.tensor([40, 41, 42, 43]), 16, min_tokens=16)
        >>> print(tree)
        PrefixTree: 4 sequences, 2 nodes on 2 levels; 118 tokens read, 166 without sharing
        >>> tree.nodes[1]
        PrefixNode(level=1, begin=16, pages=(3,), sequences=(0, 1))
    """

    nodes: tuple[PrefixNode, ...]
    lens: tuple[int, ...]
    shared_lens: tuple[int, ...]
    page_size: int
    # On the page table's device: of the levels, of the sequences' own pages, and of all their pages.
    _levels: tuple[_Gather, ...] = field(repr=False)
    _own: _Gather = field(repr=False)
    _all: _Gather = field(repr=False)
    _largest_page: int = field(repr=False)

    @classmethod
    def from_page_table(
        cls,
        page_table: torch.Tensor,
        lens: torch.Tensor,
        page_size: int,
        *,
        min_sequences: int = 2,
        min_tokens: int = 64,
    ) -> PrefixTree:
        """Find the maximal runs of leading pages that sequences have in common. Only full pages are shared.

        Rows are sorted, and what neighbours have in common makes the tree, in time linear in the pages but for the
        sort. A run that is too short, or of too few sequences, is left to the longer ones below it, which then hold
        its pages too, and to the sequences' own keys.

        Args:
            page_table: (B, W), integers: page n of sequence b is page_table[b, n] of the pool. Entries past a
                sequence's length are not looked at.
            lens: (B,), integers, tokens of each sequence.
            page_size: tokens of a page.
            min_sequences: >= 2, sequences of a node.
            min_tokens: >= 1, tokens of a node. A level costs a pass over the rows' states, which in decoding weighs as
                much as reading 10 to 20 keys for each sequence, and a launch (see ``prefix_plan.plan``).

        Raises:
            ValueError, TypeError: naming the argument, the rule and the value.
        """
        check_int("page_size", page_size, 1)
        check_int("min_sequences", min_sequences, 2)
        check_int("min_tokens", min_tokens, 1)
        check_tensor("page_table", page_table)
        check_tensor("lens", lens)
        if page_table.dim() != 2:
            raise ValueError(f"page_table must have 2 dimensions (batch, pages), got shape {shape(page_table)}")
        batch, width = page_table.shape
        host = torch.device("cpu")
        held = check_integers("lens", lens.to(host), (batch,), host, (0, width * page_size))
        table = check_integers("page_table", page_table.to(host), (batch, width), host)
        column = torch.arange(width, device=host)
        used = column * page_size < held[:, None]
        check_values("page_table", table[used], 0, 2**31 - 1)
        table = torch.where(used, table, 0)

        # Pages that are not full become numbers that no other sequence has.
        alone = -1 - torch.arange(batch, device=host)[:, None]
        full = torch.where(column < held[:, None] // page_size, table, alone)
        rows = full.tolist()
        order = sorted(range(batch), key=rows.__getitem__)
        full = full[order]
        common = (full[1:] == full[:-1]).to(torch.int64).cumprod(1).sum(1).tolist()

        nodes, pages, depth = [], [0] * batch, [0] * batch
        for length, first, last in _intervals(common):
            members = order[first : last + 1]
            begin, level = pages[members[0]], depth[members[0]]
            if len(members) < min_sequences or (length - begin) * page_size < min_tokens:
                continue
            nodes.append(
                PrefixNode(level, begin * page_size, tuple(rows[members[0]][begin:length]), tuple(sorted(members)))
            )
            for member in members:
                pages[member], depth[member] = length, level + 1

        device = page_table.device
        begins = torch.tensor(pages, dtype=torch.int64, device=host)
        return cls(
            tuple(nodes),
            tuple(held.tolist()),
            tuple(page_size * n for n in pages),
            page_size,
            tuple(_gather_of_level(nodes, level, batch, page_size, device) for level in range(max(depth, default=0))),
            _gather_of_suffixes(table, begins, held - begins * page_size, page_size, device),
            _gather_of_suffixes(table, torch.zeros_like(begins), held, page_size, device),
            int(table.max()) if bool(used.any()) else -1,
        )

    def __str__(self) -> str:
        return (
            f"PrefixTree: {len(self.lens)} sequences, {len(self.nodes)} nodes on {len(self._levels)} levels; "
            f"{self.shared_tokens} tokens read, {self.unshared_tokens} without sharing"
        )

    @property
    def nodes_per_level(self) -> tuple[int, ...]:
        """Number of nodes of each level, root first."""
        return tuple(len(level.pages) for level in self._levels)

    @property
    def unshared_tokens(self) -> int:
        """Tokens whose keys attention reads without the tree."""
        return sum(self.lens)

    @property
    def shared_tokens(self) -> int:
        """Tokens whose keys attention reads with it: of each node once, and what the sequences have alone."""
        in_nodes = self.page_size * sum(len(node.pages) for node in self.nodes)
        return self.unshared_tokens - sum(self.shared_lens) + in_nodes

    def levels(
        self, key_pages: torch.Tensor, value_pages: torch.Tensor
    ) -> tuple[list[PrefixLevel], torch.Tensor, torch.Tensor, torch.Tensor]:
        """The keys as ``tree_attention`` takes them, gathered from the pool: every shared token is copied once.

        Args:
            key_pages: (P, page_size, Hkv, D), on the page table's device.
            value_pages: (P, page_size, Hkv, Dv).

        Returns:
            levels, key (B, Hkv, Ls, D), value (B, Hkv, Ls, Dv), suffix_lens (B,). Differentiable.

        Raises:
            ValueError, TypeError: naming the argument, the rule and the value.

        Example:
            >>> pages = torch.randn(9, 16, 2, 64)
            >>> tree = flashx.PrefixTree.from_page_table(torch.tensor([[7, 3], [7, 5]]), torch.tensor([20, 31]), 16)
            >>> levels, key, value, suffix_lens = tree.levels(pages, pages)
        """
        self._check_pool(key_pages, value_pages)

        def gathered(at: _Gather) -> tuple[torch.Tensor, torch.Tensor]:
            return _gathered(key_pages, at.pages), _gathered(value_pages, at.pages)

        levels = [PrefixLevel(*gathered(level), level.node_of_sequence, level.lens) for level in self._levels]
        return levels, *gathered(self._own), self._own.lens

    def attention(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        *,
        causal: bool = True,
        window: Sequence[int | None] | None = None,
        sink_tokens: int = 0,
        alibi_slopes: torch.Tensor | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> torch.Tensor | AttentionResult:
        """Attention of the last Lq tokens of every sequence to all of it; keys and values lie in a paged pool.

        Either ``tree_attention`` over ``levels``, which copies each key once per call, or, where nothing has a gradient
        and that is less to move, attention to the pages in place, which reads shared ones for every sequence. Over
        several calls on the same pages, gather the levels once instead.

        Args:
            query: (B, Hq, Lq, D).
            key_pages: (P, page_size, Hkv, D), on the page table's device.
            value_pages: (P, page_size, Hkv, Dv).
            causal, window, sink_tokens, alibi_slopes, softcap, sinks, scale, return_lse, backend: as in
                ``flashx.shared_prefix_attention``.

        Returns:
            out (B, Hq, Lq, Dv), or ``AttentionResult(out, lse)``.

        Raises:
            ValueError, TypeError: naming the argument, the rule and the value.
        """
        self._check_pool(key_pages, value_pages)
        key, value = key_pages.transpose(1, 2), value_pages.transpose(1, 2)
        options = checked_options(
            query, key, value, causal, window, None, alibi_slopes, softcap, sinks, scale, backend, sink_tokens
        )
        if query.shape[0] != len(self.lens):
            raise ValueError(f"query must have the tree's batch size {len(self.lens)}, got shape {shape(query)}")
        used = (query, key_pages, value_pages, sinks)
        differentiated = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in used)
        if differentiated or not self._pages_in_place(query, key_pages, value_pages):
            levels, own_key, own_value, own_lens = self.levels(key_pages, value_pages)
            out, lse = TreeCall.checked(query, levels, own_key, own_value, own_lens, options).run()
        else:
            table, sequences = self._all.pages, last_rows(self._all.lens, query.shape[2])
            out, lse = torch.ops.flashx.attention(*options.one_call(query, key, value, sequences, table))
        return AttentionResult(out, lse) if return_lse else out

    def _pages_in_place(self, query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor) -> bool:
        """Whether attention to the pages moves less than gathering levels and attention to them."""
        kv_heads, value_dim = value_pages.shape[2:]
        key_bytes = kv_heads * (key_pages.shape[3] + value_dim) * query.element_size()
        gathered = sum(level.pages.numel() for level in (*self._levels, self._own)) * self.page_size
        states = query.shape[:3].numel() * (value_dim + 2) * accumulation_dtype(query.dtype).itemsize
        carried = 2 * (len(self._levels) + 1) * states if self._levels else 0
        launches = TREE_LAUNCHES * len(self._levels) + COPY_LAUNCHES
        moved = (2 * gathered + self.shared_tokens) * key_bytes + carried
        levels = moved + launches * launch_bytes(query.device.type)
        return self._all.pages.numel() > 0 and self.unshared_tokens * key_bytes <= levels

    def _check_pool(self, key_pages: Any, value_pages: Any) -> None:
        for name, tensor in (("key_pages", key_pages), ("value_pages", value_pages)):
            check_tensor(name, tensor)
            if tensor.dim() != 4 or tensor.shape[1] != self.page_size:
                raise ValueError(
                    f"{name} must have shape (pages, {self.page_size}, heads, dim), got shape {shape(tensor)}"
                )
            if tensor.shape[:3] != key_pages.shape[:3]:
                raise ValueError(f"{name} must have key_pages' shape {shape(key_pages)[:3]}, got {shape(tensor)[:3]}")
            if tensor.device != self._own.lens.device:
                raise ValueError(f"{name} must be on the page table's {self._own.lens.device}, got {tensor.device}")
            if tensor.shape[0] <= self._largest_page:
                raise ValueError(f"{name} must have page {self._largest_page} of the page table, got {tensor.shape[0]}")


def _intervals(common: list[int]) -> list[tuple[int, int, int]]:
    """(length, first, last) of each maximal interval of neighbours that have length > 0 in common; outer ones first.

    ``common``: what neighbours in a sorted list have in common (an LCP array). Abouelhoda et al., "Replacing suffix
    trees with enhanced suffix arrays", algorithm 4.1.
    """
    found, opened = [], [(0, 0)]
    for last, length in enumerate([*common, 0]):
        first = last
        while opened[-1][0] > length:
            inner, first = opened.pop()
            found.append((inner, first, last))
        if opened[-1][0] < length:
            opened.append((length, first))
    return sorted(found, key=lambda interval: (interval[1], interval[0]))


def _gather_of_level(nodes: list[PrefixNode], level: int, batch: int, page_size: int, device: torch.device) -> _Gather:
    here = [node for node in nodes if node.level == level]
    longest = max(len(node.pages) for node in here)
    place = [-1] * batch
    for i, node in enumerate(here):
        for member in node.sequences:
            place[member] = i
    pages = [[*node.pages, *[node.pages[0]] * (longest - len(node.pages))] for node in here]
    lens = [page_size * len(node.pages) for node in here]
    tables = (torch.tensor(table, dtype=torch.int64, device="cpu").to(device) for table in (pages, place, lens))
    return _Gather(*tables)


def _gather_of_suffixes(
    table: torch.Tensor, begin: torch.Tensor, lens: torch.Tensor, page_size: int, device: torch.device
) -> _Gather:
    """What each sequence has from page ``begin`` on."""
    batch, width = table.shape
    longest = max((lens.max().item() + page_size - 1) // page_size, 0) if batch else 0
    column = torch.arange(longest, device="cpu")
    pages = table.gather(1, (begin[:, None] + column).clamp(max=max(width - 1, 0)))
    pages = torch.where(column * page_size < lens[:, None], pages, 0).to(torch.int32)
    return _Gather(pages.to(device), torch.arange(batch, device="cpu").to(device), lens.to(device))


def _gathered(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """(P, page, H, D) -> (n, H, w page, D) for pages (n, w)."""
    return pool[pages].flatten(1, 2).transpose(1, 2)
