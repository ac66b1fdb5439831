"""flashx.problem: what a call looks like once described. What it refuses: test_bad_input.py."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from cases import CASES, Bias, Blocks, Case

import flashx
from flashx.masks import IntervalMask
from flashx.problem import DTYPES, Problem, accumulation_dtype


def described(case: Case, dtype: torch.dtype = torch.float32) -> Problem:
    return flashx.explain(case.attention(), **case.inputs(dtype).arguments(), **case.options()).problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_problem_says_what_the_case_says(case: Case) -> None:
    left, right = case.window or (None, None)
    bias = case.inputs(torch.float32).bias
    expected = Problem(
        batch=case.batch,
        q_heads=case.heads,
        kv_heads=case.heads if case.kv_heads is None else case.kv_heads,
        q_len=case.q_len,
        k_len=case.k_len,
        head_dim=case.head_dim,
        value_dim=case.head_dim if case.value_dim is None else case.value_dim,
        dtype=torch.float32,
        device="cpu",
        mask=IntervalMask(left, 0 if case.causal else right, case.k_len - case.q_len, case.sink_tokens),
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        dropout_p=case.dropout_p,
        bias=None if bias is None else bias.dtype,
        alibi=case.alibi is not None,
        sinks=case.sinks,
        block=None if case.blocks is None else case.blocks.block,
    )
    problem = described(case)
    assert problem == replace(expected, scale=problem.scale)
    assert problem.scale == pytest.approx(expected.scale, rel=1e-15)


def test_a_problem_is_a_value() -> None:
    problem = described(CASES[0])
    assert problem == described(CASES[0]) and hash(problem) == hash(described(CASES[0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.batch = 2


def test_print() -> None:
    case = Case(5, 7, 8, 3, 2, 4, 2, window=(3, 1), bias=Bias("qk"), alibi="h", softcap=2.0, sinks=True, dropout_p=0.1)
    assert str(described(case, torch.bfloat16)) == (
        "batch 2, heads 4/2, length 5x7, dim 8/3, bfloat16 on cpu; window (3, 1) shift 2; bias; alibi; sinks; "
        "softcap 2; dropout_p 0.1"
    )
    assert str(described(Case(5, 7))) == "batch 1, heads 1/1, length 5x7, dim 16/16, float32 on cpu"
    assert "boolean mask" in str(described(Case(5, 7, bias=Bias("qk", "bool"))))
    assert "window (None, 0) shift 2" in str(described(Case(5, 7, causal=True)))
    blocks = Case(70, 80, window=(3, 0), sink_tokens=2, blocks=Blocks("11", (32, 64)))
    assert str(described(blocks)).endswith("; window (3, 0) shift 10; sink tokens 2; block mask of 32 x 64")
    # A single query at the end of the keys sees all of them: that is no mask at all.
    assert "window" not in str(described(Case(1, 7, causal=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_dtype(dtype: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_causal_is_a_window_closed_on_the_right() -> None:
    for window, expected in [(None, (None, 0)), ((3, 5), (3, 0)), ((None, None), (None, 0)), ((0, 0), (0, 0))]:
        mask = described(Case(5, 7, causal=True, window=window)).mask
        assert (mask.left, mask.right, mask.shift) == (*expected, 2)
