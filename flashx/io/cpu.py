"""Bytes, products and exponentials of csrc/cpu's kernels (docs/kernels.md): approximate where csrc/cuda's are exact.

What a CPU's caches do with tiles is theirs, so only what must come from memory at least once, and how often keys are
streamed, is counted; there is no emulator to hold it against. ``flashx-bench model --machine cpu --measure`` says how
far off the times are.
"""

from __future__ import annotations

from ..problem import Problem
from .algorithms import Direction, compulsory
from .calls import Tables, visible_pairs
from .cost import Cost, Kernel
from .tiles import ceil_div, group

ROW_TILE = 192  # packed rows of a row tile: 4 blocks of 3 vectors of float32 with AVX-512 (csrc/cpu/forward.h)
KEY_TILE = 128


def kernels(problem: Problem, direction: Direction = "fwd") -> Cost:
    """The CPU kernels' cost: keys and values once per tile of packed rows, visible pairs only.

    Forward two products. Backward five in float32 and float64, whose one sweep adds dQ in the output; seven in 16-bit,
    with a sweep for dK and dV and one for dQ.

    Args:
        problem: dense or with sequences; without a block mask.

    Raises:
        ValueError: a block mask.
    """
    if problem.block is not None or problem.ragged:
        raise ValueError(f"the CPU model takes dense batches without a block mask, got {problem}")
    least = compulsory(problem, direction)
    return Cost(tuple(_kernel(problem, kernel) for kernel in least.kernels))


def _kernel(problem: Problem, least: Kernel) -> Kernel:
    passes = ceil_div(problem.q_len * group(problem), ROW_TILE)
    shown = visible_pairs(problem, Tables()) / (problem.batch * problem.q_heads * problem.q_len * problem.k_len)
    traffic = dict(least.traffic)
    unique = {name: read for name, (read, _) in traffic.items() if read}
    for name in ("key", "value"):
        read, written = traffic[name]
        traffic[name] = (max(read, int(read * passes * shown)), written)
    flops, exps = least.flops, least.exps
    if least.name == "backward":
        streams = ceil_div(problem.k_len, KEY_TILE)
        if problem.dtype.itemsize == 2:
            flops, exps = flops * 7 // 5, 2 * exps
        else:
            # Each key tile adds to dQ in the output.
            added = max(int(traffic["grad_query"][1] * streams * shown), traffic["grad_query"][1])
            unique["grad_query"] = traffic["grad_query"][1]
            traffic["grad_query"] = (added, added)
        for name in ("query", "grad_out"):
            traffic[name] = (max(traffic[name][0], int(traffic[name][0] * streams * shown)), 0)
    pair_bytes = problem.k_len * (problem.head_dim + problem.value_dim) * problem.dtype.itemsize
    blocks = passes * problem.batch * problem.kv_heads
    return Kernel(least.name, traffic, flops, exps, unique, blocks, passes, pair_bytes)
