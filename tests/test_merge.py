"""flashx.merge_attention: the exact merge of partial results, alone (with attention: test_laws.py)."""

from __future__ import annotations

import pytest
import tolerance
import torch

import flashx

INF = float("inf")


def _parts(*shape: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [(torch.randn(shape, dtype=dtype), 3 * torch.randn(shape[:-1], dtype=wide)) for _ in range(count)]


def _naive(parts: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = (torch.stack(tensors).to(dtype) for tensors in zip(*parts, strict=True))
    return (lses.softmax(0)[..., None] * outs).sum(0), lses.logsumexp(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_formula(count: int, dtype: torch.dtype) -> None:
    """Within twice the naive formula's error; in float64 too, where that is float32's scaled (tolerance.py)."""
    parts = _parts(4, 8, 33, 8, count=count, dtype=dtype)
    merged, exact, naive = flashx.merge_attention(parts), _naive(parts, torch.float64), _naive(parts, torch.float32)
    assert merged.out.dtype == dtype and merged.lse.dtype == parts[0][1].dtype
    scale = torch.finfo(merged.lse.dtype).eps / torch.finfo(torch.float32).eps
    for name, actual, expected, yardstick in zip(merged._fields, merged, exact, naive, strict=True):
        budget = 2 * scale * tolerance.error(yardstick, expected) + tolerance.ulp(expected, actual.dtype)
        tolerance.compare(name, actual, expected, budget)


def test_one_part_is_itself() -> None:
    ((out, lse),) = parts = _parts(2, 3, 5, 4, count=1)
    merged = flashx.merge_attention(parts)
    assert isinstance(merged, flashx.AttentionResult)
    tolerance.same_bits("out", merged.out, out)
    tolerance.same_bits("lse", merged.lse, lse)


def test_huge_logits_do_not_overflow() -> None:
    out = torch.ones(1, 1, 2, 3)
    lses = torch.tensor([[[1e30, -1e30]]]), torch.tensor([[[1e30, 1e30]]])
    merged = flashx.merge_attention([(0 * out, lses[0]), (out, lses[1])])
    assert merged.out[0, 0, 0].tolist() == [0.5] * 3 and merged.out[0, 0, 1].tolist() == [1.0] * 3
    assert merged.lse.flatten().tolist() == pytest.approx([1e30, 1e30])


def test_empty_parts_change_nothing_whatever_they_hold() -> None:
    ((out, lse),) = _parts(2, 3, 5, 4, count=1)
    nothing = torch.full_like(lse, -INF)
    for rubbish in (0.0, float("nan"), INF):
        merged = flashx.merge_attention([(torch.full_like(out, rubbish), nothing), (out, lse)])
        tolerance.same_bits("out", merged.out, out)
        tolerance.same_bits("lse", merged.lse, lse)


def test_empty_everywhere() -> None:
    out, lse = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.full((1, 2, 3), -INF, requires_grad=True)
    merged = flashx.merge_attention([(out, lse), (out, lse)])
    assert (merged.out == 0).all() and (merged.lse == -INF).all()
    grads = torch.autograd.grad((merged.out, merged.lse), (out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    assert all((grad == 0).all() for grad in grads)


def test_a_visible_nan_shows() -> None:
    parts = _parts(1, 1, 2, 3, count=2)
    parts[1][0][0, 0, 1, 2] = float("nan")
    merged = flashx.merge_attention(parts)
    assert merged.out.isnan().nonzero().tolist() == [[0, 0, 1, 2]]


def test_order_and_grouping() -> None:
    a, b, c = _parts(2, 3, 5, 4)
    at_once = flashx.merge_attention([a, b, c])
    for other in (flashx.merge_attention([c, a, b]), flashx.merge_attention([flashx.merge_attention([a, b]), c])):
        torch.testing.assert_close(other, at_once, rtol=1e-14, atol=1e-14)


def test_gradients() -> None:
    parts = [tensor.requires_grad_() for part in _parts(1, 2, 3, 2) for tensor in part]
    parts[1].data[0, 0] = -INF
    # -inf has no neighbourhood to take differences in: the first lse is no argument of the check.
    fixed = parts[1].detach()

    def merge(out_a: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out_b, lse_b, out_c, lse_c = rest
        return tuple(flashx.merge_attention([(out_a, fixed), (out_b, lse_b), (out_c, lse_c)]))

    assert torch.autograd.gradcheck(merge, (parts[0], *parts[2:]))


@pytest.mark.parametrize("parts", [_parts(0, 2, 3, 4), _parts(1, 2, 0, 4), _parts(1, 2, 3, 0)])
def test_zero_sizes(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    merged = flashx.merge_attention(parts)
    assert merged.out.shape == parts[0][0].shape and merged.lse.shape == parts[0][1].shape


OUT, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)

BAD = [
    ([], ValueError, "parts must be a non-empty sequence"),
    (None, (ValueError, TypeError), "parts must be"),
    (OUT, (ValueError, TypeError), "parts"),
    ([OUT], TypeError, r"parts\[0\] must be a pair of tensors .* got Tensor"),
    ([(OUT, LSE), (OUT,)], TypeError, r"parts\[1\] must be a pair"),
    ([(OUT, 1.0)], TypeError, r"parts\[0\] must be a pair"),
    ([(OUT, LSE[:, :1])], ValueError, r"parts\[0\].*lse.*\(1, 1, 3\)"),
    ([(OUT, OUT)], ValueError, r"parts\[0\].*lse.*\(1, 2, 3, 4\)"),
    ([(OUT[0, 0, 0], LSE[0, 0, 0])], ValueError, r"parts\[0\]"),
    ([(OUT, LSE), (OUT[:, :1], LSE[:, :1])], ValueError, r"parts\[1\].*\(1, 2, 3, 4\).*\(1, 1, 3, 4\)"),
    ([(OUT, LSE), (OUT.half(), LSE)], TypeError, r"parts\[1\].*float32.*float16"),
    ([(OUT.long(), LSE)], TypeError, r"parts\[0\].*int64"),
    ([(OUT, LSE.long())], TypeError, r"parts\[0\].*int64"),
    ([(OUT, LSE), (OUT.to("meta"), LSE.to("meta"))], ValueError, r"parts\[1\].*cpu.*meta"),
    ([(OUT, LSE.to("meta"))], ValueError, r"parts\[0\].*meta"),
]


@pytest.mark.parametrize("parts, error, message", BAD)
def test_bad_input(parts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flashx.merge_attention(parts)
