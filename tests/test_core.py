"""csrc/core through its bindings, exhaustively for small sizes: one meaning for CPU and GPU kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashx import _C, masks, philox

WIDTHS = (None, 0, 1, 2, 5)
SHIFTS = (-9, -3, -1, 0, 1, 2, 8)
LENGTHS = (0, 1, 2, 3, 7)
FIRSTS = (0, 2)
MASKS = [mask for mask in itertools.product(WIDTHS, WIDTHS, SHIFTS, FIRSTS) if mask[0] is not None or mask[3] == 0]


@pytest.mark.parametrize("left, right, shift, first", MASKS)
def test_interval_mask_is_the_python_mask(left: int | None, right: int | None, shift: int, first: int) -> None:
    core, python = _C.core.IntervalMask(left, right, shift, first), masks.IntervalMask(left, right, shift, first)
    for q_len, k_len in itertools.product(LENGTHS, LENGTHS):
        dense = python.dense(q_len, k_len)
        for q in range(q_len):
            lo, hi = core.lo(q, k_len), core.hi(q, k_len)
            assert (lo, hi) == (python.lo(q, k_len), python.hi(q, k_len))
            assert dense[q].tolist() == [lo <= k < hi or k < min(first, hi) for k in range(k_len)]


@pytest.mark.parametrize("left, right, shift, first", MASKS)
def test_tile_kind_is_what_the_elements_say(left: int | None, right: int | None, shift: int, first: int) -> None:
    core, python = _C.core.IntervalMask(left, right, shift, first), masks.IntervalMask(left, right, shift, first)
    q_len, k_len = 5, 6
    dense = python.dense(q_len, k_len)
    for q_first, q_last in itertools.combinations_with_replacement(range(q_len), 2):
        for k_begin, k_end in itertools.combinations(range(k_len + 3), 2):
            tile = dense[q_first : q_last + 1, k_begin:k_end]
            kind = core.kind(q_first, q_last, k_begin, k_end, k_len)
            if kind == "skip":
                assert not tile.any()
            if kind == "full":
                assert k_end <= k_len and tile.all()
            # The other way round: nothing visible is skipped, and a wholly visible tile is not masked in vain, unless
            # it holds first keys that the window has left behind.
            if tile.numel() and tile.all() and k_end <= k_len and k_begin >= first:
                assert kind == "full"


@pytest.mark.parametrize("left, right, shift, first", MASKS)
@pytest.mark.parametrize("tile_len", [1, 2, 3, 4])
def test_schedules_visit_what_is_visible(
    left: int | None, right: int | None, shift: int, first: int, tile_len: int
) -> None:
    core, python = _C.core.IntervalMask(left, right, shift, first), masks.IntervalMask(left, right, shift, first)
    for q_len, k_len in itertools.product((1, 2, 5, 7), (0, 1, 4, 7)):
        dense = python.dense(q_len, k_len)
        for q_first, q_last in itertools.combinations_with_replacement(range(q_len), 2):
            tiles = _C.core.row_schedule(core, k_len, q_first, q_last, tile_len)
            rows = dense[q_first : q_last + 1]
            visited = torch.zeros(k_len, dtype=torch.bool)
            for begin, end, kind in tiles:
                assert begin % tile_len == 0 and begin < end <= k_len and end - begin <= tile_len
                assert not visited[begin:end].any(), "visited twice"
                visited[begin:end] = True
                if kind == "full":
                    assert rows[:, begin:end].all()
            assert [t[0] for t in tiles] == sorted(t[0] for t in tiles)
            assert not (rows.any(0) & ~visited).any(), "a visible key was left out"
            # IO-awareness: every tile is there for a key that the row range can reach.
            lo, hi = python.lo(q_first, k_len), python.hi(q_last, k_len)
            for begin, end, _ in tiles:
                assert begin < min(first, hi) or max(begin, lo) < min(end, hi)
        for k_begin in range(0, k_len, tile_len):
            k_end = min(k_begin + tile_len, k_len)
            begin, end = _C.core.column_schedule(core, q_len, k_begin, k_end)
            assert 0 <= begin <= q_len and 0 <= end <= q_len
            seeing = dense[:, k_begin:k_end].any(1).nonzero().flatten().tolist()
            assert all(begin <= q < end for q in seeing)
            if seeing:
                assert (begin, end) == (seeing[0], seeing[-1] + 1)


@pytest.mark.parametrize("left, right, shift, first", MASKS)
@pytest.mark.parametrize("tile_len", [1, 2, 3])
def test_rows_and_columns_name_the_same_tiles(
    left: int | None, right: int | None, shift: int, first: int, tile_len: int
) -> None:
    """Key tiles take turns at adding to dQ: a tile that only one schedule named would keep the others waiting."""
    core = _C.core.IntervalMask(left, right, shift, first)
    for q_len, k_len, block in itertools.product((1, 4, 7), (1, 5, 7), (1, 2, 3)):
        columns = {
            begin: _C.core.column_schedule(core, q_len, begin, min(begin + tile_len, k_len))
            for begin in range(0, k_len, tile_len)
        }
        for q_first in range(0, q_len, block):
            q_last = min(q_first + block, q_len) - 1
            by_row = [tile[0] for tile in _C.core.row_schedule(core, k_len, q_first, q_last, tile_len)]
            by_column = [k for k, (first, end) in columns.items() if max(first, q_first) < min(end, q_last + 1)]
            assert by_row == by_column


def test_extreme_masks_do_not_overflow() -> None:
    huge = 2**62
    for left, right, shift in itertools.product((None, 0, huge), (None, 0, huge), (-huge, 0, huge)):
        core = _C.core.IntervalMask(left, right, shift, 2)
        assert 0 <= core.lo(3, 10) <= 10 and 0 <= core.hi(3, 10) <= 10


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_philox_is_the_python_philox(seed: int) -> None:
    for counter in ((0, 0, 0), (1, 2, 3), (2**32 - 1, 5, 77)):
        expected = philox.words(seed, tuple(torch.tensor(c) for c in (*counter, 0)))
        assert _C.core.philox(seed, *counter) == [int(word) for word in expected]


def test_row_schedule_refuses_an_empty_tile() -> None:
    with pytest.raises(ValueError, match="tile_len must be >= 1, got 0"):
        _C.core.row_schedule(_C.core.IntervalMask(None, None, 0), 4, 0, 3, 0)
