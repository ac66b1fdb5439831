"""Starts the kernels: what csrc/cuda/launch.cuh and sm80/host.cuh do for CUDA."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ..masks import IntervalMask
from ..problem import Gradients, Inputs, Problem
from . import backward as backward_kernels
from .forward import forward_kernel
from .logits import Bias, Flags
from .tile import View
from .tuning import Sweeps, Tiles, tiles

# Distances past this are no longer told apart; positions stay within 32 bits.
_FAR = 2**30


class Dims(NamedTuple):
    """Head dims and what they are padded to, known when a kernel is compiled."""

    head: int
    head_block: int
    value: int
    value_block: int


class Sums(NamedTuple):
    """The dimensions that a bias broadcasts over."""

    batch: bool
    heads: bool
    rows: bool
    keys: bool


def forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, tf32: bool) -> None:
    """As dispatch.Backend's. tf32: float32 products may be single TF32 ones."""
    flags, dims = _flags(problem, tf32), _dims(problem)
    tile = _tiles(inputs.query, flags, dims).forward
    row_tiles = triton.cdiv(problem.q_len * _group(problem), tile.rows)
    run(
        forward_kernel, row_tiles * problem.batch * problem.kv_heads, tile,
        _view(inputs.query), _view(inputs.key), _view(inputs.value), _view(out), lse, inputs.sinks, row_tiles,
        *_described(problem, inputs), flags, dims, tile.rows, tile.keys,
    )  # fmt: skip


def backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    gradients: Gradients,
    tf32: bool,
) -> None:
    """As dispatch.Backend's, all but sinks' gradient; writes delta (B, Hq, Lq) too."""
    flags, dims = _flags(problem, tf32), _dims(problem)
    sweeps = _tiles(inputs.query, flags, dims)
    tile = sweeps.grad_query
    heads, places = problem.batch * problem.q_heads, problem.batch * problem.kv_heads
    count = triton.cdiv(problem.q_len, tile.rows)
    run(
        backward_kernels.delta_kernel, heads * count, tile, _view(out), _view(grad_out), grad_lse, delta,
        problem.q_heads, problem.q_len, count, grad_lse is not None, dims, tile.rows,
    )  # fmt: skip
    tensors = (*(_view(t) for t in (inputs.query, inputs.key, inputs.value, grad_out)), lse, delta)
    described = _described(problem, inputs)

    tile = sweeps.grad_key_value
    count = triton.cdiv(problem.k_len, tile.keys)
    run(
        backward_kernels.grad_key_value_kernel, count * places, tile, *tensors, _view(gradients.key),
        _view(gradients.value), count, *described, flags, dims, tile.rows, tile.keys,
    )  # fmt: skip

    tile = sweeps.grad_query
    count = triton.cdiv(problem.q_len * _group(problem), tile.rows)
    run(
        backward_kernels.grad_query_kernel, count * places, tile, *tensors, _view(gradients.query), count,
        *described, flags, dims, tile.rows, tile.keys,
    )  # fmt: skip

    if gradients.bias is not None:
        tile = sweeps.grad_bias
        size = (1,) * (4 - gradients.bias.dim()) + tuple(gradients.bias.shape)
        full = (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
        sums = Sums(*(one == 1 for one in size))
        rows = 1 if sums.rows else triton.cdiv(size[2], tile.rows)
        keys = 1 if sums.keys else triton.cdiv(size[3], tile.keys)
        run(
            backward_kernels.grad_bias_kernel, size[0] * size[1] * rows * keys, tile, *tensors, gradients.bias, full[0],
            rows, keys, *described, flags, dims, sums, tile.rows, tile.keys,
        )  # fmt: skip


def run(kernel: Any, programs: int, tile: Tiles, *arguments: Any) -> None:
    """Starts the kernel, if there is anything to do."""
    if programs:
        kernel[(programs,)](*arguments, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def _group(problem: Problem) -> int:
    return problem.q_heads // max(problem.kv_heads, 1)


def _dims(problem: Problem) -> Dims:
    head, value = (max(16, triton.next_power_of_2(dim)) for dim in (problem.head_dim, problem.value_dim))
    return Dims(problem.head_dim, head, problem.value_dim, value)


def _tiles(query: torch.Tensor, flags: Flags, dims: Dims) -> Sweeps:
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    block = max(dims.head_block, dims.value_block)
    return tiles(capability, query.element_size(), block, flags.general or flags.dropout)


def _flags(problem: Problem, tf32: bool) -> Flags:
    bias = "none" if problem.bias is None else "bool" if problem.bias == torch.bool else "add"
    softcap = problem.softcap != 0
    return Flags(
        bias=bias,
        alibi=problem.alibi,
        softcap=softcap,
        sinks=problem.sinks,
        dropout=problem.dropout_p > 0,
        general=bias != "none" or problem.alibi or softcap or problem.scale <= 0,
        precision="tf32" if tf32 else "tf32x3",
    )


def _described(problem: Problem, inputs: Inputs) -> tuple[Any, ...]:
    """The kernels' common arguments, in the order of logits.Problem."""
    q_len, k_len, shift = problem.q_len, problem.k_len, problem.mask.shift
    bias = Bias(None, 0, 0, 0, 0)
    if inputs.bias is not None:
        data = inputs.bias.view(torch.uint8) if inputs.bias.dtype == torch.bool else inputs.bias
        bias = Bias(data, *inputs.bias.expand(problem.batch, problem.q_heads, q_len, k_len).stride())
    slopes = inputs.alibi_slopes
    threshold = min(int(problem.dropout_p * 2**32 + 0.5), 2**32 - 1)
    seed = 0 if inputs.seed is None else int(inputs.seed)
    return (
        problem.kv_heads,
        _group(problem),
        q_len,
        k_len,
        *_interval(problem.mask, q_len, k_len),
        min(max(shift, -_FAR), _FAR),
        problem.scale,
        problem.softcap,
        bias,
        slopes,
        problem.q_heads if slopes is not None and slopes.dim() == 2 else 0,
        1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0,
        *(_signed(word) for word in (threshold, seed, seed >> 32)),
    )


def _interval(mask: IntervalMask, q_len: int, k_len: int) -> tuple[int, int]:
    """low and high of the keys [q + low, q + high) that row q sees; clamped where no row can tell."""
    low = -q_len if mask.left is None else mask.shift - mask.left
    high = k_len if mask.right is None else mask.shift + mask.right + 1
    return min(max(low, -q_len), k_len), min(max(high, -q_len), k_len)


def _signed(word: int) -> int:
    """The 32-bit word as a signed number, which is one type whatever its value."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _view(tensor: torch.Tensor) -> View:
    return View(tensor, *tensor.stride()[:3])
