"""The Triton kernels on the CPU, through Triton's interpreter; test_triton.py runs this file.

The tests are those of every other backend, on an engine of their own: here only is what to leave out for time's sake.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import tolerance
import torch
from cases import CASES, Case
from test_attention import (  # noqa: F401
    test_any_strides_of_the_gradient_from_above,
    test_one_gradient_at_a_time,
    test_rows_at_the_lowest_finite_bias,
    test_rows_that_see_nothing,
    test_strided_gradient_of_lse,
)
from test_poison import *  # noqa: F403
from test_poison import MASKED, test_masked_keys

import flashx
from flashx import dispatch, philox
from flashx.backends import triton as backend
from flashx.masks import IntervalMask
from flashx.triton_impl import launch, logits, schedule
from flashx.triton_impl.philox import words

triton = pytest.importorskip("triton")
tl = triton.language

assert os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


for _long in (test_one_gradient_at_a_time, test_masked_keys):
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


@pytest.mark.parametrize("number, dtype, kind", [(0, torch.float32, "bool"), (2, torch.bfloat16, "-inf")])
def test_some_masked_keys(number: int, dtype: torch.dtype, kind: str, engine: str) -> None:
    test_masked_keys(MASKED[number], dtype, kind, engine)


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


@triton.jit
def _schedule_kernel(problems, rows, columns, group, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Both schedules of a problem's tile, a problem an element."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = problems + o * 5
    low, high, q_len, k_len, i = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4)
    none = o * 0
    problem = logits.Problem(
        none, group, q_len, k_len, low, high, none, none, none, none, none, none, none, none, none, none
    )
    q_last = (tl.minimum(i * M + M, q_len * group) - 1) // group
    first, last, full_first, full_last = schedule.row_schedule(i * M // group, q_last, problem, N)
    tl.store(rows + o * 4, first)
    tl.store(rows + o * 4 + 1, last)
    tl.store(rows + o * 4 + 2, full_first)
    tl.store(rows + o * 4 + 3, full_last)
    first, last, full_first, full_last = schedule.column_schedule(i * N, problem, M, N)
    tl.store(columns + o * 4, first)
    tl.store(columns + o * 4 + 1, last)
    tl.store(columns + o * 4 + 2, full_first)
    tl.store(columns + o * 4 + 3, full_last)


@pytest.mark.parametrize("group", [1, 3])
def test_schedules_are_the_mask(group: int, engine: str) -> None:
    """All small sizes: from the first visible tile to the last, and full are those without a hidden weight."""
    tile_rows, tile_keys = 4, 3
    sides = (None, 0, 1, 5, 2**62)
    masks = [IntervalMask(*mask) for mask in itertools.product(sides, sides, (-7, -1, 0, 2, 9))]
    sizes = list(itertools.product((1, 2, 7), (0, 1, 3, 8)))
    problems = [(m, q, k, i) for m in masks for q, k in sizes for i in range(8)]
    numbers = [(*launch._interval(m, q, k), q, k, i) for m, q, k, i in problems]
    block = 512
    numbers += [(0, 0, 1, 1, 0)] * (-len(numbers) % block)
    table = torch.tensor(numbers, dtype=torch.int32)
    rows, columns = torch.empty(2, len(numbers), 4, dtype=torch.int32)
    _schedule_kernel[(len(numbers) // block,)](table, rows, columns, group, tile_rows, tile_keys, block)
    for (mask, q_len, k_len, i), row, column in zip(problems, rows.tolist(), columns.tolist(), strict=False):
        dense = mask.dense(q_len, k_len).repeat_interleave(group, 0)
        row_tiles, key_tiles = -(-len(dense) // tile_rows), -(-k_len // tile_keys)

        def kind(r: int, k: int, dense: torch.Tensor = dense) -> str:
            tile = dense[r * tile_rows : (r + 1) * tile_rows, k * tile_keys : (k + 1) * tile_keys]
            return "full" if tile.numel() == tile_rows * tile_keys and tile.all() else "some" if tile.any() else "none"

        for visited, kinds, ragged in (
            (row, [kind(i, k) for k in range(key_tiles)] if i < row_tiles else None, (i + 1) * tile_rows > len(dense)),
            (column, [kind(r, i) for r in range(row_tiles)] if i < key_tiles else None, False),
        ):
            if kinds is None:
                continue
            first, last, full_first, full_last = visited
            what = f"{mask} {q_len}x{k_len} tile {i}: {visited}, {kinds}"
            assert 0 <= first <= full_first <= full_last <= last <= len(kinds), what
            seen = [j for j, one in enumerate(kinds) if one != "none"]
            # Rows that see nothing, beside ones that do, may widen a schedule; an empty one stays empty.
            assert not seen or (first <= seen[0] and seen[-1] < last), what
            full = [j for j, one in enumerate(kinds) if one == "full"]
            assert ragged or list(range(full_first, full_last)) == full, what
            if not ragged and seen:
                assert (first, last) == (seen[0], seen[-1] + 1), what
