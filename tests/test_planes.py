"""Floats as sums of bfloat16 (csrc/cpu/planes.h): magnitudes that planes cannot hold, beside those that they can."""

from __future__ import annotations

import pytest
import tolerance
import torch
from test_few import on_cpu

import flashx

# Of query, key, value and out's gradient.
MAGNITUDES = {
    "plain": (1.0, 1.0, 1.0, 1.0),
    "small queries, large keys": (1e-33, 1e33, 1.0, 1.0),
    "large queries, small keys": (1e25, 1e-25, 1.0, 1.0),
    "small values": (1.0, 1.0, 1e-33, 1.0),
    "large values": (1.0, 1.0, 1e30, 1.0),
    "small gradients": (1.0, 1.0, 1.0, 1e-33),
    "large gradients": (1.0, 1.0, 1.0, 1e30),
}


def _naive(tensors: list[torch.Tensor], grad_out: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
    out = (query @ key.mT / 8).softmax(-1) @ value
    return out.detach(), *torch.autograd.grad(out, (query, key, value), grad_out.to(dtype))


@on_cpu
@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("magnitudes", MAGNITUDES.values(), ids=MAGNITUDES)
def test_magnitudes(magnitudes: tuple[float, ...], every: int, engine: str) -> None:
    """Where every row of a tensor is of another magnitude, or every seventh one of value and gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, magnitude: float, step: int) -> torch.Tensor:
        drawn = torch.randn(2, 1, length, 64, generator=generator)
        drawn[:, :, ::step] *= magnitude
        return drawn

    lengths, steps = (140, 200, 200, 140), (1, 1, every, every)
    *tensors, grad_out = (draw(*one) for one in zip(lengths, magnitudes, steps, strict=True))
    exact, single = (_naive(tensors, grad_out, dtype) for dtype in (torch.float64, torch.float32))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = flashx.attention(*leaves, scale=1 / 8, backend=engine)
    own = (out.detach(), *torch.autograd.grad(out, leaves, grad_out))
    for name, a, b, c in zip(("out", "grad_query", "grad_key", "grad_value"), own, single, exact, strict=True):
        ulp = torch.finfo(torch.float32).eps * c.abs().max().item()
        assert (a - c).abs().max().item() <= 2 * (b - c).abs().max().item() + ulp, name


@on_cpu
def test_the_largest_float(engine: str) -> None:
    """It is no infinity, though the nearest bfloat16 is one."""
    largest = torch.finfo(torch.float32).max
    key, value = torch.zeros(2, 1, 1, 70, 32).unbind()
    key[0, 0, 3], value[0, 0, 3, 5] = 100.0, largest
    out = flashx.attention(torch.ones(1, 1, 130, 32), key, value, scale=1.0, backend=engine)
    expected = torch.zeros_like(out)
    expected[..., 5] = largest
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_rows_beside(dtype: torch.dtype, engine: str) -> None:
    """A row block's softmax is done in pieces beside its neighbours' products: which pieces must not show."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 64, generator=generator).to(dtype) for n in (600, 330, 330))
    out, lse = flashx.attention(query, key, value, return_lse=True, backend=engine)
    for rows in (128, 160, 256, 544):
        some = flashx.attention(query[:, :, :rows], key, value, return_lse=True, backend=engine)
        tolerance.same_bits(f"out of {rows}", some.out, out[:, :, :rows])
        tolerance.same_bits(f"lse of {rows}", some.lse, lse[:, :, :rows])
