"""Attention over keys in several levels: the operator under shared prefixes and prefix trees.

A level is a Problem by itself: groups of sequences, folded into its rows, read one batch entry of keys each. The state
of a row's softmax goes from level to level (problem.Carry), so a key that many sequences share is read once for all of
them, and no partial results are merged. Juravsky et al., "Hydragen", section 3; Zhu et al.,
"RelayAttention", section 3.

The last level holds every sequence's own keys; it finishes the softmax. Positions are absolute: each level's tables say
where its keys stand to a sequence's rows, so windows, causal limits, sink tokens and ALiBi cross levels exactly.

The backward needs no results of single levels: weights are exp(logit - lse) with the lse over all keys, and delta =
rowsum(dO * O) - dlse is a row's alone. dQ is summed over the levels in the accumulation dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from . import dispatch
from .backends import cpu
from .masks import IntervalMask
from .ops import empty_in_layout_of, last_contiguous, library
from .problem import Carry, Gradients, Inputs, Problem, accumulation_dtype

# Lists have an element for each level, root first; members and member_begin one less, since the last level has none, or
# none at all, where every group is one sequence.
_LEVELS = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] sequences, Tensor[] members, Tensor[] member_begins, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? block_map, Tensor? block_bits, SymInt? window_left, "
    "SymInt? window_right, SymInt sink_tokens, SymInt block_q, SymInt block_k, float scale, float softcap, str? backend"
)
_ARGUMENTS = 18

_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
library.define(f"level_attention({_LEVELS}) -> (Tensor out, Tensor lse)", tags=_tags)
library.define(
    f"level_attention_backward({_LEVELS}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, bool sinks_grad) "
    "-> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values, Tensor grad_sinks)",
    tags=_tags,
)


def described(arguments: Sequence[Any]) -> list[tuple[Problem, Inputs]]:
    """The problem of each level, checked."""
    (query, keys, values, sequences, members, begins, alibi, sinks, block_map, block_bits, left, right, first,
     block_q, block_k, scale, softcap, _) = arguments  # fmt: skip
    grouped = len(keys) - 1 if members else 0
    if not len(keys) == len(values) == len(sequences) or not len(members) == len(begins) == grouped:
        raise ValueError(
            f"levels must have keys, values and sequences each, and members all but the last or none, got "
            f"{len(keys)}, {len(values)}, {len(sequences)} and {len(members)}, {len(begins)}"
        )
    mask = IntervalMask(left, right, 0, first)
    levels = []
    for i, (key, value, table) in enumerate(zip(keys, values, sequences, strict=True)):
        last = i == len(keys) - 1
        inputs = Inputs(
            last_contiguous(query), last_contiguous(key), last_contiguous(value), None,
            None if alibi is None else alibi.contiguous(), sinks if last else None, None,
            block_map if last else None, block_bits if last else None, table,
            members[i] if i < grouped else None, begins[i] if i < grouped else None,
        )  # fmt: skip
        if table.shape[0] != query.shape[0]:
            raise ValueError(f"sequences must have a row for each of {query.shape[0]} sequences, got {table.shape[0]}")
        levels.append((Problem.from_tensors(inputs, mask, scale, softcap, block=(block_q, block_k)), inputs))
    return levels


def choose(levels: Sequence[tuple[Problem, Inputs]], name: str | None) -> dispatch.Backend:
    """The backend of all levels: states are in its own units."""
    return dispatch.choose_for_all([problem for problem, _ in levels], name)


def _outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = empty_in_layout_of(query, query.shape[2], value.shape[3])
    return out.zero_(), query.new_full(query.shape[:3], -torch.inf, dtype=accumulation_dtype(query.dtype))


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    levels = described(arguments)
    backend = choose(levels, arguments[-1])
    query, value = arguments[0], arguments[2][-1]
    out, lse = _outputs(query, value)
    if lse.numel() == 0:
        return out, lse
    if backend is cpu and not arguments[4]:
        cpu.forward_levels(levels, out, lse)
        return out, lse
    largest = torch.full_like(lse, -torch.inf)
    total, acc = torch.zeros_like(lse), lse.new_zeros(*lse.shape, value.shape[3])
    for i, (problem, inputs) in enumerate(levels):
        carry = Carry(largest, total, acc, i < len(levels) - 1)
        backend.forward(problem, inputs, out, lse, carry if len(levels) > 1 else None)
    return out, lse


def _empty_gradients(arguments: Sequence[Any], sinks_grad: bool) -> tuple[Any, ...]:
    query, keys, values, sinks = arguments[0], arguments[1], arguments[2], arguments[7]
    own = [[empty_in_layout_of(t, t.shape[2], t.shape[3]).zero_() for t in tensors] for tensors in (keys, values)]
    return (
        empty_in_layout_of(query, query.shape[2], query.shape[3]),
        *own,
        sinks.new_zeros(sinks.shape) if sinks_grad else query.new_empty(0),
    )


def _backward(*arguments: Any) -> tuple[Any, ...]:
    problem_arguments, (out, lse, grad_out, grad_lse, sinks_grad) = arguments[:_ARGUMENTS], arguments[_ARGUMENTS:]
    levels = described(problem_arguments)
    backend = choose(levels, problem_arguments[-1])
    gradients = _empty_gradients(problem_arguments, sinks_grad)
    query, keys, values, sinks = gradients
    if lse.numel() == 0:
        return gradients
    summed = torch.zeros(query.shape, dtype=accumulation_dtype(query.dtype), device=query.device)
    for i, (problem, inputs) in enumerate(levels):
        wanted = sinks if sinks_grad and i == len(levels) - 1 else None
        backend.backward(
            problem,
            inputs,
            last_contiguous(out),
            lse.contiguous(),
            last_contiguous(grad_out),
            None if grad_lse is None else grad_lse.contiguous(),
            Gradients(summed, keys[i], values[i], None, wanted, adds_query=True),
        )
    query.copy_(summed)
    return gradients


def _forward_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    described(arguments)
    return _outputs(arguments[0], arguments[2][-1])


def _backward_fake(*arguments: Any) -> tuple[Any, ...]:
    return _empty_gradients(arguments[:_ARGUMENTS], arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, keys, values, sequences, members, begins, alibi, sinks, block_map, block_bits, *options = inputs
    ctx.save_for_backward(
        query, *keys, *values, *sequences, *members, *begins, alibi, sinks, block_map, block_bits, *output
    )
    ctx.options, ctx.levels, ctx.grouped = options, len(keys), len(members)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    n, grouped, saved = ctx.levels, ctx.grouped, ctx.saved_tensors
    # A list of tensors has a list of gradients.
    no_tables = ([None] * n, [None] * grouped, [None] * grouped)
    nothing = (None,) * (_ARGUMENTS - 8)
    if grad_out is None and grad_lse is None:
        return (None, [None] * n, [None] * n, *no_tables, None, None, *nothing)
    ends = list(itertools.accumulate([n, n, n, grouped, grouped], initial=1))
    lists = [list(saved[begin:end]) for begin, end in itertools.pairwise(ends)]
    *tensors, out, lse = saved[ends[-1] :]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    sinks_grad = tensors[1] is not None and ctx.needs_input_grad[7]
    query, keys, values, sinks = torch.ops.flashx.level_attention_backward(
        saved[0], *lists, *tensors, *ctx.options, out, lse, grad_out, grad_lse, sinks_grad
    )
    return (query, keys, values, *no_tables, None, sinks if sinks_grad else None, *nothing)


for _key in ("CPU", "CUDA"):
    library.impl("level_attention", _forward, _key)
    library.impl("level_attention_backward", _backward, _key)
torch.library.register_fake("flashx::level_attention", _forward_fake, lib=library)
torch.library.register_fake("flashx::level_attention_backward", _backward_fake, lib=library)
torch.library.register_autograd("flashx::level_attention", _differentiate, setup_context=_setup_context, lib=library)
