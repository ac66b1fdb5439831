"""From a cost and a machine to a time: a roofline with exponentials and a shared cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .cost import TABLES, Cost, Kernel
from .machines import Machine
from .tiles import ceil_div


class Parts(NamedTuple):
    """Seconds that a kernel's parts would take by themselves.

    Attributes:
        matmul: matrix products.
        memory: bytes from and to slow memory.
        cache: bytes that cores ask the shared cache for.
        exp: exponentials.
        launch: launches.
    """

    matmul: float
    memory: float
    cache: float
    exp: float
    launch: float

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        return max(zip(self, self._fields, strict=True))[1]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted time.

    Attributes:
        seconds: of all kernels, one after the other.
        parts: summed over kernels.
        kernels: each one's name and parts.
        slow_bytes: bytes that slow memory moves, behind the shared cache.
        bound_by: what takes longest in the kernel that does.
    """

    seconds: float
    parts: Parts
    kernels: tuple[tuple[str, Parts], ...]
    slow_bytes: int
    bound_by: str


def predict(cost: Cost, machine: Machine, dtype: torch.dtype, *, overlap: float = 1.0) -> Prediction:
    """The time of a cost on a machine: of each kernel, what takes longest, if all of it runs side by side.

    A kernel's time is ``max(parts) + (1 - overlap) * (sum(parts) - max(parts))`` and its launch. With the default it is
    a lower bound: peak rates, nothing waits. Where exponentials share units with products, the two count as one part.
    Fewer blocks than cores reach that share of the products, exponentials and cache bandwidth.

    Slow memory: what a kernel reads again, or adds to, comes from the shared cache if what the heads in flight stream
    fits half of it; else once for each wave of blocks that run together, since those stream in step.

    Args:
        dtype: whose matrix products.
        overlap: 1: products, bytes and exponentials hide each other; 0: nothing does.

    Raises:
        ValueError: overlap outside [0, 1], or a dtype that the machine has no rate for.

    Example:
        >>> call = flashx.io.problem(8192, heads=16, head_dim=128, causal=True)
        >>> flashx.io.predict(flashx.io.kernels.forward(call), flashx.io.machine("H200"), call.dtype).bound_by
        'matmul'
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must be in [0, 1], got {overlap}")
    rate, seconds, slow = machine.flops_of(dtype), 0.0, 0
    found: list[tuple[str, Parts]] = []
    longest = (0.0, "launch")
    for kernel in cost.kernels:
        moved = slow_bytes(kernel, machine)
        slow += moved
        share = min(1.0, kernel.blocks / machine.cores) if kernel.blocks else 1.0
        work = (
            kernel.flops / (rate * share),
            moved / machine.bandwidth,
            _asked(kernel) / (machine.cache_bandwidth * share),
            kernel.exps / (machine.exp * share),
        )
        parts = Parts(*work, kernel.launches * machine.launch)
        side_by_side = (work[0] + work[3], *work[1:3]) if machine.shared_units else work
        most = max(side_by_side)
        taken = most + (1 - overlap) * (sum(work) - most) + parts.launch
        seconds += taken
        found.append((kernel.name, parts))
        longest = max(longest, (taken, parts.bound_by))
    total = Parts(*(sum(parts[i] for _, parts in found) for i in range(len(Parts._fields))))
    return Prediction(seconds, total, tuple(found), slow, longest[1])


def slow_bytes(kernel: Kernel, machine: Machine) -> int:
    """Bytes of a kernel that reach slow memory, behind the shared cache: see ``predict``."""
    flight = machine.cores * machine.blocks_per_core
    heads = ceil_div(kernel.blocks, kernel.row_blocks) if kernel.blocks else 1
    in_flight = min(heads, ceil_div(flight, kernel.row_blocks))
    fits = in_flight * kernel.stream_bytes <= machine.cache_bytes / 2
    waves = 1 if fits else ceil_div(kernel.row_blocks, flight)
    total = 0
    for name, (read, written) in kernel.traffic.items():
        if name not in TABLES:
            once = kernel.unique.get(name)
            total += read + written if once is None else min(read, once * waves) + min(written, once * waves)
    return total


def _asked(kernel: Kernel) -> int:
    return sum(read + written for name, (read, written) in kernel.traffic.items() if name not in TABLES)
