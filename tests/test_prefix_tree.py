"""PrefixTree: the nodes of any page table, attention over the pages, and bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tolerance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefixes import Case, naive

from flashx import PrefixTree


@st.composite
def page_tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sequences of a random tree of texts over two pages, so that much is shared; texts of pages are page numbers."""
    batch, width, page = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 16]))
    texts = draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=batch, max_size=batch))
    if draw(st.booleans()):  # a page is a place in the tree, as in a cache; else the same pages come up elsewhere
        numbers: dict[tuple[int, ...], int] = {}
        texts = [[numbers.setdefault(tuple(text[: n + 1]), len(numbers)) for n in range(width)] for text in texts]
    lens = draw(st.lists(st.integers(0, width * page), min_size=batch, max_size=batch))
    return torch.tensor(texts), torch.tensor(lens), page


@settings(max_examples=200, deadline=None, derandomize=True)
@given(page_tables(), st.integers(2, 4), st.sampled_from([0, 0.5, 1, 1.5, 2, 3]))
def test_nodes_of_a_page_table(drawn: Any, min_sequences: int, min_pages: float) -> None:
    table, lens, page = drawn
    min_tokens = max(round(min_pages * page), 1)
    tree = PrefixTree.from_page_table(table, lens, page, min_sequences=min_sequences, min_tokens=min_tokens)
    assert tree.lens == tuple(lens.tolist()) and tree.unshared_tokens == lens.sum()
    full = [row[: int(n) // page] for row, n in zip(table.tolist(), lens, strict=True)]

    # Each sequence is its nodes, root first, and the rest.
    for b, row in enumerate(full):
        own = [node for node in tree.nodes if b in node.sequences]
        assert [node.level for node in own] == list(range(len(own)))
        pages = [number for node in own for number in node.pages]
        assert pages == row[: len(pages)] and tree.shared_lens[b] == page * len(pages)
        assert [node.begin for node in own] == [page * sum(len(o.pages) for o in own[:n]) for n in range(len(own))]

    # A node is maximal, and nothing that could be one is missing: every beginning common to enough sequences is shared
    # by all of them, unless what it would add is too short.
    for node in tree.nodes:
        assert len(node.sequences) >= min_sequences and len(node.pages) * page >= min_tokens
        end = node.begin // page + len(node.pages)
        beginning = full[node.sequences[0]][:end]
        assert node.sequences == tuple(b for b, row in enumerate(full) if row[:end] == beginning)
        assert len({tuple(full[b][: end + 1]) for b in node.sequences}) > 1 or any(
            len(full[b]) == end for b in node.sequences
        )
    for b, row in enumerate(full):
        alike = [n for n in range(len(row) + 1) if sum(other[:n] == row[:n] for other in full) >= min_sequences]
        shared = tree.shared_lens[b] // page
        longest = max(alike, default=0)
        assert shared <= longest and (longest - shared) * page < min_tokens
    assert tree.shared_tokens == sum(len(node.pages) * page for node in tree.nodes) + sum(tree.lens) - sum(
        tree.shared_lens
    )
    assert sum(tree.nodes_per_level) == len(tree.nodes)


def _pool(pages: int, page: int, heads: int = 2, dim: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(pages, page, heads, size, generator=generator) for size in (dim, dim + 1))


def test_tree_by_hand() -> None:
    table = torch.tensor([[7, 3, 0, -1], [7, 3, 0, 5], [7, 5, 2, 2], [4, 6, 8, 9], [7, 3, 1, 0]])
    tree = PrefixTree.from_page_table(table, torch.tensor([40, 64, 42, 43, 48]), 16, min_tokens=16)
    assert [(node.level, node.begin, node.pages, node.sequences) for node in tree.nodes] == [
        (0, 0, (7,), (0, 1, 2, 4)),
        (1, 16, (3,), (0, 1, 4)),  # page 0 of the first sequence is not full
    ]
    assert tree.nodes_per_level == (1, 1) and (tree.unshared_tokens, tree.shared_tokens) == (237, 157)
    assert str(tree) == "PrefixTree: 5 sequences, 2 nodes on 2 levels; 157 tokens read, 237 without sharing"
    longer = PrefixTree.from_page_table(table, torch.tensor([40, 64, 42, 43, 48]), 16, min_tokens=32)
    assert [node.pages for node in longer.nodes] == [(7, 3)] and longer.shared_lens == (32, 32, 0, 0, 32)
    branches = torch.tensor([[7, 3, 0], [7, 3, 0], [7, 3, 1]])  # page 0 would be a node of 16 tokens
    short = PrefixTree.from_page_table(branches, torch.full((3,), 48), 16, min_tokens=32)
    assert [node.pages for node in short.nodes] == [(7, 3)] and short.shared_lens == (32, 32, 32)
    levels, key, _, lens = longer.levels(*_pool(10, 16))
    assert [level.node_of_sequence.tolist() for level in levels] == [[0, 0, -1, -1, 0]]
    assert key.shape == (5, 2, 48, 8) and lens.tolist() == [8, 32, 42, 43, 16]


@pytest.mark.parametrize("in_place", [False, True])
def test_attention_over_pages(in_place: bool, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of PrefixTree.attention equal tree_attention without levels, over everything gathered."""
    device = tolerance.device_of(engine)
    table = torch.tensor([[7, 3, 0, 0], [7, 3, 0, 5], [7, 5, 2, 2], [4, 6, 8, 9], [7, 3, 1, 0], [1, 1, 1, 1]])
    lens = torch.tensor([40, 64, 42, 43, 48, 0])
    tree = PrefixTree.from_page_table(table.to(device), lens.to(device), 16, min_tokens=16)
    monkeypatch.setattr(PrefixTree, "_pages_in_place", lambda *_: in_place)
    case = Case(6, (), 64, tuple(lens.tolist()), q_len=3, kv_heads=2, window=(30, 0), sink_tokens=2, sinks=True)
    case = replace(case, head_dim=8, value_dim=9)
    pools = dict(zip(("key", "value"), _pool(10, 16), strict=True))
    whole = {name: pool[table].flatten(1, 2).transpose(1, 2).contiguous() for name, pool in pools.items()}
    tensors = case.tensors(torch.float32) | whole
    exact = naive(case, tensors, torch.float64)
    shuffle = torch.Generator().manual_seed(0)
    draws = [naive(case, tensors, torch.float32, shuffle) for _ in range(tolerance.DRAWS)]

    def pooled(grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the pool from that of the pages taken from it."""
        pages = grad.transpose(1, 2).unflatten(1, (4, 16))
        return grad.new_zeros(10, *pages.shape[2:]).index_put_((table,), pages, accumulate=True)

    query, sinks = tensors["query"].to(device), tensors["sinks"].to(device)
    pages = [pool.to(device).requires_grad_(not in_place) for pool in pools.values()]
    options: dict[str, Any] = {"window": (30, 0), "sink_tokens": 2, "sinks": sinks, "backend": engine}
    out, lse = tree.attention(query, *pages, **options, return_lse=True)
    found = {"out": out.detach().cpu(), "lse": lse.detach().cpu()}
    if not in_place:
        grad_out, grad_lse = case.above(torch.float32)
        grads = torch.autograd.grad((out, lse), pages, (grad_out.to(device), grad_lse.to(device)))
        found |= {f"grad_{name}": grad.cpu() for name, grad in zip(pools, grads, strict=True)}
        for each in (exact, *draws):
            each |= {name: pooled(each[name]) for name in ("grad_key", "grad_value")}
    for name, actual in found.items():
        error = max(tolerance.error(draw[name], exact[name]) for draw in draws)
        budget = 2 * error + tolerance.ulp(exact[name], torch.float32)
        tolerance.compare(name, actual, exact[name], budget)


def test_pages_in_place_where_that_is_less() -> None:
    """A gathered key is moved three times, so sharing by three is not worth it; without pages there is no place."""
    table = torch.arange(64).expand(64, 64)
    pool = torch.empty(()).expand(64, 16, 8, 128)

    def in_place(batch: int, width: int) -> bool:
        tree = PrefixTree.from_page_table(table[:batch, :width], torch.full((batch,), 16 * width), 16)
        return tree._pages_in_place(torch.empty(batch, 8, 1, 128), pool, pool)

    assert in_place(3, 64) and not in_place(4, 64)
    assert in_place(8, 4)  # launches
    assert not in_place(3, 0) and PrefixTree.from_page_table(table[:0], torch.zeros(0).long(), 16).nodes == ()


TABLE = torch.tensor([[0, 1], [0, 2]])
BAD_TABLES = [
    (dict(page_size=0), ValueError, "page_size must be >= 1, got 0"),
    (dict(page_size=4.0), TypeError, "page_size must be an int, got float"),
    (dict(min_sequences=1), ValueError, "min_sequences must be >= 2, got 1"),
    (dict(min_tokens=0), ValueError, "min_tokens must be >= 1, got 0"),
    (dict(page_table=[[0, 1]]), TypeError, "page_table must be a torch.Tensor, got list"),
    (dict(page_table=TABLE[0]), ValueError, r"page_table must have 2 dimensions .* \(2,\)"),
    (dict(page_table=TABLE.float()), TypeError, "page_table must be of integers"),
    (dict(page_table=TABLE - 1), ValueError, "page_table must be from 0 to .* got -1"),
    (dict(lens=torch.tensor([8])), ValueError, r"lens must have shape \(2,\), got \(1,\)"),
    (dict(lens=torch.tensor([8, 9])), ValueError, "lens must be from 0 to 8, got 9"),
    (dict(lens=None), TypeError, "lens must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize("wrong, error, message", BAD_TABLES)
def test_bad_page_table(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixTree.from_page_table(**{"page_table": TABLE, "lens": torch.tensor([8, 5]), "page_size": 4, **wrong})


@pytest.mark.parametrize(
    "key_pages, value_pages, error, message",
    [
        (None, None, TypeError, "key_pages must be a torch.Tensor"),
        (
            torch.zeros(3, 5, 2, 8),
            torch.zeros(3, 5, 2, 8),
            ValueError,
            r"key_pages must have shape \(pages, 4, .* 5, 2, 8",
        ),
        (torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 1, 8), ValueError, "value_pages must have key_pages' shape"),
        (torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8), ValueError, "key_pages must have page 2 .* got 2"),
        (torch.zeros(3, 4, 2, 8, device="meta"), None, ValueError, "key_pages must be on the page table's cpu"),
    ],
)
def test_bad_pool(key_pages: Any, value_pages: Any, error: type[Exception], message: str) -> None:
    tree = PrefixTree.from_page_table(TABLE, torch.tensor([8, 5]), 4)
    with pytest.raises(error, match=message):
        tree.levels(key_pages, value_pages)
    with pytest.raises(error, match=message):
        tree.attention(torch.zeros(2, 2, 1, 8), key_pages, value_pages)
    with pytest.raises(ValueError, match=r"query must have the tree's batch size 2, got shape \(3, 2, 1, 8\)"):
        tree.attention(torch.zeros(3, 2, 1, 8), torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8))
