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
# Number of arguments in _PROBLEM that are tensors.
_TENSORS = 7

_library = torch.library.Library("flashx", "DEF")
# Inductor may otherwise hand over other strides than it traced; the output's layout follows the query's.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(f"attention({_PROBLEM}) -> (Tensor out, Tensor lse)", tags=_tags)
_library.define(
    f"attention_backward({_PROBLEM}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, bool bias_grad, "
    "bool sinks_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_sinks)",
    tags=_tags,
)


def empty_in_layout_of(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Empty (B, H, length, dim), heads and length laid out in tensor's order, so that views of it stay views."""
    batch, heads = tensor.shape[:2]
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)
    return tensor.new_empty(batch, heads, length, dim)


def _outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = empty_in_layout_of(query, query.shape[2], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


def _gradients(inputs: Inputs, bias_grad: bool, sinks_grad: bool) -> tuple[torch.Tensor, ...]:
    """Empty gradients; one that nobody asks for is a tensor without elements."""
    query, key, value, bias, _, sinks, _ = inputs
    nothing = query.new_empty(0)
    return (
        *(empty_in_layout_of(tensor, tensor.shape[2], tensor.shape[3]) for tensor in (query, key, value)),
        nothing if bias is None or not bias_grad else bias.new_empty(bias.shape),
        nothing.clone() if sinks is None or not sinks_grad else sinks.new_empty(sinks.shape),
    )


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last dimension's, which must be 1."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _check(arguments: Sequence[Any]) -> tuple[Problem, Inputs]:
    """The arguments that _PROBLEM lists, checked against each other and described."""
    inputs = Inputs(*arguments[:_TENSORS])
    left, right, shift, scale, softcap, dropout_p, _ = arguments[_TENSORS:]
    return Problem.from_tensors(inputs, IntervalMask(left, right, shift), scale, softcap, dropout_p), inputs


def _describe(arguments: Sequence[Any]) -> tuple[Problem, Inputs, dispatch.Backend]:
    """As _check, with a backend chosen and the tensors in the form that backends take."""
    problem, inputs = _check(arguments)
    inputs = inputs._replace(
        query=_last_contiguous(inputs.query),
        key=_last_contiguous(inputs.key),
        value=_last_contiguous(inputs.value),
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.contiguous(),
        sinks=None if inputs.sinks is None else inputs.sinks.contiguous(),
    )
    return problem, inputs, dispatch.choose(problem, arguments[-1])


def _attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    problem, inputs, backend = _describe(arguments)
    out, lse = _outputs(inputs.query, inputs.value)
    backend.forward(problem, inputs, out, lse)
    return out, lse


def _attention_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *described, out, lse, grad_out, grad_lse, bias_grad, sinks_grad = arguments
    problem, inputs, backend = _describe(described)
    check_backward(problem, inputs, out, lse, grad_out, grad_lse, bias_grad, sinks_grad)
    gradients = _gradients(inputs, bias_grad, sinks_grad)
    query, key, value, bias, sinks = gradients
    backend.backward(
        problem,
        inputs,
        _last_contiguous(out),
        lse.contiguous(),
        _last_contiguous(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        Gradients(query, key, value, bias if bias_grad else None, sinks if sinks_grad else None),
    )
    return gradients


def _attention_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, inputs = _check(arguments)
    return _outputs(inputs.query, inputs.value)


def _attention_backward_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *described, out, lse, grad_out, grad_lse, bias_grad, sinks_grad = arguments
    problem, inputs = _check(described)
    check_backward(problem, inputs, out, lse, grad_out, grad_lse, bias_grad, sinks_grad)
    return _gradients(inputs, bias_grad, sinks_grad)


class _Attention(torch.autograd.Function):
    """The operator's derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.flashx.attention(*arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:_TENSORS], out, lse)
        ctx.options = arguments[_TENSORS:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        nothing = (None,) * (_TENSORS + len(ctx.options))
        if grad_out is None and grad_lse is None:
            return nothing
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        bias_grad, sinks_grad = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        query, key, value, bias, sinks = torch.ops.flashx.attention_backward(
            *tensors, *ctx.options, out, lse, grad_out, grad_lse, bias_grad, sinks_grad
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
    _library.impl("attention", _attention, _key)
    _library.impl("attention_backward", _attention_backward, _key)
torch.library.register_fake("flashx::attention", _attention_fake, lib=_library)
torch.library.register_fake("flashx::attention_backward", _attention_backward_fake, lib=_library)
_library.impl("attention", _attention_autograd, "Autograd")
_library.impl("attention_backward", _attention_backward_autograd, "Autograd")
