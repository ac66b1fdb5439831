"""The fused kernels of 2-simplicial attention through Triton's interpreter; test_triton.py runs this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import test_simplicial
import tolerance
import torch
from test_simplicial import inputs, naive, results

import flashx
from flashx import simplicial
from flashx.triton_impl import tuning

pytest.importorskip("triton")

assert os.environ.get("TRITON_INTERPRET") == "1"
INF, NAN = float("inf"), float("nan")
# As test_simplicial's; dtypes differ by what they are rounded to alone, so each case has one.
CASES = [
    ((1, 2, 1, 3, 8, 8, 2, 2), torch.float16),
    ((1, 3, 1, 37, 16, 16, 16, 1), torch.float16),
    ((1, 1, 1, 50, 8, 40, 1, 16), torch.bfloat16),
    ((2, 4, 2, 19, 16, 8, 9, 5), torch.float32),
    # More rows than a tile of 512 pairs has, more keys than one of 64; windows that end in the middle of either.
    ((1, 1, 1, 70, 8, 8, 40, 17), torch.float32),
    ((1, 2, 1, 18, 8, 16, 100, 100), torch.float16),
]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test falls back unseen."""

    class Refuses(simplicial._Simplicial):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            raise AssertionError("the composition ran")

    monkeypatch.setattr(simplicial, "_Simplicial", Refuses)
    yield


def attend(tensors: list[torch.Tensor], *windows: int, **options: Any) -> Any:
    query, key, value, key2, value2 = tensors
    return flashx.simplicial_attention(
        query, key, value, key2, value2, *windows, return_lse=True, backend="triton", **options
    )


@pytest.mark.parametrize("case, dtype", CASES, ids=str)
def test_formula(case: tuple[int, ...], dtype: torch.dtype) -> None:
    test_simplicial.check(case, dtype, "triton")


def test_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some that are wholly visible, with parts that are no pair; windows that end where tiles do."""
    small = tuning.SimplicialSweeps(*[tuning.Tiles(32, 16, 4, 1)] * 4)
    monkeypatch.setattr(tuning, "_SIMPLICIAL_INTERPRETED", small)
    test_simplicial.check((1, 2, 1, 60, 24, 24, 33, 3), torch.bfloat16, "triton")
    test_simplicial.check((1, 1, 1, 49, 8, 8, 32, 16), torch.float32, "triton")
    # Logits of -216, beside the 0 of what is no pair.
    tensors = [size * torch.ones(1, 1, 40, 8) for size in (-3.0, 3.0, 1.0, 3.0, 1.0)]
    out, lse = attend(tensors, 33, 3, scale=1.0)
    pairs = torch.arange(1, 41).clamp(max=33) * torch.arange(1, 41).clamp(max=3)
    torch.testing.assert_close(out, torch.ones_like(out))
    torch.testing.assert_close(lse, (pairs.log() - 216)[None, None])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    tensors = inputs((1, 2, 1, 20, 8, 8, 7, 3), torch.float32)
    actual = results(lambda leaves: attend(leaves, 7, 3, scale=scale), tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = results(lambda leaves: naive(leaves, 7, 3, scale), wide)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor.float(), rtol=1e-5, atol=1e-5)


def test_any_strides() -> None:
    tensors = inputs((2, 4, 2, 9, 8, 16, 4, 3), torch.float32)
    expected = results(lambda leaves: attend(leaves, 4, 3), tensors)
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors]
    strided[3] = tensors[3].detach().mT.contiguous().mT.requires_grad_()
    for name, tensor in results(lambda leaves: attend(leaves, 4, 3), strided).items():
        tolerance.same_bits(name, tensor, expected[name])


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_what_a_row_does_not_see_does_not_reach_it(which: int, poison: float) -> None:
    """Rows before the poisoned key and rows whose window has passed it, forward and backward."""
    windows, at = (6, 3), 8
    tensors = inputs((1, 2, 1, 30, 8, 8, *windows), torch.float32)
    window = windows[(which - 1) // 2]
    unreached = [i for i in range(30) if not at <= i < at + window]
    expected = attend(tensors, *windows)
    before = torch.autograd.grad(expected.out[:, :, unreached].sum(), tensors)
    with torch.no_grad():
        tensors[which][:, :, at] = poison
    actual = attend(tensors, *windows)
    after = torch.autograd.grad(actual.out[:, :, unreached].sum(), tensors)
    for part, of in zip(actual, expected, strict=True):
        tolerance.same_bits("rows", part[:, :, unreached], of[:, :, unreached])
    assert not actual.out[:, :, at : at + window].isfinite().all()
    # Keys that no reached row sees; others get NaN from those rows, whose gradient of 0 NaN is multiplied by.
    apart = [i for i in range(30) if not at - max(windows) < i < at + window]
    for name, one, other in zip(test_simplicial.NAMES, after, before, strict=True):
        tolerance.same_bits(name, one[:, :, apart], other[:, :, apart])


@pytest.mark.parametrize("which", [0, 2, 3])
def test_one_gradient_at_a_time(which: int) -> None:
    tensors = inputs((1, 2, 1, 12, 8, 8, 5, 8), torch.float32)
    all_of_them = torch.autograd.grad(attend(tensors, 5, 8).lse.sum(), tensors, materialize_grads=True)
    alone = [t.detach().requires_grad_(i == which) for i, t in enumerate(tensors)]
    (grad,) = torch.autograd.grad(attend(alone, 5, 8).lse.sum(), alone[which])
    tolerance.same_bits(test_simplicial.NAMES[which], grad, all_of_them[which])


def test_explained() -> None:
    tensors = [t.detach() for t in inputs((1, 2, 1, 12, 8, 8, 5, 3), torch.float32)]
    explained = flashx.explain(flashx.simplicial_attention, *tensors, 5, 3, backend="triton")
    assert (explained.backend, explained.kernel) == ("triton", "triton/interpreted/simplicial")
    assert explained.refusals["triton"] == []
    explained = flashx.explain(flashx.simplicial_attention, *tensors, 5, 3, backend="cpu")
    assert explained.backend == "cpu" and "triton/simplicial" not in explained.refusals


def test_wide_float32_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture
    tensors = inputs((1, 1, 1, 4, 136, 8, 3, 2), torch.float32)
    explained = flashx.explain(flashx.simplicial_attention, *tensors, 3, 2, backend="triton")
    assert explained.kernel == "triton/interpreted"
    assert explained.refusals["triton/simplicial"] == ["the fused kernels take float32 head dims up to 128"]
    assert "triton/simplicial: the fused kernels" in str(explained)
    out, _ = attend(tensors, 3, 2)
    wide = [t.detach().double() for t in tensors]
    torch.testing.assert_close(out, naive(wide, 3, 2, 136**-0.5)[0].float())
