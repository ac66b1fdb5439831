"""flashx.simplicial_attention against its formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tolerance
import torch

import flashx
from flashx import simplicial
from flashx.problem import accumulation_dtype

NAMES = ("query", "key", "value", "key2", "value2")
CASES = [
    # batch, heads, kv heads, length, dim, value dim, window, window2
    (1, 2, 1, 3, 8, 8, 2, 2),
    (2, 4, 2, 50, 16, 8, 9, 5),
    (1, 2, 1, 60, 24, 24, 33, 3),
    (1, 2, 2, 40, 16, 16, 100, 100),
    (1, 1, 1, 50, 8, 40, 1, 16),
    (1, 3, 1, 37, 16, 16, 16, 1),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    batch, heads, kv_heads, length, dim, value_dim, *_ = case
    generator = torch.Generator().manual_seed(length)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim), (kv_heads, dim), (kv_heads, value_dim)]
    return [
        torch.randn(batch, h, length, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h, d in shapes
    ]


def naive(
    tensors: list[torch.Tensor], window: int, window2: int, scale: float, shuffle: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, all pairs at once; with shuffle, the yardstick (tolerance.py), whose backward starts from lse."""
    query, *rest = tensors
    key, value, key2, value2 = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in rest)
    logits = torch.einsum("bhid,bhjd,bhkd->bhijk", query, key, key2) * scale
    i = torch.arange(query.shape[2])
    back = i[:, None] - i
    visible = ((back >= 0) & (back < window))[:, :, None] & ((back >= 0) & (back < window2))[:, None]
    logits = logits.masked_fill(~visible, -torch.inf).flatten(3)
    if shuffle is not None:
        products = (value[:, :, :, None] * value2[:, :, None]).flatten(2, 3)
        return tolerance._FromLse.apply(logits, products, torch.ones_like(logits), shuffle)
    weights = logits.softmax(-1).view(*logits.shape[:3], len(i), len(i))
    wide = logits.to(accumulation_dtype(logits.dtype))
    return torch.einsum("bhijk,bhjd,bhkd->bhid", weights, value, value2), wide.logsumexp(-1)


def results(function: Callable[..., Any], tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    out, lse = function(tensors)
    generator = torch.Generator().manual_seed(1)
    above = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    grads = torch.autograd.grad((out, lse), tensors, above)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(NAMES, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula(case: tuple[int, ...], dtype: torch.dtype, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine != "cpu" and dtype != torch.float32:
        pytest.skip("what the dtype changes is attention's")
    monkeypatch.setattr(simplicial, "_ROWS", 64)  # several chunks
    check(case, dtype, engine)


def check(case: tuple[int, ...], dtype: torch.dtype, engine: str) -> None:
    """Every result within its budget."""
    tensors, (window, window2) = inputs(case, dtype), case[-2:]
    scale = case[4] ** -0.5

    def ours(leaves: list[torch.Tensor]) -> Any:
        query, key, value, key2, value2 = leaves
        return flashx.simplicial_attention(
            query, key, value, key2, value2, window, window2, return_lse=True, backend=engine
        )

    actual = results(ours, tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = results(lambda leaves: naive(leaves, window, window2, scale), wide)
    low = [t.detach().to(torch.float32 if dtype == torch.float64 else dtype).requires_grad_() for t in tensors]
    exact_low = results(
        lambda leaves: naive(leaves, window, window2, scale), [t.detach().double().requires_grad_() for t in low]
    )
    factor = torch.finfo(dtype).eps / torch.finfo(low[0].dtype).eps
    yardstick = dict.fromkeys(exact, 0.0)
    for draw in range(tolerance.DRAWS):
        shuffle = torch.Generator().manual_seed(draw)
        rough = results(lambda leaves: naive(leaves, window, window2, scale, shuffle), low)  # noqa: B023
        for name, tensor in rough.items():
            yardstick[name] = max(yardstick[name], factor * tolerance.error(tensor, exact_low[name]))
    for name, expected in exact.items():
        # Two more roundings than the formula in one piece has: query times key2, and the parts of out.
        budget = 3 * yardstick[name] + 2 * tolerance.ulp(expected, actual[name].dtype)
        tolerance.compare(name, actual[name], expected, budget)


def test_one_second_key_is_plain_attention() -> None:
    query, key, value, key2, value2 = (t.detach() for t in inputs((1, 2, 2, 40, 16, 16), torch.float64))
    out = flashx.simplicial_attention(query, key, value, key2, value2, 12, 1)
    plain = flashx.attention(query * key2, key, value, causal=True, window=(11, 0))
    torch.testing.assert_close(out, plain * value2)


def test_gradcheck() -> None:
    tensors = inputs((1, 2, 1, 7, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: flashx.simplicial_attention(*t, 4, 3, return_lse=True), tensors)


def test_without_queries() -> None:
    empty = torch.zeros(1, 2, 0, 8, requires_grad=True)
    out = flashx.simplicial_attention(empty, empty, empty, empty, empty, 4, 3)
    assert out.shape == (1, 2, 0, 8)
    out.sum().backward()


@pytest.mark.parametrize("case, rows", [(CASES[1], 64), (CASES[2], 100), (CASES[0], 2**13)], ids=str)
def test_explained_is_the_largest_call(case: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplicial, "_ROWS", rows)
    calls = []

    def record(*tensors: torch.Tensor, return_lse: bool, **options: Any) -> Any:
        calls.append(flashx.explain(*tensors, **options))
        return attention(*tensors, return_lse=return_lse, **options)

    attention = simplicial.attention
    monkeypatch.setattr(simplicial, "attention", record)
    tensors = inputs(case, torch.float32)
    flashx.simplicial_attention(*tensors, *case[-2:], backend="reference")
    explained = flashx.explain(flashx.simplicial_attention, *tensors, *case[-2:], backend="reference")
    assert explained == max(calls, key=lambda call: (call.problem.q_len, call.problem.k_len))
    assert (len(calls) > 1) == (rows < 2**13) and explained.backend == "reference"


def test_explained_without_queries() -> None:
    empty = torch.zeros(1, 2, 0, 8)
    assert flashx.explain(flashx.simplicial_attention, *[empty] * 5, 4, 3).problem.q_len == 0


GOOD = dict(zip(NAMES, (torch.zeros(1, 2, 5, 8) for _ in NAMES), strict=True)) | {"window": 3, "window2": 2}


@pytest.mark.parametrize(
    "changes, error, parts",
    [
        ({"key2": None}, TypeError, ("key2", "torch.Tensor", "NoneType")),
        ({"key2": torch.zeros(1, 2, 5, 4)}, ValueError, ("key2", "(1, 2, 5, 8)", "(1, 2, 5, 4)")),
        ({"value2": torch.zeros(1, 2, 4, 8)}, ValueError, ("value2", "value's shape", "(1, 2, 4, 8)")),
        ({"value2": torch.zeros(1, 2, 5, 8).double()}, TypeError, ("value2", "float32", "float64")),
        ({"query": torch.zeros(1, 2, 6, 8)}, ValueError, ("key", "length 6", "(1, 2, 5, 8)")),
        ({"query": torch.zeros(1, 3, 5, 8)}, ValueError, ("multiple", "3 and 2")),
        ({"window": 0}, ValueError, ("window", ">= 1", "0")),
        ({"window2": 1.0}, TypeError, ("window2", "int", "float")),
        ({"window2": True}, TypeError, ("window2", "int", "bool")),
        ({"scale": "1"}, TypeError, ("scale", "number", "str")),
        ({"backend": "cudnn"}, ValueError, ("backend", "cudnn")),
    ],
    ids=str,
)
def test_bad_argument(changes: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    for function in (flashx.simplicial_attention, functools.partial(flashx.explain, flashx.simplicial_attention)):
        with pytest.raises(error) as raised:
            function(**(GOOD | changes))
        assert all(part in str(raised.value) for part in parts), str(raised.value)
