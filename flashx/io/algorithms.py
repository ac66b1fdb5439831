"""Bytes moved by attention's algorithms as their papers describe them, exactly, for an ideal fast memory.

Matrix products read each operand once: what their tiles read again is what caches are for. csrc/cuda's own kernels,
with everything that they ask for, are in kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..block_mask import BlockMask
from ..masks import IntervalMask
from ..problem import Problem
from .calls import Tables, interval_pairs, visible_pairs
from .cost import Cost, Kernel, Tally
from .tiles import Strip, ceil_div, strips

Direction = Literal["fwd", "bwd", "both"]
STATISTIC = 4  # bytes of a row's max, sum, lse or delta


def compulsory(problem: Problem, direction: Direction = "fwd", tables: Tables | None = None) -> Cost:
    """What no algorithm can do without: inputs read once, results written once, products of visible pairs alone.

    Forward: Q, K, V; O. Backward: those, O's gradient and O; dQ, dK, dV. lse is counted as a result of the forward.
    """
    _check_direction(direction)
    sizes, pairs = _bytes(problem), visible_pairs(problem, tables)
    rows = problem.batch * problem.q_heads * problem.q_len * STATISTIC
    per_pair, costs = 2 * (problem.head_dim + problem.value_dim), Cost()
    if direction != "bwd":
        moved = {name: (sizes[name], 0) for name in ("query", "key", "value")}
        moved |= {"out": (0, sizes["out"]), "lse": (0, rows)}
        costs += Cost((Kernel("forward", moved, pairs * per_pair, pairs),))
    if direction != "fwd":
        moved = {name: (sizes[name], 0) for name in ("query", "key", "value", "out")}
        moved |= {"grad_out": (sizes["out"], 0), "lse": (rows, 0)}
        moved |= {f"grad_{name}": (0, sizes[name]) for name in ("query", "key", "value")}
        costs += Cost((Kernel("backward", moved, pairs * per_pair * 5 // 2, pairs),))
    return costs


def standard(
    problem: Problem,
    direction: Direction = "fwd",
    *,
    dropout: bool = False,
    mask_passes: int = 0,
    score_bytes: int | None = None,
) -> Cost:
    """Standard attention: S and P in slow memory, a kernel for each step.

    Forward: S = Q K^T; P = softmax(S); O = P V. Backward, from P: dV = P^T dO; dP = dO V^T; dS; dQ = dS K; dK = dS^T Q.
    Nothing is skipped, whatever the mask hides. (Dao et al., "FlashAttention", algorithms 0 and 3.)

    Args:
        problem: ``flashx.io.problem(...)``.
        direction: "fwd", "bwd" or "both".
        dropout: a kernel reads P, writes it again and a byte for each element that says what was dropped; its backward
            reads dP and that byte, and writes dP.
        mask_passes: elementwise kernels before the softmax (scale, mask), each reading and writing S; additive ones,
            which have no backward.
        score_bytes: of an element of S and P; the problem's, if None.

    Returns:
        Cost. Every step is a kernel; ``traffic`` names "scores" what is N x N.

    Example:
        >>> flashx.io.standard(flashx.io.problem(1024, heads=16, batch=64), "both").bytes
    """
    _check_direction(direction)
    sizes, heads = _bytes(problem), problem.batch * problem.q_heads
    pairs = heads * problem.q_len * problem.k_len
    scores = pairs * (problem.dtype.itemsize if score_bytes is None else score_bytes)
    of_key, of_value = 2 * pairs * problem.head_dim, 2 * pairs * problem.value_dim

    def step(name: str, read: dict[str, int], written: dict[str, int], flops: int = 0, exps: int = 0) -> Cost:
        tally = Tally()
        for tensor, count in read.items():
            tally.read(tensor, count)
        for tensor, count in written.items():
            tally.write(tensor, count)
        return Cost((Kernel(name, tally.traffic(), flops, exps),))

    query, key, value, out = (sizes[name] for name in ("query", "key", "value", "out"))
    cost = Cost()
    if direction != "bwd":
        cost += step("S = Q K^T", {"query": query, "key": key}, {"scores": scores}, of_key)
        for _ in range(mask_passes):
            cost += step("mask", {"scores": scores}, {"scores": scores})
        cost += step("softmax", {"scores": scores}, {"scores": scores}, exps=pairs)
        if dropout:
            cost += step("dropout", {"scores": scores}, {"scores": scores, "kept": pairs})
        cost += step("O = P V", {"scores": scores, "value": value}, {"out": out}, of_value)
    if direction != "fwd":
        cost += step("dV = P^T dO", {"scores": scores, "grad_out": out}, {"grad_value": value}, of_value)
        cost += step("dP = dO V^T", {"grad_out": out, "value": value}, {"scores": scores}, of_value)
        if dropout:
            cost += step("dropout, backward", {"scores": scores, "kept": pairs}, {"scores": scores})
        cost += step("softmax, backward", {"scores": 2 * scores}, {"scores": scores})
        cost += step("dQ = dS K", {"scores": scores, "key": key}, {"grad_query": query}, of_key)
        cost += step("dK = dS^T Q", {"scores": scores, "query": query}, {"grad_key": key}, of_key)
    return cost


def flash_attention_blocks(head_dim: int, fast_elements: int) -> tuple[int, int]:
    """FlashAttention's block sizes (query rows, keys) for a fast memory of so many elements.

    ``ceil(M / 4 d)`` keys and ``min(ceil(M / 4 d), d)`` rows (Dao et al., "FlashAttention", algorithm 1, line 1).

    Raises:
        ValueError: sizes below 1.
    """
    for name, size in (("head_dim", head_dim), ("fast_elements", fast_elements)):
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    keys = ceil_div(fast_elements, 4 * head_dim)
    return min(keys, head_dim), keys


def flash_attention(
    problem: Problem,
    direction: Direction = "fwd",
    *,
    fast_bytes: int | None = None,
    blocks: tuple[int, int] | None = None,
) -> Cost:
    """FlashAttention: keys and values in the outer loop, queries in the inner one.

    Forward: each block of K and V is read once; for it Q is read, O, l and m are read and written. Backward: dK and dV
    stay with their block; for it Q, dO, lse and delta are read, dQ is read and written, after a pass over O and dO that
    makes delta. What the first block would read of O, l, m and dQ is 0, and is not read. Query rows that a mask hides
    from a whole block are skipped. (Dao et al., "FlashAttention", algorithms 1 and 4; delta as in its implementation.)

    Args:
        fast_bytes: size of the fast memory, from which the blocks follow.
        blocks: or (query rows, keys) themselves.

    Raises:
        ValueError: neither or both of fast_bytes and blocks, or a size below 1.
    """
    _check_direction(direction)
    rows, keys = _blocks(problem, fast_bytes, blocks)
    sizes, element, cost = _bytes(problem), problem.dtype.itemsize, Cost()
    strip, heads = _one_head(problem)
    passes, first, scores = 0, 0, 0  # rows that blocks of keys visit; those that they visit first
    seen = 0
    for k_begin in range(0, problem.k_len, keys):
        k_end = min(k_begin + keys, problem.k_len)
        span = strip.rows_of(k_begin, k_end)
        low, high = span.start // rows * rows, min(ceil_div(span.stop, rows) * rows, problem.q_len)
        passes += max(high - low, 0)
        scores += max(high - low, 0) * (k_end - k_begin)
        # Rows only ever join at the bottom: both limits of a mask grow with the row.
        first += max(high - max(low, seen), 0)
        seen = max(seen, high)
    again = passes - first
    q_row, o_row = problem.head_dim * element, problem.value_dim * element
    products = 2 * scores * heads * (problem.head_dim + problem.value_dim)
    if direction != "bwd":
        moved = {
            "query": (passes * heads * q_row, 0),
            "key": (_per_head(sizes["key"], problem), 0),
            "value": (_per_head(sizes["value"], problem), 0),
            "out": (again * heads * o_row, passes * heads * o_row),
            "statistics": (again * heads * 2 * STATISTIC, passes * heads * 2 * STATISTIC),
        }
        cost += Cost((Kernel("forward", moved, products, scores * heads),))
    if direction != "fwd":
        lines = heads * problem.q_len
        delta = {"out": (sizes["out"], 0), "grad_out": (sizes["out"], 0), "delta": (0, lines * STATISTIC)}
        moved = {
            "query": (passes * heads * q_row, 0),
            "grad_out": (passes * heads * o_row, 0),
            "lse": (passes * heads * STATISTIC, 0),
            "delta": (passes * heads * STATISTIC, 0),
            "key": (_per_head(sizes["key"], problem), 0),
            "value": (_per_head(sizes["value"], problem), 0),
            "grad_query": (again * heads * q_row, passes * heads * q_row),
            "grad_key": (0, _per_head(sizes["key"], problem)),
            "grad_value": (0, _per_head(sizes["value"], problem)),
        }
        cost += Cost((Kernel("delta", delta), Kernel("backward", moved, products * 5 // 2, scores * heads)))
    return cost


def flash_attention2(problem: Problem, direction: Direction = "fwd", *, blocks: tuple[int, int] = (128, 64)) -> Cost:
    """FlashAttention-2: queries in the outer loop forward, keys and values in the outer loop backward.

    Forward: Q is read once and O written once; K and V are read once per block of query rows. Backward: K and V once;
    for each block of them Q, dO, lse and delta are read, and dQ is added to in float32 (read and written), which a last
    pass converts; dK and dV of the query heads of a key head are summed by another. Heads are not packed.
    (Dao, "FlashAttention-2", algorithms 1 and 2.)

    Args:
        blocks: (query rows, keys).

    Raises:
        ValueError: a block size below 1.
    """
    _check_direction(direction)
    rows, keys = _checked_blocks(blocks)
    sizes, element, cost = _bytes(problem), problem.dtype.itemsize, Cost()
    strip, heads = _one_head(problem)
    lines = heads * problem.q_len
    q_row, o_row = problem.head_dim * element, problem.value_dim * element
    streamed = scores = 0
    for first, last in strip.row_tiles(rows):
        for js in strip.span(first, last).tiles(keys):
            count = max(min(js.stop * keys, problem.k_len) - js.start * keys, 0) if js else 0
            streamed += count
            scores += count * (last - first + 1)
    unique = {name: sizes[name] for name in ("query", "key", "value")}
    pair_bytes = problem.k_len * (problem.head_dim + problem.value_dim) * element
    if direction != "bwd":
        moved = {
            "query": (sizes["query"], 0),
            "key": (streamed * heads * q_row, 0),
            "value": (streamed * heads * o_row, 0),
            "out": (0, sizes["out"]),
            "lse": (0, lines * STATISTIC),
        }
        tiles = ceil_div(problem.q_len, rows)
        products = 2 * scores * heads * (problem.head_dim + problem.value_dim)
        cost += Cost((
            Kernel("forward", moved, products, scores * heads, unique, tiles * heads, tiles, pair_bytes),
        ))  # fmt: skip
    if direction != "fwd":
        cost += _flash_attention2_backward(problem, strip, heads, rows, keys)
    return cost


def _flash_attention2_backward(problem: Problem, strip: Strip, heads: int, rows: int, keys: int) -> Cost:
    sizes, element = _bytes(problem), problem.dtype.itemsize
    lines, group = heads * problem.q_len, problem.q_heads // problem.kv_heads
    q_row, o_row = problem.head_dim * element, problem.value_dim * element
    streamed = scores = 0
    for k_begin in range(0, problem.k_len, keys):
        k_end = min(k_begin + keys, problem.k_len)
        span = strip.rows_of(k_begin, k_end)
        low, high = span.start // rows * rows, min(ceil_div(span.stop, rows) * rows, problem.q_len)
        streamed += max(high - low, 0)
        scores += max(high - low, 0) * (k_end - k_begin)
    own = {name: _per_head(sizes[name], problem) for name in ("key", "value")}
    summed = lines * problem.head_dim * STATISTIC
    delta = {
        "out": (sizes["out"], 0), "grad_out": (sizes["out"], 0), "delta": (0, lines * STATISTIC),
        "grad_query_sum": (0, summed),
    }  # fmt: skip
    adds = streamed * heads * problem.head_dim * STATISTIC
    moved = {
        "key": (own["key"], 0), "value": (own["value"], 0),
        "query": (streamed * heads * q_row, 0), "grad_out": (streamed * heads * o_row, 0),
        "lse": (streamed * heads * STATISTIC, 0), "delta": (streamed * heads * STATISTIC, 0),
        "grad_query_sum": (adds, adds), "grad_key": (0, own["key"]), "grad_value": (0, own["value"]),
    }  # fmt: skip
    ends = {"grad_query_sum": (summed, 0), "grad_query": (0, sizes["query"])}
    if group > 1:
        ends |= {f"grad_{name}": (own[name], sizes[name]) for name in ("key", "value")}
    unique = {name: sizes[name] for name in ("query", "key", "value")} | {
        "grad_out": sizes["out"], "lse": lines * STATISTIC, "delta": lines * STATISTIC, "grad_query_sum": summed,
    }  # fmt: skip
    tiles = ceil_div(problem.k_len, keys)
    products = 5 * scores * heads * (problem.head_dim + problem.value_dim)
    return Cost((
        Kernel("delta", delta),
        Kernel("backward", moved, products, scores * heads, unique, tiles * heads, tiles,
               problem.q_len * (problem.head_dim + problem.value_dim) * element),
        Kernel("convert", ends),
    ))  # fmt: skip


def block_sparse(problem: Problem, mask: BlockMask, direction: Direction = "fwd") -> Cost:
    """FlashAttention-2's order over the visible blocks of a mask alone; its blocks are the tiles.

    Forward: Q and O once, K and V once per visible block. Backward: K and V once; Q, dO, lse and delta once per visible
    block, and dQ, in float32, added to. The map itself is read once: 4 bytes a block. Bytes fall with the share of
    visible blocks (Dao et al., "FlashAttention", proposition 4); a window beside the mask is not taken into account.

    Args:
        problem: lengths and heads that the mask fits.
        mask: ``flashx.BlockMask``.

    Raises:
        ValueError: a mask of another shape.
    """
    _check_direction(direction)
    batch, heads, q_len, k_len = mask.shape
    if (q_len, k_len) != (problem.q_len, problem.k_len) or batch not in (1, problem.batch):
        raise ValueError(f"mask must be for {problem.q_len} x {problem.k_len}, batch {problem.batch}, got {mask.shape}")
    if heads not in (1, problem.q_heads):
        raise ValueError(f"mask must have 1 or {problem.q_heads} heads, got {heads}")
    sizes, element = _bytes(problem), problem.dtype.itemsize
    shown = (mask.map != 0).double()
    copies = problem.batch * problem.q_heads // (batch * heads)
    row_sizes, key_sizes = _lengths(q_len, mask.block[0]), _lengths(k_len, mask.block[1])
    keys = int((shown @ key_sizes).sum()) * copies  # summed over rows of blocks, and heads
    rows = int((row_sizes @ shown).sum()) * copies
    pairs = int((row_sizes @ shown @ key_sizes).sum()) * copies
    both, lines = problem.head_dim + problem.value_dim, problem.batch * problem.q_heads * q_len
    table, cost = mask.map.numel() * 4, Cost()
    if direction != "bwd":
        moved = {
            "query": (sizes["query"], 0), "key": (keys * problem.head_dim * element, 0),
            "value": (keys * problem.value_dim * element, 0), "out": (0, sizes["out"]), "lse": (0, lines * STATISTIC),
            "block_map": (table, 0),
        }  # fmt: skip
        unique = {name: min(sizes[name], moved[name][0]) for name in ("query", "key", "value")}
        cost += Cost((Kernel("forward", moved, 2 * pairs * both, pairs, unique),))
    if direction != "fwd":
        summed = rows * problem.head_dim * STATISTIC
        delta = {"out": (sizes["out"], 0), "grad_out": (sizes["out"], 0), "delta": (0, lines * STATISTIC)}
        moved = {name: (_per_head(sizes[name], problem), 0) for name in ("key", "value")}
        moved |= {
            "query": (rows * problem.head_dim * element, 0), "grad_out": (rows * problem.value_dim * element, 0),
            "lse": (rows * STATISTIC, 0), "delta": (rows * STATISTIC, 0), "grad_query_sum": (summed, summed),
            "grad_key": (0, _per_head(sizes["key"], problem)), "grad_value": (0, _per_head(sizes["value"], problem)),
            "block_map": (table, 0),
        }  # fmt: skip
        last = lines * problem.head_dim * STATISTIC
        ends = {"grad_query_sum": (last, 0), "grad_query": (0, sizes["query"])}
        unique = {"query": sizes["query"], "grad_out": sizes["out"], "grad_query_sum": last}
        cost += Cost((
            Kernel("delta", delta), Kernel("backward", moved, 5 * pairs * both, pairs, unique), Kernel("convert", ends),
        ))  # fmt: skip
    return cost


def _lengths(length: int, block: int) -> torch.Tensor:
    """Rows of each block that exist."""
    starts = torch.arange(0, length, block)
    return (length - starts).clamp(max=block).double()


def concatenated_prefix(problem: Problem, prefix_len: int, *, blocks: tuple[int, int] = (128, 64)) -> Cost:
    """A prefix that is copied to every sequence: the copy, then FlashAttention-2 over all keys. Forward.

    Args:
        problem: over the suffix, ``k_len`` keys of its own.
        prefix_len: keys of the prefix, >= 0.
    """
    _check_prefix(prefix_len)
    whole = replace(problem, k_len=problem.k_len + prefix_len, mask=_shifted(problem, prefix_len))
    sizes = _bytes(whole)
    copied = {name: (sizes[name], sizes[name]) for name in ("key", "value")}
    return Cost((Kernel("copy", copied, launches=2),)) + flash_attention2(whole, blocks=blocks)


def shared_prefix(problem: Problem, prefix_len: int, *, groups: int = 1, state_bytes: int = STATISTIC) -> Cost:
    """A prefix that is read once for all rows of the sequences of a group, then each sequence's own keys. Forward.

    Between the two a row's state (max, sum, accumulator) is written and read once. The fast memory holds all rows of a
    group, or they are many and the products dominate. (Juravsky et al., "Hydragen", section 3.)

    Args:
        problem: over the suffix, ``k_len`` keys of its own.
        prefix_len: keys of the prefix, >= 0.
        groups: of equal size, that have a prefix each; they must divide the batch.
    """
    _check_prefix(prefix_len)
    if groups < 1 or problem.batch % groups:
        raise ValueError(f"groups must divide the batch size {problem.batch}, got {groups}")
    sizes, lines = _bytes(problem), problem.batch * problem.q_heads * problem.q_len
    state = lines * (problem.value_dim + 2) * state_bytes
    element = problem.dtype.itemsize
    pairs = lines * prefix_len
    shared = {
        "query": (sizes["query"], 0), "carry": (0, state),
        "prefix_key": (groups * problem.kv_heads * prefix_len * problem.head_dim * element, 0),
        "prefix_value": (groups * problem.kv_heads * prefix_len * problem.value_dim * element, 0),
    }  # fmt: skip
    per_pair = 2 * (problem.head_dim + problem.value_dim)
    own = problem.batch * problem.q_heads * interval_pairs(problem.mask, problem.q_len, problem.k_len)
    rest = {
        "query": (sizes["query"], 0), "carry": (state, 0), "key": (sizes["key"], 0), "value": (sizes["value"], 0),
        "out": (0, sizes["out"]), "lse": (0, lines * STATISTIC),
    }  # fmt: skip
    return Cost((Kernel("prefix", shared, pairs * per_pair, pairs), Kernel("suffix", rest, own * per_pair, own)))


def decode(problem: Problem, *, split_keys: int = 1024, packed: bool = True) -> Cost:
    """Split-KV decoding: parts of ``split_keys`` keys run side by side, their float32 results are merged.

    (Dao et al., "Flash-Decoding for long-context inference".)

    Args:
        packed: the query heads of a key head read its keys together; without it each reads them for itself.
    """
    if split_keys < 1:
        raise ValueError(f"split_keys must be >= 1, got {split_keys}")
    sizes, lines = _bytes(problem), problem.batch * problem.q_heads * problem.q_len
    parts = max(ceil_div(problem.mask.hi(max(problem.q_len - 1, 0), problem.k_len), split_keys), 1)
    low = problem.mask.lo(0, problem.k_len)
    seen = min(problem.mask.first, low) + problem.mask.hi(max(problem.q_len - 1, 0), problem.k_len) - low
    heads = problem.batch * (problem.kv_heads if packed else problem.q_heads)
    element, pairs = problem.dtype.itemsize, lines * seen
    partial = lines * parts * (problem.value_dim + 1) * STATISTIC if parts > 1 else 0
    moved = {
        "query": (sizes["query"] * parts, 0),
        "key": (heads * seen * problem.head_dim * element, 0),
        "value": (heads * seen * problem.value_dim * element, 0),
    }
    results = {"out": (0, sizes["out"]), "lse": (0, lines * STATISTIC)}
    flops, blocks = 2 * pairs * (problem.head_dim + problem.value_dim), heads * parts
    if parts == 1:
        return Cost((Kernel("decode", moved | results, flops, pairs, blocks=blocks),))
    return Cost((
        Kernel("decode", moved | {"workspace": (0, partial)}, flops, pairs, blocks=blocks),
        Kernel("combine", {"workspace": (partial, 0)} | results, 0, lines * parts),
    ))  # fmt: skip


def _bytes(problem: Problem) -> dict[str, int]:
    """Of query, key, value and out."""
    element, batch = problem.dtype.itemsize, problem.batch
    return {
        "query": batch * problem.q_heads * problem.q_len * problem.head_dim * element,
        "key": batch * problem.kv_heads * problem.k_len * problem.head_dim * element,
        "value": batch * problem.kv_heads * problem.k_len * problem.value_dim * element,
        "out": batch * problem.q_heads * problem.q_len * problem.value_dim * element,
    }


def _per_head(count: int, problem: Problem) -> int:
    """Bytes of keys or values, read by each query head for itself."""
    return count // problem.kv_heads * problem.q_heads


def _one_head(problem: Problem) -> tuple[Strip, int]:
    """A query head's rows, not packed with others, and how many there are of them."""
    if problem.ragged or problem.block is not None:
        raise ValueError(f"the algorithms take dense batches without a block mask, got {problem}")
    alone = replace(problem, kv_heads=problem.q_heads)
    return strips(alone, Tables())[0], problem.batch * problem.q_heads


def _blocks(problem: Problem, fast_bytes: int | None, blocks: tuple[int, int] | None) -> tuple[int, int]:
    if (fast_bytes is None) == (blocks is None):
        raise ValueError(f"fast_bytes or blocks must be given, and not both, got {fast_bytes} and {blocks}")
    if blocks is not None:
        return _checked_blocks(blocks)
    assert fast_bytes is not None
    element = problem.dtype.itemsize
    if fast_bytes < element:
        raise ValueError(f"fast_bytes must be >= {element}, an element of the problem's, got {fast_bytes}")
    return flash_attention_blocks(max(problem.head_dim, problem.value_dim), fast_bytes // element)


def _checked_blocks(blocks: Sequence[int]) -> tuple[int, int]:
    if len(blocks) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in blocks):
        raise ValueError(f"blocks must be (query rows, keys), ints >= 1, got {blocks!r}")
    return blocks[0], blocks[1]


def _check_direction(direction: str) -> None:
    if direction not in ("fwd", "bwd", "both"):
        raise ValueError(f"direction must be fwd, bwd or both, got {direction!r}")


def _check_prefix(prefix_len: int) -> None:
    if prefix_len < 0:
        raise ValueError(f"prefix_len must be >= 0, got {prefix_len}")


def _shifted(problem: Problem, keys: int) -> IntervalMask:
    return replace(problem.mask, shift=problem.mask.shift + keys)
