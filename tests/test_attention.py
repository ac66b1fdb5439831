"""flashx.attention: every case, forward and backward, within the numerics budget (tolerance.py), on every engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import tolerance
import torch
from cases import CASES, COMBINED, Bias, Case
from conftest import CUDA_ENGINES, ENGINES

import flashx

HALVES = (torch.bfloat16, torch.float16)


def _runs() -> Iterator[Any]:
    """All cases on the reference, the best engine and the CUDA kernels, a third of them on every other.

    One half type each; the CUDA kernels have no float64.
    """
    for number, case in enumerate(CASES):
        for dtype in (torch.float32, torch.float64, HALVES[number % 2]):
            for index, engine in enumerate(ENGINES):
                if dtype == torch.float64 and engine in CUDA_ENGINES:
                    continue
                if engine in (ENGINES[0], "reference", *CUDA_ENGINES) or (number + index) % 3 == 0:
                    yield pytest.param(case, dtype, engine, id=f"{case}-{str(dtype).removeprefix('torch.')}-{engine}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case, dtype, engine", list(_runs()), indirect=["engine"])
def test_within_budget(case: Case, dtype: torch.dtype, engine: str) -> None:
    results = tolerance.attend(case, case.inputs(dtype), engine)
    tolerance.check(case, dtype, results)


def test_result_dtypes_and_shapes() -> None:
    case = Case(5, 7, 8, 3, batch=2, heads=4, kv_heads=2)
    for dtype in (torch.float32, torch.float64, *HALVES):
        inputs = case.inputs(dtype)
        out, lse = flashx.attention(inputs.query, inputs.key, inputs.value, return_lse=True)
        assert (out.shape, out.dtype) == ((2, 4, 5, 3), dtype)
        assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float64 if dtype == torch.float64 else torch.float32)
        alone = flashx.attention(inputs.query, inputs.key, inputs.value)
        tolerance.same_bits("out without lse", alone, out)


def test_output_keeps_the_order_of_heads_and_length() -> None:
    """A (B, L, H, D) query gives a (B, L, H, D) output, so that merging the heads again is a view."""
    query, key, value = (torch.randn(2, 5, 4, 8).transpose(1, 2) for _ in range(3))
    out = flashx.attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()
    assert flashx.attention(query.contiguous(), key, value).is_contiguous()


# One argument at a time requires a gradient, and either result alone has one.
WANTED = ["query", "key", "value", "bias", "sinks"]


@pytest.mark.parametrize("above", ["out", "lse"])
@pytest.mark.parametrize("wanted", WANTED)
def test_one_gradient_at_a_time(wanted: str, above: str, engine: str) -> None:
    case = replace(COMBINED[1], dropout_p=0.2)
    inputs = case.inputs(torch.float32)
    leaf = getattr(inputs, wanted).detach().requires_grad_()
    torch.manual_seed(case.seed)
    result = flashx.attention(**{**inputs.arguments(), wanted: leaf}, **case.options(), return_lse=True, backend=engine)
    (grad,) = torch.autograd.grad(getattr(result, above), leaf, getattr(inputs, f"grad_{above}"))
    other = "grad_lse" if above == "out" else "grad_out"
    zero = replace(inputs, **{other: torch.zeros_like(getattr(inputs, other))})
    tolerance.same_bits(f"grad_{wanted}", grad, tolerance.attend(case, zero, engine)[f"grad_{wanted}"])


@pytest.mark.parametrize("storage", ["expanded", "bhdl", "blhd"])
def test_any_strides_of_the_gradient_from_above(storage: str, engine: str) -> None:
    """out.sum() sends back a gradient with all strides 0."""
    case = Case(35, 67, 24, 17, batch=2, heads=4, kv_heads=2, causal=True)
    inputs = case.inputs(torch.float32)
    if storage == "expanded":
        grad_out = torch.ones(()).expand(inputs.grad_out.shape)
    else:
        order = {"bhdl": (0, 1, 3, 2), "blhd": (0, 2, 1, 3)}[storage]
        grad_out = inputs.grad_out.permute(order).contiguous().permute(order)
    odd = tolerance.attend(case, replace(inputs, grad_out=grad_out), engine)
    even = tolerance.attend(case, replace(inputs, grad_out=grad_out.contiguous()), engine)
    for name in even:
        tolerance.same_bits(name, odd[name], even[name])


def test_strided_gradient_of_lse(engine: str) -> None:
    case = Case(35, 67, 8, heads=2)
    inputs = case.inputs(torch.float32)
    strided = torch.stack([inputs.grad_lse, inputs.grad_lse], dim=-1)[..., 0]
    odd = tolerance.attend(case, replace(inputs, grad_lse=strided), engine)
    for name, even in tolerance.attend(case, inputs, engine).items():
        tolerance.same_bits(name, odd[name], even)


def test_inputs_are_left_alone(engine: str) -> None:
    case = COMBINED[2]
    inputs = case.inputs(torch.float32)
    copy = inputs.map(torch.clone)
    tolerance.attend(case, inputs, engine)
    for field in fields(inputs):
        before, after = getattr(copy, field.name), getattr(inputs, field.name)
        if before is not None:
            tolerance.same_bits(field.name, after, before)


def test_inference_mode_and_no_grad(engine: str) -> None:
    case = COMBINED[0]
    inputs = case.inputs(torch.float32)
    expected = tolerance.attend(case, inputs, engine)["out"]
    arguments = {**inputs.arguments(), "query": inputs.query.detach().requires_grad_()}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = flashx.attention(**arguments, **case.options(), backend=engine)
        assert not out.requires_grad
        tolerance.same_bits(mode.__name__, out, expected)


def test_same_tensor_three_times(engine: str) -> None:
    """Self-attention without projections: the gradient is the sum of three."""
    x = torch.randn(1, 2, 33, 8, dtype=torch.float64, requires_grad=True)
    once = torch.autograd.grad(flashx.attention(x, x, x, causal=True, backend=engine).sum(), x)[0]
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    thrice = torch.autograd.grad(flashx.attention(*parts, causal=True, backend=engine).sum(), parts)
    torch.testing.assert_close(once, sum(thrice), rtol=1e-14, atol=1e-14)


def test_sinks_of_any_floating_dtype(engine: str) -> None:
    """Sinks and slopes may be float32 parameters beside bfloat16 activations, or the other way round."""
    case = Case(9, 17, heads=2, sinks=True, alibi="h")
    inputs = case.inputs(torch.bfloat16)
    results = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        other = replace(inputs, sinks=inputs.sinks.to(dtype))
        results[dtype] = tolerance.attend(case, other, engine)
        assert results[dtype]["grad_sinks"].dtype == dtype
        tolerance.same_bits("out", results[dtype]["out"], results[torch.float32]["out"])


def test_rows_that_see_nothing(engine: str) -> None:
    """out 0, lse -inf, gradients 0: by a mask, by a window beyond the keys, without any key, and with -inf."""
    nothing: list[Case] = [
        Case(5, 7, bias=Bias("qk", "bool_none")),
        Case(5, 7, bias=Bias("bhqk", "hide_all"), alibi="h", softcap=2.0),
        Case(70, 0, causal=True),
    ]
    for case in nothing:
        results = tolerance.attend(case, case.inputs(torch.float32), engine)
        assert (results.pop("lse") == -torch.inf).all(), case
        for name, tensor in results.items():
            assert (tensor == 0).all(), (str(case), name)
    results = tolerance.attend(case := Case(70, 3, window=(1, 1)), case.inputs(torch.float32), engine)
    # shift = -67: row 65's window ends at key -1, row 66's at key 0.
    assert (results["lse"][..., :66] == -torch.inf).all() and results["lse"][..., 66:].isfinite().all()
    assert (results["out"][..., :66, :] == 0).all() and (results["grad_query"][..., :66, :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_rows_at_the_lowest_finite_bias(dtype: torch.dtype, engine: str) -> None:
    """torch.finfo(dtype).min, the mask of many models, hides nothing: a row full of it weighs all keys the same.

    Beside a key at 0 it is as good as hidden. Of a row full of it, lse keeps nothing but that, so out alone is checked.
    """
    case = Case(33, 170, 8, heads=2, bias=Bias("qk", "lowest"))
    out, lse = flashx.attention(**case.inputs(dtype).arguments(), return_lse=True, backend=engine)
    expected, budgets = tolerance.oracle(case, dtype), tolerance.budgets(case, dtype)
    tolerance.compare(f"{case} {dtype} out", out, expected["out"], budgets["out"])
    assert lse.isfinite().all()
