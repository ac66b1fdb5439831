"""The cost model of shared prefixes: which form it takes, and the bytes that it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashx.prefix_plan import plan

# batch, groups, q_heads, kv_heads, q_len, prefix, suffix, head dim, value dim, dtype, device
PLANS = [
    ((64, 1, 8, 8, 1, 4096, 128, 128, 128, torch.float32, "cpu"), "levels"),
    ((1, 1, 8, 8, 1, 4096, 128, 128, 128, torch.float32, "cpu"), "levels"),  # states cost less than a copy
    ((1, 1, 8, 8, 1, 64, 16, 64, 64, torch.float32, "cpu"), "levels"),
    ((1, 1, 8, 8, 1, 64, 16, 64, 64, torch.float32, "cuda"), "concatenated"),
    ((8, 8, 32, 8, 4096, 4096, 16, 128, 128, torch.float32, "cpu"), "concatenated"),
    ((8, 8, 32, 8, 4096, 4096, 16, 128, 128, torch.bfloat16, "cuda"), "concatenated"),  # and here more
    ((8, 1, 32, 8, 1, 8, 2, 128, 128, torch.bfloat16, "cuda"), "concatenated"),
    ((32, 1, 32, 8, 1, 2048, 128, 128, 128, torch.bfloat16, "cuda"), "levels"),
    ((64, 1, 8, 8, 1, 0, 128, 128, 128, torch.float32, "cpu"), "plain"),
    ((0, 1, 8, 8, 1, 9, 128, 128, 128, torch.float32, "cpu"), "plain"),
    ((3, 3, 8, 8, 1, 128, 0, 128, 128, torch.float32, "cpu"), "plain"),
    ((4, 2, 8, 8, 1, 128, 0, 128, 128, torch.float32, "cpu"), "levels"),
]


@pytest.mark.parametrize("sizes, form", PLANS, ids=str)
def test_plan(sizes: Any, form: str) -> None:
    assert plan(*sizes).form == form


def test_plan_counts_bytes() -> None:
    found = plan(8, 2, 4, 2, 3, 100, 10, 16, 8, torch.float16, "cpu")
    keys = 2 * (16 + 8) * 2
    states = 8 * 4 * 3 * (8 + 2) * 4
    assert found.unshared_bytes == 8 * 110 * keys
    assert found.shared_bytes == (2 * 100 + 8 * 10) * keys + 4 * states
    assert found.concatenated_bytes == (2 * 100 + 8 * 10) * keys + 2 * found.unshared_bytes
    assert plan(8, 2, 4, 2, 3, 100, 10, 16, 8, torch.float16, "cpu", block_mask=True).form == "levels"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_plan_never_turns_back(data: st.DataObject) -> None:
    """Where levels pay they still pay for more sequences in a group or a longer prefix."""
    prefix, batch = data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 64))
    rest = (32, 8, data.draw(st.sampled_from([1, 4, 64])))
    after = (data.draw(st.integers(0, 300)), 128, 128, torch.bfloat16, data.draw(st.sampled_from(["cpu", "cuda"])))
    if plan(batch, 1, *rest, prefix, *after).form == "levels":
        assert plan(batch, 1, *rest, 2 * prefix, *after).form == "levels"
        if prefix > 64:
            assert plan(2 * batch, 1, *rest, prefix, *after).form == "levels"
