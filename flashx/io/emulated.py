"""Predictions beside what the emulator counts: ``compare`` runs a call on it (docs/emulator.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import dispatch
from ..problem import Carry, Gradients, Inputs, Problem
from . import kernels
from .calls import Tables
from .cost import TABLES, Cost

NAME = "cuda_emulated"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the model says of a call, and what the emulator counted.

    Attributes:
        predicted: the model's cost of every launch.
        counted: bytes (read, written) of each tensor.
        mma: matrix instructions that the emulator counted.
    """

    predicted: Cost
    counted: dict[str, tuple[int, int]]
    mma: int

    @property
    def error(self) -> float:
        """Predicted bytes over counted bytes, less 1."""
        total = sum(read + written for read, written in self.counted.values())
        return self.predicted.bytes / total - 1 if total else 0.0

    def errors(self) -> dict[str, float]:
        """As ``error``, tensor by tensor; inf where bytes were predicted of a tensor that is not touched."""
        found = {}
        predicted = self.predicted.traffic
        for name in {**self.counted, **predicted}:
            want, have = sum(self.counted.get(name, (0, 0))), sum(predicted.get(name, (0, 0)))
            found[name] = have / want - 1 if want else float("inf") if have else 0.0
        return found

    def worst(self) -> float:
        """The largest error of a tensor's that is no table (``cost.TABLES``), without its sign."""
        return max((abs(error) for name, error in self.errors().items() if name not in TABLES), default=0.0)


def compare(run: Callable[[], Any]) -> Comparison:
    """Calls ``run`` and predicts each launch of it; its attention must be asked for with ``backend="cuda_emulated"``.

    The emulator's counts are reset.

    Raises:
        UnsupportedError: this build has no emulator.

    Example:
        >>> query = torch.randn(1, 1, 256, 64, dtype=torch.float16)
        >>> found = flashx.io.compare(lambda: flashx.attention(query, query, query, backend="cuda_emulated"))
        >>> found.error
        0.0
    """
    from .. import _C

    emulator = getattr(_C, NAME, None)
    if emulator is None:
        raise dispatch.UnsupportedError(f"this build has no {NAME} kernels: set FLASHX_EMULATOR=1 and build again")
    with _recorded() as costs:
        emulator.reset_traffic()
        run()
        counted = {name: (read, written) for name, read, written in emulator.traffic()}
        mma = emulator.counters()["mma"]
    return Comparison(Cost.total(costs), {name: moved for name, moved in counted.items() if any(moved)}, mma)


class _Recorder:
    """A backend that predicts each call before it runs it."""

    def __init__(self, backend: dispatch.Backend, costs: list[Cost]) -> None:
        self._backend, self._costs = backend, costs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(
        self, problem: Problem, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, carry: Carry | None = None
    ) -> None:
        tables, carried = Tables.of(problem, inputs), carry is not None
        suspend = carry is not None and carry.suspend
        fresh = carry is not None and bool((carry.max == -torch.inf).all())
        self._costs.append(kernels.forward(problem, tables, carried=carried, suspend=suspend, fresh=fresh))
        self._backend.forward(problem, inputs, out, lse, carry)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        gradients: Gradients,
    ) -> None:
        tables = Tables.of(problem, inputs, gradients.bias is not None, grad_lse is not None)
        self._costs.append(kernels.backward(problem, tables, adds_grad_query=gradients.adds_query))
        self._backend.backward(problem, inputs, out, lse, grad_out, grad_lse, gradients)


@contextmanager
def _recorded() -> Iterator[list[Cost]]:
    costs: list[Cost] = []
    backend = dispatch.BACKENDS[NAME]
    dispatch.BACKENDS[NAME] = _Recorder(backend, costs)
    try:
        yield costs
    finally:
        dispatch.BACKENDS[NAME] = backend
