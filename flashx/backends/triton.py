"""The Triton backend: triton_impl's kernels, the twins of csrc/cuda's, on GPUs; on the CPU Triton interprets them.

The interpreter, TRITON_INTERPRET=1, is for tests: it runs only where it is asked for by name. Triton reads the variable
when it is imported, which happens with the first call. Dropout's seed goes to the kernels by value, as in cuda.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING

import torch

from .. import env
from ..problem import Carry, Gradients, Inputs, Problem
from . import native

if TYPE_CHECKING:
    from types import ModuleType

NAME = "triton"
DEVICE = "cuda"
AUTOMATIC = True
OLDEST = (8, 0)
OLDEST_TRITON = (3, 6)  # pyproject.toml's


@functools.cache
def _not_installed() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed: pip install triton"]
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of somebody's own
        return []
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) >= OLDEST_TRITON:
        return []
    return ["triton {} is older than {}.{}: pip install --upgrade triton".format(version, *OLDEST_TRITON)]


@functools.cache
def _launch() -> ModuleType:
    """triton_impl's, imported late: that takes a second, and Triton may be absent."""
    from ..triton_impl import launch

    return launch


def limits(problem: Problem) -> list[str]:
    """What of the problem the kernels do not have."""
    no_float64 = ["the Triton kernels have no float64"] if problem.dtype == torch.float64 else []
    return no_float64 + native.too_wide(problem)


def why_not(problem: Problem) -> list[str]:
    """Reasons against running the problem here; empty if it can."""
    reasons = list(_not_installed())
    if problem.device == "cpu":
        if not env.triton_interpret():
            reasons.append("tensors are on cpu, and TRITON_INTERPRET=1 is not set")
    elif problem.device != DEVICE:
        reasons.append(f"tensors are on {problem.device}, not on {DEVICE}")
    elif torch.cuda.get_device_capability() < OLDEST:
        reasons.append(f"the GPU has compute capability below {OLDEST[0]}.{OLDEST[1]}")
    return reasons + limits(problem)


def kernel(problem: Problem) -> str:
    """Name of the kernel that runs the problem."""
    return f"{NAME}/{'interpreted' if problem.device == 'cpu' else 'compiled'}"


def forward(problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, carry: Carry | None = None) -> None:
    with _on_device_of(out):
        _launch().forward(problem, inputs, out, lse, carry, native.tf32())


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
    with _on_device_of(out):
        _launch().backward(problem, inputs, out, lse, grad_out, grad_lse, delta, gradients, native.tf32())
    native.write_sinks_gradient(inputs, lse, delta, gradients)


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
