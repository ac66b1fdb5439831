"""The CPU backend: csrc/cpu's tiled kernels, compiled once per instruction set, chosen at run time."""

from __future__ import annotations

import functools

import torch

from .. import _C, env
from ..problem import Gradients, Inputs, Problem

NAME = "cpu"
MAX_DIM = 256

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.bool: 4}
# Wider windows than any tensor is long mean the same and keep the kernels' index arithmetic far from overflow.
_UNBOUNDED = 2**40


@functools.cache
def isa() -> str:
    """The instruction set in use: FLASHX_CPU_ISA, or the best one of this machine.

    Raises:
        ValueError: FLASHX_CPU_ISA names one that this build or machine does not have.
    """
    usable = _C.cpu_isas()
    name = env.cpu_isa() or usable[0]
    if name not in usable:
        raise ValueError(f"FLASHX_CPU_ISA must be one of {', '.join(usable)} on this machine, got {name!r}")
    return name


def why_not(problem: Problem) -> list[str]:
    """Reasons against running the problem on the CPU kernels; empty if they can."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"tensors are on {problem.device}, not on cpu")
    if problem.head_dim > MAX_DIM:
        reasons.append(f"head dim {problem.head_dim} is over {MAX_DIM}")
    if problem.value_dim > MAX_DIM:
        reasons.append(f"value dim {problem.value_dim} is over {MAX_DIM}")
    return reasons


def kernel(problem: Problem) -> str:
    """Name of the kernel that runs the problem."""
    return f"cpu/{isa()}"


def forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    query, key, value, *_ = inputs
    _C.cpu_forward(
        _native(problem, inputs),
        isa(),
        torch.get_num_threads(),
        _view(query),
        _view(key),
        _view(value),
        _view(out),
        lse.data_ptr(),
    )


def backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    query, key, value, *_ = inputs
    delta = torch.empty_like(lse)
    _C.cpu_backward(
        _native(problem, inputs),
        isa(),
        torch.get_num_threads(),
        _view(query),
        _view(key),
        _view(value),
        _view(out),
        lse.data_ptr(),
        _view(grad_out),
        0 if grad_lse is None else grad_lse.data_ptr(),
        delta.data_ptr(),
        _view(gradients.query),
        _view(gradients.key),
        _view(gradients.value),
        0 if gradients.bias is None else gradients.bias.data_ptr(),
    )
    if gradients.sinks is not None:
        assert inputs.sinks is not None
        # The sink is a key with value 0: d logit = weight * (0 - delta).
        gradients.sinks.copy_(-(torch.exp(inputs.sinks[:, None] - lse) * delta).sum((0, 2)))


def _view(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and the strides of batch, head and length, in elements; the last dimension is contiguous."""
    batch, head, length, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, length


def _native(problem: Problem, inputs: Inputs) -> _C.Problem:
    """The Problem as csrc/core/problem.h has it, with the addresses of everything that shapes the logits."""
    _, _, _, bias, alibi_slopes, sinks, seed = inputs
    native = _C.Problem()
    native.dtype = _DTYPES[problem.dtype]
    native.batch, native.q_heads, native.kv_heads = problem.batch, problem.q_heads, problem.kv_heads
    native.q_len, native.k_len = problem.q_len, problem.k_len
    native.head_dim, native.value_dim = problem.head_dim, problem.value_dim
    native.scale, native.softcap = problem.scale, problem.softcap
    mask = problem.mask
    left, right = (_UNBOUNDED if width is None else min(width, _UNBOUNDED) for width in (mask.left, mask.right))
    native.set_mask(left, right, mask.shift)
    if bias is not None:
        full = (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
        native.set_bias(bias.data_ptr(), _DTYPES[bias.dtype], bias.expand(full).stride(), bias.shape)
    if alibi_slopes is not None:
        native.set_alibi(alibi_slopes.data_ptr(), problem.q_heads if alibi_slopes.dim() == 2 else 0)
    if sinks is not None:
        native.set_sinks(sinks.data_ptr())
    if seed is not None:
        native.set_dropout(problem.dropout_p, int(seed) % 2**64)
    return native
