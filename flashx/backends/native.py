"""What the compiled backends share: problems and tensors in the form that csrc/bindings/module.cpp takes."""

from __future__ import annotations

import torch

from .. import _C
from ..problem import Carry, Gradients, Inputs, Problem

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
    native.set_mask(left, right, mask.shift, mask.first)
    native.q_rows = problem.q_rows if problem.q_rows >= 0 else problem.q_len
    native.k_rows = problem.k_rows if problem.k_rows >= 0 else problem.k_len
    if problem.unified_max is not None:
        native.unified_max = problem.unified_max
    return native


def with_inputs(problem: Problem, inputs: Inputs) -> _C.Problem:
    """As describe, with the addresses of everything that shapes the logits."""
    bias, alibi_slopes, sinks, seed = inputs.bias, inputs.alibi_slopes, inputs.sinks, inputs.seed
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
    if problem.block is not None:
        block_map, bits = inputs.block_map, inputs.block_bits
        assert block_map is not None and bits is not None
        batch, heads, q_blocks, k_blocks = block_map.shape
        strides = (0 if batch == 1 else heads * q_blocks * k_blocks, 0 if heads == 1 else q_blocks * k_blocks)
        native.set_blocks(
            block_map.data_ptr(), *strides, q_blocks, k_blocks, bits.data_ptr(), bits.shape[0], *problem.block
        )
    if inputs.sequences is not None:
        native.set_sequences(inputs.sequences.data_ptr())
        native.packed = problem.packed
    if inputs.members is not None:
        assert inputs.member_begin is not None and problem.groups is not None
        native.set_members(inputs.members.data_ptr(), inputs.member_begin.data_ptr(), problem.groups)
    if inputs.page_table is not None:
        assert problem.page is not None
        pages = inputs.page_table
        native.set_pages(pages.data_ptr(), pages.shape[1], problem.page, inputs.key.shape[0])
    return native


def forward_tensors(
    problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor
) -> tuple[_View, _View, _View, _View, int]:
    """The forward's tensors, in the order that every machine takes."""
    queries, keys = _strides(problem, inputs)
    return (
        _view(inputs.query, queries), _view(inputs.key, keys), _view(inputs.value, keys), _view(out, queries),
        lse.data_ptr(),
    )  # fmt: skip


def carried(carry: Carry | None) -> tuple[int, int, int, bool] | None:
    """A carry as every machine takes it."""
    if carry is None:
        return None
    return carry.max.data_ptr(), carry.sum.data_ptr(), carry.acc.data_ptr(), carry.suspend


def backward_tensors(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    delta: torch.Tensor,
    gradients: Gradients,
) -> tuple[_View, _View, _View, _View, int, _View, int, int, _View, _View, _View, int, bool]:
    """The backward's tensors, in the order that every machine takes; it writes delta (B, Hq, Lq) too."""
    queries, keys = _strides(problem, inputs)
    return (
        *forward_tensors(problem, inputs, out, lse),
        _view(grad_out, queries),
        0 if grad_lse is None else grad_lse.data_ptr(),
        delta.data_ptr(),
        _view(gradients.query, queries),
        _view(gradients.key, keys),
        _view(gradients.value, keys),
        0 if gradients.bias is None else gradients.bias.data_ptr(),
        gradients.adds_query,
    )


def write_sinks_gradient(inputs: Inputs, lse: torch.Tensor, delta: torch.Tensor, gradients: Gradients) -> None:
    """The sink is a key with value 0: d logit = weight * (0 - delta)."""
    if gradients.sinks is not None:
        assert inputs.sinks is not None
        share = torch.exp(inputs.sinks[:, None] - lse) * delta
        # Rows that see nothing, not even a sink: those of no sequence, whose delta nobody writes, among them.
        gradients.sinks.copy_(-torch.where(lse == -torch.inf, 0, share).sum((0, 2)))


def tf32() -> bool:
    """Whether torch's own float32 products may be TF32."""
    matmul = torch.backends.cuda.matmul
    # allow_tf32 raises where the newer fp32_precision (torch 2.9) was set; the other way round they agree.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _strides(problem: Problem, inputs: Inputs) -> tuple[bool, bool]:
    """Whether query and key have a batch entry for each sequence (or group, or page), or one for all of them."""
    alone = inputs.key.shape[0] == 1 and problem.batch != 1 and problem.page is None and problem.groups is None
    return not problem.packed, not alone


def _view(tensor: torch.Tensor, batched: bool) -> _View:
    batch, head, length, _ = tensor.stride()
    return tensor.data_ptr(), batch if batched else 0, head, length
