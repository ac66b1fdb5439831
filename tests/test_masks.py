"""flashx.masks: the interval mask's limits are its dense form, for every small size."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashx.masks import IntervalMask

WIDTHS = (None, 0, 1, 2, 5)


@pytest.mark.parametrize("shift", range(-4, 5))
def test_limits_are_the_dense_mask(shift: int) -> None:
    for left, right, q_len, k_len in itertools.product(WIDTHS, WIDTHS, range(5), range(6)):
        mask = IntervalMask(left, right, shift)
        dense = mask.dense(q_len, k_len)
        limits = [(mask.lo(q, k_len), mask.hi(q, k_len)) for q in range(q_len)]
        for q, (lo, hi) in enumerate(limits):
            assert 0 <= lo <= k_len and 0 <= hi <= k_len
            assert dense[q].nonzero().flatten().tolist() == list(range(lo, hi)), (mask, q, k_len)
        assert limits == sorted(limits, key=lambda limit: limit[0]) == sorted(limits, key=lambda limit: limit[1])
        assert mask.hides_nothing(q_len, k_len) == bool(dense.all()), (mask, q_len, k_len)


def test_meaning() -> None:
    """The definition, spelled out: row q sees the keys [q + shift - left, q + shift + right]."""
    expected = [
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1],
    ]
    assert IntervalMask(left=1, right=0, shift=3).dense(3, 5).int().tolist() == expected


def test_causal_aligned_bottom_right() -> None:
    """The last row sees every key; torch's top-left rule is shift 0."""
    assert torch.equal(IntervalMask(None, 0, 2).dense(3, 5), torch.ones(3, 5, dtype=torch.bool).tril(2))
    assert torch.equal(IntervalMask(None, 0, 0).dense(3, 5), torch.ones(3, 5, dtype=torch.bool).tril())


def test_default_hides_nothing() -> None:
    assert IntervalMask().dense(2, 3).all() and IntervalMask().hides_nothing(2, 3)


def test_far_limits_do_not_overflow() -> None:
    mask = IntervalMask(2**62, 2**62, -(2**40))
    assert mask.lo(0, 10) == 0 and mask.hi(0, 10) == 10
    assert mask.dense(2, 10).all()
