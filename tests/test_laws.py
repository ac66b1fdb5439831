"""What must hold of attention whatever the numbers: determinism, independence, and the equalities between its features.

Where a law says that something must not matter (threads, neighbours, strides), results are equal bit by bit. Where it
equates two ways of saying the same, each side has its own roundings and the two may differ by both sides' budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import tolerance
import torch
from cases import STORAGES, Bias, Case, Inputs
from conftest import ENGINES
from hypothesis import given, settings
from hypothesis import strategies as st

import flashx
from flashx.masks import IntervalMask

# Several row tiles and key tiles in every instruction set, several tasks for the threads.
LARGE = [
    Case(417, 390, 40, 24, batch=2, heads=4, kv_heads=2, causal=True, sinks=True),
    Case(
        200, 330, 16, batch=3, heads=3, window=(90, 5), bias=Bias("1hqk", "hide"), alibi="h", softcap=4.0, dropout_p=0.2
    ),
    Case(1, 700, 64, batch=2, heads=8, kv_heads=2, bias=Bias("b11k", "bool")),
    Case(130, 140, 8, batch=3, heads=2, bias=Bias("1h1k")),
]


# torch's matmul, and so the reference, does not promise the bits.
kernels = pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "reference"], indirect=True)


def assert_same(actual: tolerance.Results, expected: tolerance.Results) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        tolerance.same_bits(name, actual[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_every_time(case: Case, dtype: torch.dtype, engine: str) -> None:
    inputs = case.inputs(dtype)
    first = tolerance.attend(case, inputs, engine)
    for _ in range(3):
        assert_same(tolerance.attend(case, inputs, engine), first)


@kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_on_any_number_of_threads(case: Case, dtype: torch.dtype, engine: str) -> None:
    inputs = case.inputs(dtype)
    torch.set_num_threads(1)
    alone = tolerance.attend(case, inputs, engine)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same(tolerance.attend(case, inputs, engine), alone)


def _batch(inputs: Inputs, index: torch.Tensor) -> Inputs:
    """The chosen batch entries; what has no batch dimension, or broadcasts over it, stays."""
    size = inputs.query.shape[0]
    return inputs.map(lambda tensor: tensor[index] if tensor.dim() > 1 and tensor.shape[0] == size else tensor)


@kernels
@pytest.mark.parametrize("case", LARGE[:3], ids=str)
def test_a_permuted_batch_permutes_the_result(case: Case, engine: str) -> None:
    case = replace(case, dropout_p=0.0)  # its bits depend on the place in the batch
    inputs = case.inputs(torch.float32)
    order = torch.arange(case.batch).roll(1)
    results = tolerance.attend(case, inputs, engine)
    permuted = tolerance.attend(case, _batch(inputs, order), engine)
    for name in ("out", "lse", "grad_query", "grad_key", "grad_value"):
        tolerance.same_bits(name, permuted[name], results[name][order])


@kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE[:3], ids=str)
def test_a_sequence_does_not_depend_on_its_neighbours(case: Case, dtype: torch.dtype, engine: str) -> None:
    case = replace(case, dropout_p=0.0)
    inputs = case.inputs(dtype)
    torch.set_num_threads(2)
    together = tolerance.attend(case, inputs, engine)
    for index in range(case.batch):
        single = replace(case, batch=1)
        alone = tolerance.attend(single, _batch(inputs, torch.tensor([index])), engine)
        for name in ("out", "lse", "grad_query", "grad_key", "grad_value"):
            tolerance.same_bits(f"{name} of {index}", alone[name], together[name][index : index + 1])


@pytest.mark.parametrize("storage", [name for name in STORAGES if not name.startswith("one_")])
def test_strides_do_not_matter(storage: str, engine: str) -> None:
    case = Case(65, 131, 24, 40, batch=2, heads=4, kv_heads=2, bias=Bias("bhqk"), causal=True)
    plain = case.inputs(torch.float32)
    stored = plain.map(lambda tensor: STORAGES[storage](tensor) if tensor.dim() == 4 else tensor)
    assert_same(tolerance.attend(case, stored, engine), tolerance.attend(case, plain, engine))


@pytest.mark.parametrize("case", LARGE[:2], ids=str)
def test_backward_does_not_depend_on_which_gradients_are_asked_for(case: Case, engine: str) -> None:
    inputs = case.inputs(torch.float32)
    every = tolerance.attend(case, inputs, engine)
    torch.manual_seed(case.seed)
    key = inputs.key.detach().requires_grad_()
    out = flashx.attention(**{**inputs.arguments(), "key": key}, **case.options(), backend=engine)
    without_lse = tolerance.attend(case, replace(inputs, grad_lse=torch.zeros_like(inputs.grad_lse)), engine)
    (grad,) = torch.autograd.grad(out, key, inputs.grad_out)
    tolerance.same_bits("out", out.detach(), every["out"])
    tolerance.same_bits("grad_key", grad, without_lse["grad_key"])


# Two ways of saying the same.


def assert_equal(case: Case, actual: tolerance.Results, expected: tolerance.Results) -> None:
    """Each side may be its own budget away from the truth."""
    budgets = tolerance.budgets(case, torch.float32)
    for name in actual.keys() & expected.keys():
        tolerance.compare(f"{case} {name}", actual[name], expected[name], 2 * budgets[name])


def assert_equivalent(one: Case, other: Case, change: Callable[[Inputs], Inputs], engine: str) -> None:
    """``one`` with its inputs and ``other`` with the changed ones give the same out, lse and gradients."""
    inputs = one.inputs(torch.float32)
    assert_equal(one, tolerance.attend(one, inputs, engine), tolerance.attend(other, change(inputs), engine))


def _distance(case: Case) -> torch.Tensor:
    """i + shift - j."""
    return torch.arange(case.q_len)[:, None] + case.k_len - case.q_len - torch.arange(case.k_len)


@pytest.mark.parametrize("q_len, k_len", [(37, 37), (65, 131), (131, 65)])
def test_causal_is_a_mask(q_len: int, k_len: int, engine: str) -> None:
    one = Case(q_len, k_len, heads=2, causal=True)
    assert_equivalent(one, replace(one, causal=False), lambda x: replace(x, bias=_distance(one) >= 0), engine)


@pytest.mark.parametrize("q_len, k_len", [(37, 37), (65, 131), (131, 65)])
def test_a_window_is_a_mask(q_len: int, k_len: int, engine: str) -> None:
    one = Case(q_len, k_len, heads=2, window=(17, 3))
    mask = (_distance(one) <= 17) & (_distance(one) >= -3)
    assert_equivalent(one, replace(one, window=None), lambda x: replace(x, bias=mask), engine)


def test_a_bool_mask_is_a_bias_of_minus_infinity(engine: str) -> None:
    one = Case(67, 131, heads=2, bias=Bias("bhqk", "bool_rows"))
    hide = lambda x: replace(x, bias=torch.zeros(x.bias.shape).masked_fill(~x.bias, -torch.inf))  # noqa: E731
    assert_equivalent(one, one, hide, engine)


def test_alibi_is_a_bias(engine: str) -> None:
    one = Case(65, 131, batch=2, heads=4, kv_heads=2, alibi="bh", causal=True)
    as_bias = lambda x: replace(  # noqa: E731
        x, alibi_slopes=None, bias=-x.alibi_slopes[..., None, None] * _distance(one).abs()
    )
    assert_equivalent(one, replace(one, alibi=None), as_bias, engine)


def test_grouped_heads_are_repeated_heads(engine: str) -> None:
    """Key and value gradients are then sums over each group."""
    one = Case(65, 97, 24, 40, batch=2, heads=6, kv_heads=2, causal=True, sinks=True)
    inputs = one.inputs(torch.float32)
    repeated = replace(inputs, key=inputs.key.repeat_interleave(3, 1), value=inputs.value.repeat_interleave(3, 1))
    actual = tolerance.attend(one, inputs, engine)
    expected = tolerance.attend(one, repeated, engine)
    for name in ("grad_key", "grad_value"):
        expected[name] = expected[name].unflatten(1, (2, 3)).sum(2)
    assert_equal(one, actual, expected)


def test_a_sink_is_a_key_with_value_zero(engine: str) -> None:
    """With logit 0, a key of zeros says the same without a bias."""
    one = Case(65, 97, heads=2, sinks=True)
    inputs = one.inputs(torch.float32)
    inputs = replace(inputs, sinks=torch.zeros(2))
    more = lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 0, 1))  # noqa: E731
    other = replace(one, k_len=98)
    expected = tolerance.attend(
        other, replace(inputs, key=more(inputs.key), value=more(inputs.value), sinks=None), engine
    )
    for name in ("grad_key", "grad_value"):
        expected[name] = expected[name][..., :-1, :]
    assert_equal(one, tolerance.attend(one, inputs, engine), expected)


def test_a_constant_on_all_logits_changes_lse_alone(engine: str) -> None:
    one = Case(65, 97, heads=2)
    inputs = one.inputs(torch.float32)
    plain = tolerance.attend(one, inputs, engine)
    shifted = tolerance.attend(one, replace(inputs, bias=torch.full((1,), 0.5)), engine)
    shifted["lse"] = shifted["lse"] - 0.5
    assert_equal(one, shifted, plain)


def test_a_zero_scale_averages_the_visible_values(engine: str) -> None:
    case = Case(40, 40, 8, scale=0.0, causal=True)
    inputs = case.inputs(torch.float64)
    count = torch.arange(1, 41, dtype=torch.float64)
    out, lse = flashx.attention(
        inputs.query, inputs.key, inputs.value, causal=True, scale=0.0, return_lse=True, backend=engine
    )
    torch.testing.assert_close(out, inputs.value.cumsum(2) / count[:, None], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse, count.log().expand_as(lse), rtol=1e-14, atol=1e-14)


def _split(case: Case, inputs: Inputs, cuts: Sequence[int], engine: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention over each piece of the keys; the mask, cut in pieces too, keeps absolute positions."""
    left, right = (None, None) if case.window is None else case.window
    mask = IntervalMask(left, 0 if case.causal else right, case.k_len - case.q_len).dense(case.q_len, case.k_len)
    borders = [0, *cuts, case.k_len]
    return [
        flashx.attention(
            inputs.query,
            inputs.key[:, :, a:b],
            inputs.value[:, :, a:b],
            bias=mask[:, a:b],
            return_lse=True,
            backend=engine,
        )
        for a, b in itertools.pairwise(borders)
    ]


@pytest.mark.parametrize("cuts", [[1], [64], [50, 50, 51], [0, 130], list(range(7, 131, 7))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [None, (30, 5)])
def test_merged_pieces_are_one_pass(
    window: tuple[int, int] | None, dtype: torch.dtype, cuts: list[int], engine: str
) -> None:
    """Pieces may be empty, and with a window most rows see nothing of most pieces."""
    case = Case(97, 131, 16, 24, batch=2, heads=2, window=window)
    merged = flashx.merge_attention(_split(case, case.inputs(dtype), cuts, engine))
    exact, budgets = tolerance.oracle(case, dtype), tolerance.budgets(case, dtype)
    for name in ("out", "lse"):
        tolerance.compare(f"{case} {cuts} {name}", getattr(merged, name), exact[name], budgets[name])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_split_merges(data: st.DataObject) -> None:
    q_len, k_len = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    width = st.none() | st.integers(0, 50)
    window = data.draw(st.tuples(width, width))
    cuts = sorted(data.draw(st.lists(st.integers(0, k_len), max_size=5)))
    case = Case(q_len, k_len, 8, window=window, causal=data.draw(st.booleans()))
    merged = flashx.merge_attention(_split(case, case.inputs(torch.float64), cuts, "reference"))
    exact, budgets = tolerance.oracle(case, torch.float64), tolerance.budgets(case, torch.float64)
    for name in ("out", "lse"):
        tolerance.compare(f"{case} {cuts} {name}", getattr(merged, name), exact[name], budgets[name])


def test_the_first_rows_of_a_causal_sequence_do_not_see_its_rest(engine: str) -> None:
    """Prefix property: attention over the first n tokens is the first n rows."""
    case = Case(150, 150, 16, heads=2, causal=True)
    inputs = case.inputs(torch.float32)
    whole = tolerance.attend(case, inputs, engine)
    budgets = tolerance.budgets(case, torch.float32)
    for n in (1, 64, 97):
        part = flashx.attention(
            *(t[:, :, :n] for t in (inputs.query, inputs.key, inputs.value)), causal=True, backend=engine
        )
        tolerance.compare(f"first {n}", part, whole["out"][:, :, :n], 2 * budgets["out"])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "left, right", [(None, 0), (0, None), (40, 170), (-3, 60), (200, -130), (0, 0), (-5, 4), (None, None)]
)
@pytest.mark.parametrize("shift", [-320, -90, 0, 7, 250, 410])
def test_any_interval_is_a_mask(shift: int, left: int | None, right: int | None, engine: str) -> None:
    """The operator takes any interval, empty ones too; sweeps over rows and over keys must name the same tiles."""
    case = Case(150, 400, 8, heads=4, kv_heads=2)
    inputs = case.inputs(torch.float32)
    device = tolerance.device_of(engine)
    dense = IntervalMask(left, right, shift).dense(case.q_len, case.k_len, device)
    torch.set_num_threads(2)
    results = []
    for interval, mask in (((left, right, shift), None), ((None, None, 0), dense)):
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value)]
        out, lse = torch.ops.flashx.attention(*leaves, mask, None, None, None, *interval, 0.3, 0.0, 0.0, engine)
        grads = torch.autograd.grad((out, lse), leaves, (inputs.grad_out.to(device), inputs.grad_lse.to(device)))
        results.append([tensor.detach().cpu() for tensor in (out, lse, *grads)])
    budgets = tolerance.budgets(replace(case, bias=Bias("qk", "bool_rows"), scale=0.3), torch.float32)
    for name, actual, expected in zip(budgets, *results, strict=True):
        tolerance.compare(name, actual, expected, 2 * budgets[name])
