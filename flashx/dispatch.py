"""Dispatch: the first backend that has no reason against a Problem runs it; refusals are never silent."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch

from .backends import cpu, cuda, reference, triton
from .problem import Carry, Gradients, Inputs, Problem


class Backend(Protocol):
    """What a backend, a module or an object, offers. Tensors come checked: see Problem.from_tensors.

    ``DEVICE``: the type of the devices whose tensors it takes, None for any. ``AUTOMATIC``: False if it runs only where
    it is asked for by name.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def DEVICE(self) -> str | None: ...
    @property
    def AUTOMATIC(self) -> bool: ...

    def limits(self, problem: Problem) -> list[str]:
        """Reasons against the problem that hold on every machine and in every build, whatever the tensors' device."""

    def why_not(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot run the problem; empty if it can."""

    def kernel(self, problem: Problem) -> str:
        """Name of the kernel that would run the problem."""

    def forward(
        self,
        problem: Problem,
        inputs: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        carry: Carry | None = None,
    ) -> None:
        """Write the output (B, Hq, Lq, Dv) and the log-sum-exp (B, Hq, Lq), or go on from and to a carry."""

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
        """Write the gradients; that of bias sums over the dimensions that bias broadcasts over.

        out, lse and their gradients are those of all calls that share the queries, if gradients.adds_query.
        """


_ALL: tuple[Backend, ...] = (cuda.CUDA, cpu, triton, reference, cuda.EMULATED)
BACKENDS: dict[str, Backend] = {backend.NAME: backend for backend in _ALL}


class UnsupportedError(ValueError):
    """No backend takes the problem; the message holds the problem and every refusal."""


def check_name(name: str | None) -> None:
    """Raises ValueError for a name that is no backend's."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def refusals(problem: Problem) -> dict[str, list[str]]:
    """For each backend the reasons against it; an empty list means that it can run."""
    return {name: backend.why_not(problem) for name, backend in BACKENDS.items()}


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The named backend, or the first automatic one without a reason against the problem.

    Warns when that is the reference: it is exact, but not what anybody came for.

    Raises:
        ValueError: unknown name; or no backend (or not the named one) can run the problem.
    """
    return choose_for_all((problem,), name)


def choose_for_all(problems: Sequence[Problem], name: str | None = None) -> Backend:
    """As ``choose``, of problems that must have the same backend."""
    check_name(name)
    reasons: dict[str, list[str]] = {}
    for candidate, backend in BACKENDS.items():
        if not (backend.AUTOMATIC if name is None else candidate == name):
            continue
        reasons[candidate] = list(dict.fromkeys(why for problem in problems for why in backend.why_not(problem)))
        if reasons[candidate]:
            continue
        if name is None and candidate == reference.NAME:
            # That a backend is made for another device is no news.
            here = (why for other, why in reasons.items() if problems[0].device == BACKENDS[other].DEVICE)
            why = "; ".join(reason for why in here for reason in why)
            warnings.warn(f"flashx runs naive attention, slow and of size Lq x Lk: {why}", stacklevel=2)
        return backend
    lines = [f"  {candidate}: {'; '.join(why)}" for candidate, why in reasons.items()]
    described = "\n".join(str(problem) for problem in problems)
    raise UnsupportedError("\n".join([f"no backend runs this problem: {described}", *lines]))
