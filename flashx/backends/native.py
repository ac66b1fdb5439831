"""What the compiled backends share: problems and tensors in the form that csrc/bindings/module.cpp takes."""

from __future__ import annotations

import torch

from .. import _C
from ..problem import Gradients, Inputs, Problem

MAX_DIM = 256

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.bool: 4}
# Wider windows than any tensor is long mean the same and keep the kernels' index arithmetic far from overflow.
_UNBOUNDED = 2**40

# Address and the strides of batch, head and length, in elements; the last dimension is contiguous.
_View = tuple[int, int, int, int]


def too_wide(problem: Problem) -> list[str]:
    """Reasons against head dims that no compiled kernel has."""
    dims = (("head dim", problem.head_dim), ("value dim", problem.value_dim))
    return [f"{name} {dim} is over {MAX_DIM}" for name, dim in dims if dim > MAX_DIM]


def describe(problem: Problem) -> _C.Problem:
    """The Problem as csrc/core/problem.h has it, without the tensors that shape the logits."""
    native = _C.Problem()
    native.dtype = _DTYPES[problem.dtype]
    native.batch, native.q_heads, native.kv_heads = problem.batch, problem.q_heads, problem.kv_heads
    native.q_len, native.k_len = problem.q_len, problem.k_len
    native.head_dim, native.value_dim = problem.head_dim, problem.value_dim
    native.scale, native.softcap = problem.scale, problem.softcap
    mask = problem.mask
    left, right = (_UNBOUNDED if width is None else min(width, _UNBOUNDED) for width in (mask.left, mask.right))
    native.set_mask(left, right, mask.shift)
    return native


def with_inputs(problem: Problem, inputs: Inputs) -> _C.Problem:
    """As describe, with the addresses of everything that shapes the logits."""
    _, _, _, bias, alibi_slopes, sinks, seed = inputs
    native = describe(problem)
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


def forward_tensors(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> tuple[_View, _View, _View, _View, int]:
    """The forward's tensors, in the order that every machine takes."""
    return _view(inputs.query), _view(inputs.key), _view(inputs.value), _view(out), lse.data_ptr()


def backward_tensors(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    gradients: Gradients,
) -> tuple[_View, _View, _View, _View, int, _View, int, int, _View, _View, _View, int]:
    """The backward's tensors, in the order that every machine takes; it writes delta (B, Hq, Lq) too."""
    return (
        *forward_tensors(inputs, out, lse),
        _view(grad_out),
        0 if grad_lse is None else grad_lse.data_ptr(),
        delta.data_ptr(),
        _view(gradients.query),
        _view(gradients.key),
        _view(gradients.value),
        0 if gradients.bias is None else gradients.bias.data_ptr(),
    )


def write_sinks_gradient(inputs: Inputs, lse: torch.Tensor, delta: torch.Tensor, gradients: Gradients) -> None:
    """The sink is a key with value 0: d logit = weight * (0 - delta)."""
    if gradients.sinks is not None:
        assert inputs.sinks is not None
        gradients.sinks.copy_(-(torch.exp(inputs.sinks[:, None] - lse) * delta).sum((0, 2)))


def tf32() -> bool:
    """Whether torch's own float32 products may be TF32."""
    matmul = torch.backends.cuda.matmul
    # allow_tf32 raises where the newer fp32_precision (torch 2.9) was set; the other way round they agree.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _view(tensor: torch.Tensor) -> _View:
    batch, head, length, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, length
