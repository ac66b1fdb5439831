"""The numerics budget: one rule for every backend, dtype and tensor.

    err(kernel) <= 2 * err(naive attention in the same dtype) + 1 ulp        (3 with softcap)

Errors are maxima over a tensor against the oracle, naive attention in float64 differentiated by autograd; the ulp is
the output dtype's at the oracle's largest value. There is no other tolerance for attention anywhere in the tests.

The yardstick, err(naive), has a backward that starts from out and lse, as every flash kernel's must (_FromLse). An
error's maximum is a matter of luck, over a few elements above all. So the yardstick is the largest of DRAWS: sums are
taken in another random order each time, and every second draw has other inputs.
float64 has no more exact oracle: there the yardstick is float32's error scaled by the ratio of the two epsilons, and
the oracle's own error, one yardstick more, is part of the distance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, default_scale

import flashx
from flashx import philox
from flashx.problem import accumulation_dtype

DRAWS = 8

# Tensors by name: "out", "lse" and "grad_" with each differentiable argument's name.
Results = dict[str, torch.Tensor]


def attend(case: Case, inputs: Inputs, backend: str | None = None) -> Results:
    """flashx.attention, forward and backward."""
    torch.manual_seed(case.seed)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.differentiable().items()}
    arguments = {**inputs.arguments(), **leaves, **case.options()}
    out, lse = case.attention()(**arguments, return_lse=True, backend=backend)
    return _results(out, lse, leaves, inputs)


def device_of(backend: str) -> str:
    """The device of the tensors that a backend takes; tests hold theirs on the CPU."""
    return "cuda" if backend == "cuda" else "cpu"


def without_float64(backend: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function for tensors on the CPU, computed by a CUDA backend; float64 skips the test."""
    device = device_of(backend)

    def attention(*tensors: torch.Tensor, **arguments: Any) -> Any:
        def there(value: Any) -> Any:
            if isinstance(value, flashx.BlockMask):
                return value.to(device)
            return _Moved.apply(value, device) if isinstance(value, torch.Tensor) and device != "cpu" else value

        query = tensors[0] if tensors else arguments["query"]
        if query.dtype == torch.float64:
            pytest.skip("the CUDA kernels have no float64")
        result = original(*map(there, tensors), **{name: there(value) for name, value in arguments.items()})
        return type(result)(*(part.cpu() for part in result)) if isinstance(result, tuple) else result.cpu()

    return attention


class _Moved(torch.autograd.Function):
    """The tensor on another device, with its strides and all the memory around it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: str) -> torch.Tensor:
        around = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
        return around.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.cpu(), None


def dropout_seed(case: Case) -> int:
    """The Philox seed that ``attend`` makes flashx.attention draw."""
    torch.manual_seed(case.seed)
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


def naive(case: Case, inputs: Inputs, dtype: torch.dtype, shuffle: torch.Generator | None = None) -> Results:
    """Naive attention in dtype, forward and backward.

    Without ``shuffle`` it is the oracle: differentiated by autograd alone. With it, it is the yardstick: its backward
    is _FromLse's, and head dims, keys and rows are summed in a random order, which changes nothing but roundings.
    """
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.differentiable().items()}
    group = case.heads // max(leaves["key"].shape[1], 1)
    key, value = (leaves[name].repeat_interleave(group, dim=1) for name in ("key", "value"))

    def order(size: int) -> torch.Tensor:
        return torch.arange(size) if shuffle is None else torch.randperm(size, generator=shuffle)

    dims, rows = order(case.head_dim), order(case.q_len)
    logits = leaves["query"][..., rows, :][..., dims] @ key[..., dims].mT
    logits = logits[..., rows.argsort(), :] * default_scale(case)
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)

    i, j = torch.arange(case.q_len)[:, None] + case.k_len - case.q_len, torch.arange(case.k_len)
    left, right = case.window or (None, None)
    visible = torch.ones(case.q_len, case.k_len, dtype=torch.bool)
    if case.causal:
        visible &= j <= i
    if left is not None:
        visible &= (j >= i - left) | (j < case.sink_tokens)
    if right is not None:
        visible &= j <= i + right
    if inputs.visible is not None:
        visible = visible & inputs.visible
    if inputs.alibi_slopes is not None:
        logits = logits - inputs.alibi_slopes.to(dtype)[..., None, None] * (i - j).abs()
    if "bias" in leaves:
        logits, visible = logits + leaves["bias"], visible & (leaves["bias"] != -torch.inf)
    elif inputs.bias is not None:
        visible = visible & inputs.bias
    logits = logits.masked_fill(~visible, -torch.inf)

    kept = torch.ones(logits.shape, dtype=dtype)
    if case.dropout_p > 0:
        keep = philox.keep_mask(dropout_seed(case), case.dropout_p, *logits.shape).to(dtype)
        kept = keep / (1 - case.dropout_p) if case.dropout_p < 1 else 0 * keep

    # One more key with value 0: the sink, or one that is hidden.
    sinks = leaves.get("sinks", torch.full((case.heads,), -torch.inf, dtype=dtype))
    logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    value, kept = torch.nn.functional.pad(value, (0, 0, 0, 1)), torch.nn.functional.pad(kept, (0, 1))

    keys, dims = order(case.k_len + 1), order(value.shape[3])
    logits, value, kept = logits[..., keys], value[..., keys, :][..., dims], kept[..., keys]
    if shuffle is None:
        out, lse = (_softmax(logits) * kept) @ value, _lse(logits)
    else:
        out, lse = _FromLse.apply(logits, value, kept, shuffle)
    return _results(out[..., dims.argsort()], lse, leaves, inputs)


def _results(out: torch.Tensor, lse: torch.Tensor, leaves: dict[str, torch.Tensor], inputs: Inputs) -> Results:
    above = (inputs.grad_out.to(out.dtype), inputs.grad_lse.to(lse.dtype))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), above, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; 0 in a row that sees nothing."""
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _lse(logits: torch.Tensor) -> torch.Tensor:
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


class _FromLse(torch.autograd.Function):
    """softmax(logits) @ value, with FlashAttention-2's backward (section 3.1): weights from lse, delta from out.

    lse is in the accumulation dtype, everything else in that of logits. The backward starts from an lse that is
    inexact by up to the one ulp that every budget grants.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, shuffle: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = (_softmax(logits) * kept) @ value, _lse(logits.to(accumulation_dtype(logits.dtype)))
        step = torch.randint(-1, 2, lse.shape, generator=shuffle)
        inexact = torch.nextafter(lse, torch.where(step == 0, lse, torch.inf * step))
        ctx.save_for_backward(logits, value, kept, out, lse.where(lse == -torch.inf, inexact))
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, value, kept, out, lse = ctx.saved_tensors
        weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).to(logits.dtype)
        delta = (grad_out * out).sum(-1) - grad_lse.to(logits.dtype)
        grad_logits = weights * (grad_out @ value.mT * kept - delta[..., None])
        return grad_logits, (weights * kept).mT @ grad_out, None, None


@functools.lru_cache(maxsize=16)
def oracle(case: Case, dtype: torch.dtype) -> Results:
    """The case's exact results for its inputs in dtype."""
    return naive(case, case.inputs(dtype), torch.float64)


@functools.lru_cache(maxsize=256)
def yardstick(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """The error of naive attention in dtype, tensor by tensor."""
    low = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(low).eps
    shuffle = torch.Generator().manual_seed(case.seed)
    worst: dict[str, float] = {}
    for draw in range(DRAWS):
        drawn = case if draw % 2 == 0 else replace(case, seed=case.seed + 1000 * draw)
        inputs, exact = drawn.inputs(low), oracle(drawn, low)
        measured = naive(drawn, inputs, low, shuffle)
        if low != torch.float32:  # lse is float32 there, so that is its yardstick
            measured["lse"] = naive(drawn, inputs, torch.float32, shuffle)["lse"]
        for name, tensor in measured.items():
            worst[name] = max(worst.get(name, 0.0), scale * error(tensor, exact[name]))
    return worst


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance of two tensors where both are finite."""
    return _distances(actual, expected).max().item() if actual.numel() else 0.0


def _distances(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    distances = (actual.double() - expected.double()).abs()
    return distances.masked_fill(~(actual.isfinite() & expected.isfinite()), 0)


def ulp(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The dtype's unit in the last place at the largest finite value."""
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(largest)[1] - 1) if largest else 0.0


def budgets(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """How far each result may be from the oracle's."""
    factor = (3 if case.softcap else 2) + (dtype == torch.float64)
    expected, naive_errors = oracle(case, dtype), yardstick(case, dtype)
    inputs = case.inputs(dtype)
    dtypes = {"out": dtype, "lse": accumulation_dtype(dtype)} | {
        f"grad_{name}": tensor.dtype for name, tensor in inputs.differentiable().items()
    }
    return {name: factor * naive_errors[name] + ulp(expected[name], dtypes[name]) for name in dtypes}


def check(case: Case, dtype: torch.dtype, results: Results) -> None:
    """Every result within its budget; a failure says everything needed to reproduce it."""
    expected, allowed = oracle(case, dtype), budgets(case, dtype)
    assert results.keys() == expected.keys() == allowed.keys()
    for name, actual in results.items():
        compare(f"{case} {dtype} {name}", actual, expected[name], allowed[name])


def compare(label: str, actual: torch.Tensor, expected: torch.Tensor, budget: float) -> None:
    """Shapes, then where inf and NaN stand, then values: no element further than budget from expected."""
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    for kind, of in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        _no(f"{label}: {kind} misplaced", of(actual) != of(expected), actual, expected)
    worst = f"error {error(actual, expected):.3g} over the budget {budget:.3g}"
    _no(f"{label}: {worst}", _distances(actual, expected) > budget, actual, expected)


def same_bits(label: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal element by element, NaN equal to NaN; for what threads, strides or neighbours must not change."""
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    differs = (actual != expected) & ~(actual.isnan() & expected.isnan())
    _no(f"{label}: bits differ", differs, actual, expected)


def _no(message: str, bad: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail if any element is bad, showing the first one."""
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{message}\n  {int(bad.sum())} of {bad.numel()} elements, first at {index}: "
            f"{actual[index].item()!r}, expected {expected[index].item()!r}"
        )
