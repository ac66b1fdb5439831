"""The torch operators: schema, fake, autograd. Everything below them is a backend (dispatch.py).

``flashx::attention`` describes the call as a Problem, chooses a backend and runs it. It is registered with
``torch.library`` alone, so the compiled module needs no torch at build time (docs/architecture.md, "Binding").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import dispatch
from .masks import IntervalMask
from .problem import Gradients, Inputs, Problem, accumulation_dtype, check_backward

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, "
    "SymInt? window_left, SymInt? window_right, SymInt shift, float scale, float softcap, float dropout_p, str? backend"
)
# Number of arguments in _PROBLEM, and of tensors among them.
_PROBLEM_ARGUMENTS = 14
_TENSORS = 7
# What the variants add; a plain call names none of it, and pays nothing for it.
_VARIANT = (
    "Tensor? block_map=None, Tensor? block_bits=None, Tensor? sequences=None, Tensor? members=None, "
    "Tensor? member_begin=None, Tensor? page_table=None, SymInt sink_tokens=0, SymInt block_q=0, SymInt block_k=0, "
    "SymInt max_q=-1, SymInt max_k=-1, float? unified_max=None"
)
_VARIANT_DEFAULTS = (None,) * 6 + (0, 0, 0, -1, -1, None)
_VARIANT_TENSORS = 6
# Number of the backward's arguments between _PROBLEM and _VARIANT.
_RESULTS = 6

library = torch.library.Library("flashx", "DEF")
# Inductor may otherwise hand over other strides than it traced; the output's layout follows the query's.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
library.define(f"attention({_PROBLEM}, {_VARIANT}) -> (Tensor out, Tensor lse)", tags=_tags)
library.define(
    f"attention_backward({_PROBLEM}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, bool bias_grad, "
    f"bool sinks_grad, {_VARIANT}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_sinks)",
    tags=_tags,
)


def empty_in_layout_of(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Empty (B, H, length, dim), heads and length laid out in tensor's order, so that views of it stay views."""
    batch, heads = tensor.shape[:2]
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)
    return tensor.new_empty(batch, heads, length, dim)


def _outputs(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    query = inputs.query
    out = empty_in_layout_of(query, query.shape[2], inputs.value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    if inputs.sequences is not None:  # rows of no sequence see nothing
        out.zero_()
        lse.fill_(-torch.inf)
    return out, lse


def _gradients(inputs: Inputs, bias_grad: bool, sinks_grad: bool) -> tuple[torch.Tensor, ...]:
    """Empty gradients; one that nobody asks for is a tensor without elements."""
    query, bias, sinks = inputs.query, inputs.bias, inputs.sinks
    nothing = query.new_empty(0)
    own = [empty_in_layout_of(tensor, tensor.shape[2], tensor.shape[3]) for tensor in inputs[:3]]
    if inputs.sequences is not None:
        for gradient in own:
            gradient.zero_()
    return (
        *own,
        nothing if bias is None or not bias_grad else bias.new_empty(bias.shape),
        nothing.clone() if sinks is None or not sinks_grad else sinks.new_empty(sinks.shape),
    )


def last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last dimension's, which must be 1."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _check(arguments: Sequence[Any], variant: Sequence[Any]) -> tuple[Problem, Inputs]:
    """The arguments that _PROBLEM and _VARIANT list, checked against each other and described.

    The dispatcher leaves out trailing arguments that are their defaults.
    """
    variant = (*variant, *_VARIANT_DEFAULTS[len(variant) :])
    inputs = Inputs(*arguments[:_TENSORS], *variant[:_VARIANT_TENSORS])
    left, right, shift, scale, softcap, dropout_p, _ = arguments[_TENSORS:]
    first, block_q, block_k, max_q, max_k, unified_max = variant[_VARIANT_TENSORS:]
    mask = IntervalMask(left, right, shift, first)
    block, lengths = (block_q, block_k), (max_q, max_k)
    return Problem.from_tensors(inputs, mask, scale, softcap, dropout_p, block, lengths, unified_max), inputs


def describe(arguments: Sequence[Any]) -> Problem:
    """The problem of flashx::attention's arguments, checked."""
    return _check(arguments[:_PROBLEM_ARGUMENTS], arguments[_PROBLEM_ARGUMENTS:])[0]


def _describe(arguments: Sequence[Any], variant: Sequence[Any]) -> tuple[Problem, Inputs, dispatch.Backend]:
    """As _check, with a backend chosen and the tensors in the form that backends take."""
    problem, inputs = _check(arguments, variant)
    inputs = inputs._replace(
        query=last_contiguous(inputs.query),
        key=last_contiguous(inputs.key),
        value=last_contiguous(inputs.value),
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.contiguous(),
        sinks=None if inputs.sinks is None else inputs.sinks.contiguous(),
    )
    return problem, inputs, dispatch.choose(problem, arguments[-1])


def described(arguments: Sequence[Any]) -> tuple[Problem, Inputs, dispatch.Backend]:
    """What the operator makes of its arguments before it runs."""
    return _describe(arguments[:_PROBLEM_ARGUMENTS], arguments[_PROBLEM_ARGUMENTS:])


def _attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    problem, inputs, backend = described(arguments)
    out, lse = _outputs(inputs)
    backend.forward(problem, inputs, out, lse)
    return out, lse


def _split(arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The backward's arguments: _PROBLEM, the forward's results and what is wanted, _VARIANT."""
    end = _PROBLEM_ARGUMENTS + _RESULTS
    return arguments[:_PROBLEM_ARGUMENTS], arguments[_PROBLEM_ARGUMENTS:end], arguments[end:]


def _attention_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    described, results, variant = _split(arguments)
    out, lse, grad_out, grad_lse, bias_grad, sinks_grad = results
    problem, inputs, backend = _describe(described, variant)
    check_backward(problem, inputs, *results)
    gradients = _gradients(inputs, bias_grad, sinks_grad)
    query, key, value, bias, sinks = gradients
    backend.backward(
        problem,
        inputs,
        last_contiguous(out),
        lse.contiguous(),
        last_contiguous(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        Gradients(query, key, value, bias if bias_grad else None, sinks if sinks_grad else None),
    )
    return gradients


def _attention_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, inputs = _check(arguments[:_PROBLEM_ARGUMENTS], arguments[_PROBLEM_ARGUMENTS:])
    return _outputs(inputs)


def _attention_backward_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    described, results, variant = _split(arguments)
    problem, inputs = _check(described, variant)
    check_backward(problem, inputs, *results)
    return _gradients(inputs, *results[4:])


class _Attention(torch.autograd.Function):
    """The operator's derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.flashx.attention(*arguments)
        ctx.set_materialize_grads(False)
        variant = arguments[_PROBLEM_ARGUMENTS:]
        tables = variant[:_VARIANT_TENSORS]
        ctx.save_for_backward(*arguments[:_TENSORS], out, lse, *tables)
        ctx.options = arguments[_TENSORS:_PROBLEM_ARGUMENTS], variant[_VARIANT_TENSORS:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        tensors, (out, lse), tables = saved[:_TENSORS], saved[_TENSORS : _TENSORS + 2], saved[_TENSORS + 2 :]
        options, variant = ctx.options
        nothing = (None,) * len(ctx.needs_input_grad)
        if grad_out is None and grad_lse is None:
            return nothing
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        bias_grad, sinks_grad = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        query, key, value, bias, sinks = torch.ops.flashx.attention_backward(
            *tensors, *options, out, lse, grad_out, grad_lse, bias_grad, sinks_grad, *tables, *variant
        )
        bias, sinks = bias if bias_grad else None, sinks if sinks_grad else None
        return (query, key, value, bias, None, sinks, *nothing[6:])


class _AttentionBackward(torch.autograd.Function):
    """The backward's derivative: an error, where a missing one would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.flashx.attention_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise NotImplementedError("flashx's attention has no second derivative; torch's math attention has one")


def _differentiable(arguments: Sequence[Any]) -> bool:
    # torch.library.register_autograd asks the same through pytrees, which costs more than a short attention.
    if forward_ad._current_level >= 0:
        return True  # autograd.Function says that there is no forward derivative
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in arguments)


def _attention_autograd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if _differentiable(arguments):
        return _Attention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashx.attention(*arguments)


def _attention_backward_autograd(*arguments: Any) -> tuple[torch.Tensor, ...]:
    if _differentiable(arguments):
        return _AttentionBackward.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashx.attention_backward(*arguments)


for _key in ("CPU", "CUDA"):
    library.impl("attention", _attention, _key)
    library.impl("attention_backward", _attention_backward, _key)
torch.library.register_fake("flashx::attention", _attention_fake, lib=library)
torch.library.register_fake("flashx::attention_backward", _attention_backward_fake, lib=library)
library.impl("attention", _attention_autograd, "Autograd")
library.impl("attention_backward", _attention_backward_autograd, "Autograd")
