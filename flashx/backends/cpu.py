"""The CPU backend: csrc/cpu's tiled kernels, compiled once per instruction set, chosen at run time."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .. import _C, env
from ..problem import Carry, Gradients, Inputs, Problem
from . import native
from .native import MAX_DIM as MAX_DIM

NAME = "cpu"
DEVICE = "cpu"
AUTOMATIC = True


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


def limits(problem: Problem) -> list[str]:
    """What of the problem the kernels do not have."""
    return native.too_wide(problem)


def why_not(problem: Problem) -> list[str]:
    """Reasons against running the problem on the CPU kernels; empty if they can."""
    elsewhere = [] if problem.device == DEVICE else [f"tensors are on {problem.device}, not on {DEVICE}"]
    return elsewhere + limits(problem)


def kernel(problem: Problem) -> str:
    """Name of the kernel that runs the problem."""
    return f"cpu/{isa()}"


def forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, carry: Carry | None = None) -> None:
    level = native.with_inputs(problem, inputs), *native.forward_tensors(problem, inputs, out, lse)
    _C.cpu_forward(isa(), torch.get_num_threads(), [level], native.carried(carry))


def forward_levels(levels: Sequence[tuple[Problem, Inputs]], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Levels without members, in one parallel region where a sequence has a few rows."""
    described = [
        (native.with_inputs(problem, inputs), *native.forward_tensors(problem, inputs, out, lse))
        for problem, inputs in levels
    ]
    _C.cpu_forward(isa(), torch.get_num_threads(), described, None)


def backward(
    problem: Problem,
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    delta = torch.empty_like(lse)
    described = native.with_inputs(problem, inputs)
    tensors = native.backward_tensors(problem, inputs, out, lse, grad_out, grad_lse, delta, gradients)
    _C.cpu_backward(described, isa(), torch.get_num_threads(), *tensors)
    native.write_sinks_gradient(inputs, lse, delta, gradients)
