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
from collections.abc import Sequence
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
# A product of two float32 rows cannot be read in pieces as one row can (triton_impl/tile.py's multiply_pieces).
_WIDEST_FLOAT32_PAIRS = 128


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


def simplicial_why_not(problem: Problem) -> list[str]:
    """Reasons against the fused kernels of 2-simplicial attention, whose first keys' problem it is."""
    reasons = why_not(problem)
    if problem.dtype == torch.float32 and max(problem.head_dim, problem.value_dim) > _WIDEST_FLOAT32_PAIRS:
        reasons.append(f"the fused kernels take float32 head dims up to {_WIDEST_FLOAT32_PAIRS}")
    return reasons


def simplicial_forward(
    problem: Problem, inputs: Inputs, key2: torch.Tensor, value2: torch.Tensor, window2: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of 2-simplicial attention."""
    query = inputs.query
    out = query.new_empty(*query.shape[:3], problem.value_dim)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    with _on_device_of(out):
        launch = _launch()
        launch.simplicial_forward(problem, inputs, launch.Second(key2, value2, window2), out, lse, native.tf32())
    return out, lse


def simplicial_backward(
    problem: Problem,
    inputs: Inputs,
    key2: torch.Tensor,
    value2: torch.Tensor,
    window2: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    gradients: Sequence[torch.Tensor | None],
) -> None:
    """Writes the gradients of query, key, value, key2 and value2; None for those that nobody asked for."""
    with _on_device_of(out):
        launch = _launch()
        launch.simplicial_backward(
            problem, inputs, launch.Second(key2, value2, window2), out, lse, grad_out, grad_lse,
            torch.empty_like(lse), gradients, native.tf32(),
        )  # fmt: skip


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
