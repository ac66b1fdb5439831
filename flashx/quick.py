"""Calls that repeat: what checking and describing a call comes to, kept for the next one like it.

A short attention takes microseconds; checking its arguments and going through torch's dispatcher takes many more. So a
call on plain CPU tensors that nobody traces, transforms or differentiates, and whose shapes, strides, dtypes and
options came before, runs kernels that are bound to all of them already. Nothing else changes: a kept call is one that
has passed every check, and whatever it is bound to is in its key.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C
from .backends import cpu, native
from .dispatch import Backend
from .problem import Inputs, Problem, accumulation_dtype

# Kept calls and calls seen once: beyond so many all are forgotten.
_MOST = 1024


class _Kept(NamedTuple):
    """The calls that follow each other, and the tables that they read."""

    calls: tuple[_C.CpuCall, ...]
    tables: tuple[Inputs, ...]


# None: a call that cannot be kept.
_kept: dict[Hashable, _Kept | None] = {}
_seen: set[Hashable] = set()


def options_of(
    name: str, causal: Any, window: Any, softcap: Any, scale: Any, backend: Any, *others: Hashable
) -> Hashable | None:
    """A call's options for ``key_of``; None if one is of a type that only looks like a right one: True equals 1.0."""
    if (
        type(causal) is bool
        and type(softcap) is float
        and (scale is None or type(scale) is float)
        and (backend is None or type(backend) is str)
        and (window is None or (type(window) is tuple and all(w is None or type(w) is int for w in window)))
        and not torch.compiler.is_dynamo_compiling()
    ):
        return name, causal, window, softcap, scale, backend, *others
    return None


def key_of(options: Hashable, query: Any, *others: Any) -> Hashable | None:
    """What a call is kept under; None if it must go through the dispatcher. options: a tuple of plain numbers."""
    if (  # asked first: a mode sees every look at a tensor
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return None
    differentiates = torch.is_grad_enabled()
    parts: list[Hashable] = [options]
    try:
        for tensor in (query, *others):
            if type(tensor) is not Tensor or not tensor.is_cpu or (differentiates and tensor.requires_grad):
                return None
            parts += tensor.shape, tensor.stride(), tensor.dtype
    except RuntimeError:  # sparse and nested tensors have no strides
        return None
    return cpu.isa(), *parts


def is_kept(key: Hashable) -> bool:
    """Whether ``run`` would know the call."""
    return _kept.get(key) is not None


def run(key: Hashable, query: Tensor, *keys_and_values: Tensor) -> Tensor | None:
    """The output of a call that came before, from query, key and value (of each level); None for others."""
    kept = _kept.get(key)
    if kept is None:
        return None
    addresses = []
    for tensor in (query, *keys_and_values):
        addresses.append(tensor.data_ptr())
        # Efficient zeros and functional tensors have no memory, and empty ones need none.
        if tensor.is_neg() or not (addresses[-1] or tensor.numel() == 0):
            return None
    at, *addresses = addresses
    out = torch.empty_like(query)
    to, threads = out.data_ptr(), torch.get_num_threads()
    if len(kept.calls) == 1:
        kept.calls[0](at, addresses, to, threads)
        return out
    rows, dim = out.numel() // out.shape[-1], out.shape[-1]
    states = torch.empty(rows * (dim + 2), dtype=accumulation_dtype(out.dtype))
    sums = states[:rows].zero_()  # a row without a sum has no other state
    size = sums.element_size()
    total = sums.data_ptr()
    for i, call in enumerate(kept.calls):
        carry = total + rows * size, total, total + 2 * rows * size, i < len(kept.calls) - 1
        call(at, addresses[2 * i : 2 * i + 2], to, threads, carry)
    return out


def keep(key: Hashable, levels: Sequence[tuple[Problem, Inputs]], backend: Backend, given: Any, out: Tensor) -> None:
    """Keeps a call that came before: its levels, described, and the tensors it was given, as for ``run``.

    One that cannot be kept is noted as such: that is asked once too.
    """
    if len(_kept) >= _MOST:
        _kept.clear()
    _kept[key] = None
    taken = [levels[0][1].query, *(tensor for _, inputs in levels for tensor in inputs[1:3])]
    same = all(_is_same(ours, theirs) for ours, theirs in zip(taken, given, strict=True))  # no copy was made for it
    like = torch.empty_like(given[0])
    alike = (like.shape, like.stride()) == (out.shape, out.stride())
    if backend.NAME != cpu.NAME or not same or out.numel() == 0 or not alike:
        return
    described = []
    for problem, inputs in levels:
        query, first, second, to = (view[1:] for view in native.forward_tensors(problem, inputs, out, out)[:4])
        described.append((native.with_inputs(problem, inputs), first, second))
    # Levels with members are calls of their own.
    together = [described] if levels[0][1].members is None else [[level] for level in described]
    calls = tuple(_C.CpuCall(cpu.isa(), query, to, group) for group in together)
    _kept[key] = _Kept(calls, tuple(inputs._replace(**_NO_DATA) for _, inputs in levels))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """The same elements in the same places: another view of all of them is as good."""
    if one is other:
        return True
    described = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in (one, other)]
    return described[0] == described[1]


_NO_DATA: dict[str, Any] = {"query": None, "key": None, "value": None}


def came_before(key: Hashable, query: Tensor, out: Tensor) -> bool:
    """Whether a call did that is not kept yet: what never comes again is not worth keeping."""
    if max(query.shape[-1], out.shape[-1]) > cpu.MAX_DIM:
        return False
    if key in _seen:
        return key not in _kept
    if len(_seen) >= _MOST:
        _seen.clear()
    _seen.add(key)
    return False
