"""The Triton kernels on the CPU, through Triton's interpreter; test_triton.py runs this file.

The tests are those of every other backend, on an engine of their own: here only is what to leave out for time's sake.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import prefixes
import pytest
import ragged
import test_decode
import test_shared_prefix
import test_varlen
import tolerance
import torch
from cases import CASES, NAN, Case
from test_attention import (  # noqa: F401
    test_any_strides_of_the_gradient_from_above,
    test_one_gradient_at_a_time,
    test_rows_at_the_lowest_finite_bias,
    test_rows_that_see_nothing,
    test_strided_gradient_of_lse,
)
from test_poison import *  # noqa: F403
from test_poison import (
    MASKED,
    OUTSIDE,
    test_a_nan_sequence_stays_in_its_place,
    test_a_poisoned_key_that_some_rows_see,
    test_masked_keys,
    test_outside_the_window,
)

import flashx
from flashx import dispatch, philox, prefix_calls
from flashx.backends import triton as backend
from flashx.masks import IntervalMask
from flashx.triton_impl import backward, launch, schedule, tile
from flashx.triton_impl.philox import words
from flashx.triton_impl.place import Limits, Place, Rows
from flashx.triton_impl.problem import Flags, Problem, Tables

triton = pytest.importorskip("triton")
tl = triton.language

assert os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


for _long in (
    test_a_nan_sequence_stays_in_its_place,
    test_a_poisoned_key_that_some_rows_see,
    test_masked_keys,
    test_one_gradient_at_a_time,
    test_outside_the_window,
):
    pytest.mark.slow(_long)


@pytest.fixture(params=["triton"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In place of conftest's, whose engines run in any environment."""
    monkeypatch.setitem(dispatch.BACKENDS, "triton", backend)
    for name in ("attention", "sliding_window_attention", "block_sparse_attention"):
        monkeypatch.setattr(flashx, name, tolerance.without_float64(request.param, getattr(flashx, name)))
    yield request.param


def _runs() -> Iterator[Any]:
    """Every fourth case in one dtype; by the marker the whole list, in float32 and a half type."""
    for number, case in enumerate(CASES):
        for half, dtype in enumerate((torch.float32, DTYPES[1 + number % 2])):
            chosen = number % 4 == 0 and half == number // 4 % 2
            name = f"{case}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(case, dtype, id=name, marks=[] if chosen else [pytest.mark.slow])


@pytest.mark.parametrize("case, dtype", list(_runs()))
def test_within_budget(case: Case, dtype: torch.dtype, engine: str) -> None:
    tolerance.check(case, dtype, tolerance.attend(case, case.inputs(dtype), engine))


def test_some_masked_keys(engine: str) -> None:
    test_masked_keys(MASKED[2], torch.bfloat16, "-inf", engine)


def test_outside_a_window(engine: str) -> None:
    test_outside_the_window(*OUTSIDE[0], engine)


@pytest.mark.parametrize("feature, poison", [("causal", NAN), ("bool", torch.inf), ("window", -torch.inf)])
def test_a_poisoned_key(feature: str, poison: float, engine: str) -> None:
    test_a_poisoned_key_that_some_rows_see(feature, poison, engine)


@triton.jit
def _words_kernel(out, key0, key1, first, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_words = words(o_m % 3, o_m // 3, first, key0, key1, N)
    tl.store(out + o_m[:, None] * N + o_n[None, :], b_words.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 1234567890123456789, 2**63 - 1])
def test_words_are_the_masks(seed: int, engine: str) -> None:
    rows, first, columns = 32, 64, 16
    out = torch.empty(rows, columns, dtype=torch.int64)
    _words_kernel[(1,)](out, launch._signed(seed), launch._signed(seed >> 32), first, rows, columns)
    row, column = torch.arange(rows)[:, None], first + torch.arange(columns)
    four = torch.stack(philox.words(seed, (column // 4, row // 3, row % 3, torch.tensor(0))))
    assert torch.equal(out, four.gather(0, (column % 4).expand(1, rows, columns))[0])


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_keeps_what_the_mask_keeps(dropout_p: float, engine: str) -> None:
    """With the identity for values, out is the weights."""
    case = Case(70, 48, 16, 48, batch=2, heads=4, kv_heads=2, dropout_p=dropout_p, causal=True)
    inputs = case.inputs(torch.float32)
    value = torch.eye(48).expand(2, 2, 48, 48)
    torch.manual_seed(case.seed)
    out = flashx.attention(inputs.query, inputs.key, value, **case.options(), backend=engine)
    kept = philox.keep_mask(tolerance.dropout_seed(case), dropout_p, 2, 4, 70, 48)
    assert torch.equal(out != 0, kept & IntervalMask(right=0, shift=48 - 70).dense(70, 48))


FLAGS = Flags("none", False, False, False, False, False, "ieee")


@triton.jit
def _problem(group, q_len, k_len, first, tables, bitmaps):
    """With what schedules look at."""
    z = q_len * 0
    return Problem(
        z + 1, group, q_len, k_len, z, z, z, z, z, z, z, z, z, z, z, z, first, tables, z, z, z, z, bitmaps, z, z, z
    )


@triton.jit
def _place(i_b, q_len, k_len, low, high, first):
    limits = Limits(low, high, first)
    z = q_len * 0
    return Place(i_b, z, z, q_len, z, k_len, z, z, limits, limits, z)


@triton.jit
def _schedule_kernel(
    problems, rows, columns, parts, order, group,
    flags: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both schedules of a problem's tile, a problem an element; of the rows' the part of the key tiles 1 and 2, and the
    order of visits."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = problems + o * 6
    low, high, first = tl.load(p), tl.load(p + 1), tl.load(p + 2)
    q_len, k_len, i = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
    place, problem = _place(o, q_len, k_len, low, high, first), _problem(group, q_len, k_len, first, o, o)
    q_last = (tl.minimum(i * M + M, q_len * group) - 1) // group
    tiles = schedule.row_schedule(i * M // group, q_last, place, flags, N)
    part = schedule.within(tiles, o * 0 + 1, o * 0 + 3)
    column = schedule.column_schedule(i * N, place, problem, flags, M, N)
    for n in tl.static_range(6):
        tl.store(rows + o * 6 + n, tiles[n])
        tl.store(parts + o * 6 + n, part[n])
        tl.store(columns + o * 6 + n, column[n])
    for n in tl.static_range(4):
        tl.store(
            order + o * 4 + n,
            tl.where(n < schedule.tile_count(tiles, flags), schedule.visited_tile(n, tiles, flags), -1),
        )


@pytest.mark.parametrize("group, sink_tokens", [(1, False), (3, False), (1, True), (2, True)])
def test_schedules_are_the_mask(group: int, sink_tokens: bool, engine: str) -> None:
    """All small sizes: the visible tiles are visited and no others, and full are those without a hidden weight."""
    tile_rows, tile_keys = 4, 3
    sides = (None, 0, 1, 5, 2**62)
    firsts, shifts = ((1, 3, 7), (-7, 0, 9)) if sink_tokens else ((0,), (-7, -1, 0, 2, 9))
    masks = [IntervalMask(*mask) for mask in itertools.product(sides, sides, shifts, firsts)]
    sizes = list(itertools.product((1, 7) if sink_tokens else (1, 2, 7), (0, 1, 3, 8)))
    problems = [(m, q, k, i) for m in masks for q, k in sizes for i in range(8)]
    numbers = [(*launch._interval(m, q, k), min(m.first, k), q, k, i) for m, q, k, i in problems]
    block = 512
    numbers += [(0, 0, 0, 1, 1, 0)] * (-len(numbers) % block)
    table = torch.tensor(numbers, dtype=torch.int32)
    rows, columns, parts = torch.empty(3, len(numbers), 6, dtype=torch.int32)
    order = torch.empty(len(numbers), 4, dtype=torch.int32)
    flags = FLAGS._replace(first_keys=sink_tokens)
    _schedule_kernel[(len(numbers) // block,)](
        table, rows, columns, parts, order, group, flags, tile_rows, tile_keys, block
    )
    for (mask, q_len, k_len, i), row, column, part, visits in zip(
        problems, rows.tolist(), columns.tolist(), parts.tolist(), order.tolist(), strict=False
    ):
        dense = mask.dense(q_len, k_len).repeat_interleave(group, 0)
        row_tiles, key_tiles = -(-len(dense) // tile_rows), -(-k_len // tile_keys)

        def kind(r: int, k: int, dense: torch.Tensor = dense) -> str:
            tile = dense[r * tile_rows : (r + 1) * tile_rows, k * tile_keys : (k + 1) * tile_keys]
            return "full" if tile.numel() == tile_rows * tile_keys and tile.all() else "some" if tile.any() else "none"

        for visited, kinds, partly in (
            (row, [kind(i, k) for k in range(key_tiles)] if i < row_tiles else None, (i + 1) * tile_rows > len(dense)),
            (column, [kind(r, i) for r in range(row_tiles)] if i < key_tiles else None, False),
        ):
            if kinds is None:
                continue
            lead_first, lead_last, first, last, full_first, full_last = visited
            what = f"{mask} {q_len}x{k_len} tile {i}: {visited}, {kinds}"
            assert 0 == lead_first <= lead_last and 0 <= first <= full_first <= full_last <= last <= len(kinds), what
            tiles = [*range(lead_last), *range(first, last)]
            assert lead_last <= first or not lead_last, what
            seen = [j for j, one in enumerate(kinds) if one != "none"]
            # Rows that see nothing, beside ones that do, may widen a schedule; an empty one stays empty.
            assert set(seen) <= set(tiles), what
            full = [j for j, one in enumerate(kinds) if one == "full"]
            # Of the first keys beyond the window none is full.
            found = list(range(full_first, full_last))
            assert partly or (found == full if not mask.first else set(found) <= set(full)), what
            if not partly and seen:
                assert seen == tiles, what
            if visited is row:
                assert [j for j in visits if j >= 0] == found + [j for j in tiles if j not in found], what
                some = [*range(part[0], part[1]), *range(part[2], part[3])]
                assert some == [j for j in tiles if 1 <= j < 3], f"{what} {part}"
                assert list(range(part[4], part[5])) == [j for j in found if 1 <= j < 3], f"{what} {part}"


@triton.jit
def _walk_kernel(
    tables, rows, columns, group, q_len, k_len, low, high, first, bitmaps,
    flags: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    i_b, i = tl.program_id(0), tl.program_id(1)
    place, problem = _place(i_b, q_len, k_len, low, high, first), _problem(group, q_len, k_len, first, tables, bitmaps)
    q_first, q_last = i * M // group, (tl.minimum(i * M + M, q_len * group) - 1) // group
    for i_chunk in range(CHUNKS):
        at = ((i_b * tl.num_programs(1) + i) * CHUNKS + i_chunk) * 2
        if i * M < q_len * group:
            tiles = schedule.row_schedule(q_first, q_last, place, flags, N)
            whole, _, cut, _ = schedule.row_chunk(i_chunk, tiles, q_first, q_last, place, problem, flags, N, True)
            tl.store(rows + at, whole)
            tl.store(rows + at + 1, cut)
        if i * N < k_len:
            tiles = schedule.column_schedule(i * N, place, problem, flags, M, N)
            whole, _, cut, _ = schedule.column_chunk(i_chunk, tiles, i * N, place, problem, flags, M, N, True)
            tl.store(columns + at, whole)
            tl.store(columns + at + 1, cut)


@pytest.mark.parametrize("heads, block", [(1, (64, 16)), (1, (16, 48)), (2, (16, 64)), (2, (48, 32))], ids=str)
def test_walks_are_the_block_map(heads: int, block: tuple[int, int], engine: str) -> None:
    """Tiles without a visible block are not visited, those of full blocks as such; entries without a bitmap hide."""
    q_len, k_len, group, tile_rows, tile_keys = 75, 600, 2, 32, 16
    mask = IntervalMask(None, 9, k_len - q_len - 50)
    generator = torch.Generator().manual_seed(block[0])
    blocks = [-(-n // size) for n, size in zip((q_len, k_len), block, strict=True)]
    entries = torch.randint(-3, 6, (2, heads, *blocks), generator=generator)
    entries = torch.where(
        torch.rand(2, 1, *blocks, generator=generator) < 0.6, torch.tensor([0, 1])[:, None, None, None], entries
    )
    block_map, bits = entries.int(), torch.zeros(2, block[0], 2, dtype=torch.int32)  # entries 4 and 5 have no bitmap
    tables = Tables(None, None, None, None, block_map, bits)
    count, chunks = max(-(-q_len * group // tile_rows), -(-k_len // tile_keys)), 2
    rows, columns = torch.zeros(2, 2, count, chunks, 2, dtype=torch.int64)
    flags = FLAGS._replace(blocks=True, block_q=block[0], block_k=block[1], block_batch=True, block_heads=heads > 1)
    low, high = launch._interval(mask, q_len, k_len)
    _walk_kernel[(2, count)](
        tables, rows, columns, group, q_len, k_len, low, high, 0, len(bits), flags, tile_rows, tile_keys, chunks
    )
    known = torch.where((entries < 0) | (entries >= 2 + len(bits)), 0, entries)
    dense = known.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :q_len, :k_len]
    interval = mask.dense(q_len, k_len).repeat_interleave(group, 0)
    visited = 0
    for b, i, j in itertools.product(range(2), range(-(-q_len * group // tile_rows)), range(-(-k_len // tile_keys))):
        packed = slice(i * tile_rows, (i + 1) * tile_rows)
        keys = slice(j * tile_keys, (j + 1) * tile_keys)
        queries = slice(i * tile_rows // group, -(-min((i + 1) * tile_rows, q_len * group) // group))
        tile, sees = dense[b, :, queries, keys], interval[packed, keys]
        seen = bool((tile != 0).any() and sees.any())
        full = bool((tile == 1).all() and sees.all() and sees.shape[1] == tile_keys)
        visited += seen
        for name, masks, bit, whole in (
            ("row", rows[b, i], j, full),
            ("column", columns[b, j], i, full and sees.shape[0] == tile_rows),
        ):
            found = [int(word) >> bit % 32 & 1 for word in masks[bit // 32]]
            assert found == [whole, seen and not whole], f"{name} of {b} {i} {j}: {found}, {whole} {seen}"
    assert visited


@triton.jit
def _columns_kernel(weights, values, out, passes, flags: tl.constexpr, M: tl.constexpr):
    o = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    b_w, b_x = tl.load(weights + o), tl.load(values + o)
    p_out = out + tl.arange(0, M) * M
    for i_pass in range(tile.FINITE, passes):
        b_sums = tile.multiply_columns(tl.zeros([M, M], tl.float32), b_w, b_x, i_pass, True, flags)
        tile.store_sums(p_out, tl.arange(0, M) < M, b_sums, 1.0, i_pass, M, M, False)


def test_passes_give_what_the_products_give(engine: str) -> None:
    """NaN and inf of either sign under weights of either sign; where the weight is 0 they count for nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-2, 3, (16, 16), generator=generator).float()
    weights[5] = weights[5].abs()
    weights[6] = -weights[6].abs()
    weights[7] = 0
    values = torch.randn(16, 16, generator=generator)
    kinds = torch.randint(0, 14, (16, 16), generator=generator)
    for kind, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        values[kinds == kind] = value
    values[:, 3], values[2, 3] = 1.0, torch.inf  # alone in its column
    values[:, 4], values[2, 4] = 1.0, -torch.inf
    expected = torch.stack([torch.where(row[:, None] == 0, 0, row[:, None] * values).sum(0) for row in weights])
    out = torch.empty(16, 16)
    _columns_kernel[(1,)](weights, values, out, tile.NEGATIVE_DOWN.value + 1, FLAGS, 16)
    tolerance.compare("products", out, expected, 1e-5)
    assert all(kind(expected).any() for kind in (torch.isnan, torch.isposinf, torch.isneginf, torch.isfinite))


@pytest.mark.parametrize("q_len, k_len", [(128, 128), (130, 64)])
def test_rows_whose_logits_are_all_infinite(q_len: int, k_len: int, engine: str) -> None:
    """They see nothing, though no mask says so: weights 0, whatever lse, in whole tiles and in others."""
    query, key = torch.ones(1, 1, q_len, 16), torch.full((1, 1, k_len, 16), -torch.inf)
    value = torch.randn(1, 1, k_len, 16, requires_grad=True)
    out, lse = flashx.attention(query, key, value, return_lse=True, backend=engine)
    assert (out == 0).all() and (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), value)
    assert (grad == 0).all()


@triton.jit
def _ends_kernel(lse, delta, ends, M: tl.constexpr):
    o = tl.arange(0, M)
    b_lse, b_delta = backward.row_ends(Rows(o < M - 1, o, o, o, o, o, o, o), lse, delta)
    tl.store(ends + o, b_lse)
    tl.store(ends + M + o, b_delta)


def test_rows_without_weights_end_at_infinity(engine: str) -> None:
    """Empty rows and those past the last: exp(logit - lse) is 0 in the first sweep already."""
    ends = torch.empty(2, 4)
    _ends_kernel[(1,)](torch.tensor([1.5, -torch.inf, torch.inf, 3.0]), torch.arange(4.0), ends, 4)
    assert ends.tolist() == [[1.5, torch.inf, torch.inf, torch.inf], [0, 1, 2, 0]]


def _some(items: list[Any], chosen: tuple[int, ...]) -> list[Any]:
    """Those that CI runs; the others are slow."""
    marks = [pytest.mark.slow]
    return [pytest.param(item, id=str(item), marks=[] if i in chosen else marks) for i, item in enumerate(items)]


@pytest.mark.parametrize("call", _some(test_varlen.CALLS, (1, 5, 7)))
def test_varlen_attention(call: ragged.Ragged, engine: str) -> None:
    """With rows and keys of NaN after the last sequence."""
    dtype = DTYPES[len(str(call)) % 3]
    ragged.check(call, dtype, test_varlen.attend(call, call.inputs(dtype), engine, tail=3))


@pytest.mark.parametrize("page", [None, 3, 16])
@pytest.mark.parametrize("call", _some(test_decode.CALLS, (1, 2)))
def test_decode_attention(call: ragged.Ragged, page: int | None, engine: str) -> None:
    dtype = DTYPES[(page or 0) % 3]
    inputs, cache = test_decode.filled(call, dtype, page, engine)
    ragged.check(call, dtype, test_decode.attend(call, inputs, cache, engine))


SPLIT = ragged.Ragged((1,) * 4, (200, 64, 1, 65), head_dim=8, heads=4, kv_heads=2, window=(150, 0), sink_tokens=2)


@pytest.mark.parametrize("call", [SPLIT, replace(SPLIT, sinks=True, alibi="bh", window=None)], ids=str)
def test_splits(call: ragged.Ragged, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 keys: exact, and the bits of a sequence are its own, whatever the batch, the capacity and the pages."""
    monkeypatch.setattr(launch, "SPLIT_KEYS", 64)
    inputs, cache = test_decode.filled(call, torch.float32, None, engine)
    expected = test_decode.attend(call, inputs, cache, engine)
    ragged.check(call, torch.float32, expected)
    for page, spare in ((None, 130), (3, 7)):
        _, cache = test_decode.filled(call, torch.float32, page, engine, spare)
        for name, tensor in test_decode.attend(call, inputs, cache, engine).items():
            tolerance.same_bits(f"page {page}: {name}", tensor, expected[name])
    for b in (0, 3):
        alone = replace(call, q_lens=call.q_lens[b : b + 1], k_lens=call.k_lens[b : b + 1])
        rows, keys = list(call.slices())[b]
        slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes[b : b + 1]
        own = inputs._replace(query=inputs.query[rows], key=inputs.key[keys], value=inputs.value[keys])
        own = own._replace(alibi_slopes=slopes)
        cache = test_decode.empty_cache(alone, torch.float32, None, call.k_lens[b])
        test_decode.fill(alone, own, cache)
        found = test_decode.attend(alone, own, cache, engine)
        tolerance.same_bits(f"sequence {b}: out", found["out"], expected["out"][rows])
        tolerance.same_bits(f"sequence {b}: lse", found["lse"], expected["lse"][:, rows])


def test_what_fits_one_part_has_the_bits_of_an_uncut_call(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 60, 16, heads=4, kv_heads=2, sinks=True, causal=True)
    inputs = case.inputs(torch.float32)
    uncut = tolerance.attend(case, inputs, engine)
    monkeypatch.setattr(launch, "splits", lambda problem: 3)
    monkeypatch.setattr(launch, "SPLIT_KEYS", 64)
    for name, tensor in tolerance.attend(case, inputs, engine).items():
        tolerance.same_bits(name, tensor, uncut[name])


@pytest.mark.parametrize("unified_max", [0.0, -500.0, 1e30])
def test_unified_max(unified_max: float, engine: str) -> None:
    """Whether it fits or not; rows that see nothing among them."""
    call = test_decode.CALLS[0]
    inputs, cache = test_decode.filled(call, torch.float32, 16, engine)
    found = test_decode.attend(call, inputs, cache, engine, unified_max=unified_max)
    ragged.check(call, torch.float32, found)


def test_unified_max_of_rows_that_differ(engine: str) -> None:
    test_decode.test_unified_max_of_rows_that_differ(engine)


def test_a_fitting_unified_max_is_used(engine: str) -> None:
    """Some rows take it and some do not, each by itself: their bits are those of either kind alone."""
    call = ragged.Ragged((1,), (40,), heads=4, kv_heads=1)
    inputs, _ = test_decode.filled(call, torch.float32, None, engine)
    inputs = inputs._replace(query=inputs.query * torch.tensor([1.0, 300.0, 1.0, 300.0])[:, None])
    cache = test_decode.empty_cache(call, torch.float32, None, 40)
    test_decode.fill(call, inputs, cache)
    own, unified = (test_decode.attend(call, inputs, cache, engine, unified_max=phi)["out"] for phi in (None, 3.0))
    tolerance.same_bits("far away", unified[:, 1::2], own[:, 1::2])
    assert (unified[:, ::2] != own[:, ::2]).any(dim=-1).all()


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared prefixes are levels, whatever that costs."""
    plan = prefix_calls.plan
    monkeypatch.setattr(prefix_calls, "plan", lambda *of, **options: plan(*of, **options)._replace(form="levels"))


def _check_levels(case: prefixes.Case, dtype: torch.dtype, engine: str) -> None:
    prefixes.check(case, dtype, prefixes.run(case, prefixes.poisoned(case, case.tensors(dtype)), engine))


@pytest.mark.parametrize("case", _some(test_shared_prefix.SHARED[:13], (3, 7, 12)))
def test_shared_prefixes(case: prefixes.Case, engine: str, levels: None) -> None:
    _check_levels(case, DTYPES[len(str(case)) % 2], engine)


MEMBERS = [
    # Members that stand far apart: what one sees of the prefix another does not.
    prefixes.one_prefix(3, 1, 300, 150, 0, 150, 70, q_len=2, window=(60, 0)),
    prefixes.one_prefix(3, 1, 260, 90, 90, 0, 40, q_len=40, window=(20, 0), sink_tokens=70),
]


@pytest.mark.parametrize("case", MEMBERS, ids=str)
def test_members_that_stand_far_apart(case: prefixes.Case, engine: str, levels: None) -> None:
    _check_levels(case, torch.float32, engine)


@pytest.mark.parametrize("case", _some(test_shared_prefix.TREES, (3, 4)))
def test_trees(case: prefixes.Case, engine: str) -> None:
    _check_levels(case, DTYPES[len(str(case)) % 2], engine)


def test_levels_that_are_split(engine: str, levels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is one more part of the combination, and may be its result."""
    monkeypatch.setattr(launch, "SPLIT_KEYS", 64)
    monkeypatch.setattr(launch, "MEMBER_SPLIT_KEYS", 64)
    case = prefixes.one_prefix(4, 2, 130, 70, 0, 70, 3, 66, q_len=3, sinks=True, window=(100, 0), sink_tokens=3)
    _check_levels(case, torch.float32, engine)


@pytest.mark.parametrize("poison", [NAN, torch.inf])
def test_values_that_some_rows_of_a_level_see(poison: float, engine: str, levels: None) -> None:
    """Passes over a state that an earlier call has left, and over a gradient that others add to: each counts once."""
    case = prefixes.one_prefix(2, 1, 20, 9, q_len=5, window=(12, 0))
    tensors = case.tensors(torch.float32)
    clean = prefixes.run(case, tensors, engine)
    tensors["value0"][0, :, 12] = poison  # row i is at 24 + i: the first one alone sees it
    tensors["value"][0, :, 8] = poison  # the last one alone
    found = prefixes.run(case, tensors, engine)
    for name in ("out", "lse", "grad_query"):
        spoiled = [] if name == "lse" else [0, 4]
        rows = [i for i in range(5) if i not in spoiled]
        tolerance.same_bits(name, found[name][0, :, rows], clean[name][0, :, rows])
        tolerance.same_bits(name, found[name][1, :, 1:], clean[name][1, :, 1:])
        for row in spoiled:
            want = torch.isinf if name == "out" and poison == torch.inf else torch.isnan
            assert want(found[name][0, :, row]).all(), (name, row)


def test_members_do_not_depend_on_each_other(engine: str) -> None:
    test_shared_prefix.test_bits_of_a_sequence_do_not_depend_on_the_batch(
        test_shared_prefix.TREES[4], [4, 1, 5], engine
    )


@pytest.mark.parametrize("seeds", _some([range(0, 30, 2), range(1, 60, 2)], (0,)))
def test_wild_tables(seeds: range) -> None:
    """Nothing that a table holds makes a kernel read or write outside of the tensors: test_tables.py."""
    code = (
        "import test_tables\nfrom flashx import dispatch\nfrom flashx.backends import triton\n"
        f"dispatch.BACKENDS['cpu'] = triton\nfor seed in {seeds!r}:\n"
        "    print(seed, flush=True)\n    test_tables.run(seed)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, f"died of {done.returncode} in seed {done.stdout.split()[-1:]}\n{done.stderr[-2000:]}"


def test_compiled(engine: str) -> None:
    """The operator is opaque to torch.compile: no graph break, forward and backward."""
    query, key, value = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return 2 * flashx.attention(query + 1, key, value, causal=True, backend="triton")

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(query, key, value)
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    for eager, compiled in zip(*results, strict=True):
        tolerance.same_bits("compiled", compiled, eager)
