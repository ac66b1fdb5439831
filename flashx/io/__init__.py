"""Bytes moved: what attention reads and writes, predicted, bounded from below, and measured.

``kernels`` counts what csrc/cuda's kernels do, tile by tile, ``cpu`` roughly csrc/cpu's; ``algorithms`` what papers'
loops do; ``lower_bound`` what nobody can do without; ``schedules`` runs such loops through a small fast memory that
counts. ``predict`` makes a time of a cost and a ``Machine``; ``ring`` spreads it over ranks. ``compare`` holds
predictions against the emulator.

The two-level memory is that of Dao et al., "FlashAttention", section 2.1. Nothing here runs attention but ``compare``
and ``schedules``.

Example:
    >>> call = flashx.io.problem(8192, heads=16, head_dim=128, dtype=torch.float16)
    >>> flashx.io.kernels.forward(call).bytes / flashx.io.algorithms.standard(call).bytes
"""

from __future__ import annotations

from . import algorithms, cpu, examples, kernels, schedules
from .bounds import Bound, lower_bound
from .calls import Sequence, Tables, problem, visible_pairs
from .cost import Cost, Kernel
from .emulated import Comparison, compare
from .machines import MACHINES, Links, Machine, machine
from .ring import RingPoint, ring, ring_step, ring_sweep, ring_tokens, stops_paying
from .timing import Parts, Prediction, predict

__all__ = [
    "MACHINES",
    "Bound",
    "Comparison",
    "Cost",
    "Kernel",
    "Links",
    "Machine",
    "Parts",
    "Prediction",
    "RingPoint",
    "Sequence",
    "Tables",
    "algorithms",
    "compare",
    "cpu",
    "examples",
    "kernels",
    "lower_bound",
    "machine",
    "predict",
    "problem",
    "ring",
    "ring_step",
    "ring_sweep",
    "ring_tokens",
    "schedules",
    "stops_paying",
    "visible_pairs",
]
