"""Ring attention: what a rank computes, moves and sends, and where more ranks stop paying.

Each of P ranks owns N / P queries and keys; keys and values go round the ring while attention to those that are there
runs. (Liu et al., "Ring Attention with Blockwise Transformers", 2023, section 3.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ..masks import IntervalMask
from ..problem import Problem
from .algorithms import STATISTIC, Direction, flash_attention2
from .cost import Cost, Kernel
from .machines import Links, Machine
from .tiles import ceil_div
from .timing import predict

Balance = Literal["zigzag", "contiguous"]


@dataclass(frozen=True, slots=True)
class RingPoint:
    """A ring of so many ranks. Bytes and seconds are those of one rank.

    Attributes:
        ranks: P.
        tokens: queries and keys of a rank.
        cost: of one step's attention.
        sent: bytes of one step, to the next rank.
        compute: seconds of one step's attention.
        transfer: seconds of one step's bytes, latency included.
        seconds: of the whole.
        speedup: over one rank that has everything.
        bound_by: "link", "latency", or what bounds the attention.
    """

    ranks: int
    tokens: int
    cost: Cost
    sent: int
    compute: float
    transfer: float
    seconds: float
    speedup: float
    bound_by: str

    @property
    def efficiency(self) -> float:
        """Speedup over ranks."""
        return self.speedup / self.ranks

    @property
    def total_sent(self) -> int:
        """Bytes that a rank sends in all steps."""
        return self.sent * (self.ranks - 1)


def ring_step(problem: Problem, ranks: int, direction: Direction = "fwd", balance: Balance = "zigzag") -> Cost:
    """One step of one rank: its queries against the keys that are there, and the rows' states.

    Causal masks: with "zigzag" (each rank has a chunk from the front and one from the back) a step sees half its pairs
    on every rank; with "contiguous" the last rank sees all of them in every step, and the others wait for it.

    A state, running max, sum and accumulator in float32, is read and written each step; backward, dQ in float32.
    """
    tokens = _tokens(problem, ranks)
    causal = problem.mask.right == 0 and problem.mask.left is None
    # Half the keys for all queries, or all keys for the later half of them: the same number of pairs.
    keys = max(tokens // 2, 1) if causal and balance == "zigzag" and ranks > 1 else tokens
    mask = problem.mask if ranks == 1 else IntervalMask()
    local = replace(problem, q_len=tokens, k_len=keys, mask=mask)
    cost = flash_attention2(local, direction)
    if ranks == 1:
        return cost
    lines = problem.batch * problem.q_heads * tokens
    state = lines * (problem.value_dim + 2) * STATISTIC
    if direction != "bwd":
        cost += Cost((Kernel("state", {"carry": (state, state)}, launches=0),))
    if direction != "fwd":
        added = lines * problem.head_dim * STATISTIC
        cost += Cost((Kernel("dQ", {"grad_query_sum": (added, added)}, launches=0),))
    return cost


def ring_sent(problem: Problem, ranks: int, direction: Direction = "fwd", gradient_bytes: int = 4) -> int:
    """Bytes that a rank sends to the next one in a step: K and V; backward their gradients as well, in float32."""
    keys = problem.batch * problem.kv_heads * _tokens(problem, ranks)
    elements = keys * (problem.head_dim + problem.value_dim)
    forward, backward = elements * problem.dtype.itemsize, elements * (problem.dtype.itemsize + gradient_bytes)
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[direction]


def ring(
    problem: Problem,
    machine: Machine,
    ranks: int,
    direction: Direction = "fwd",
    *,
    balance: Balance = "zigzag",
    overlap: float = 1.0,
) -> RingPoint:
    """A ring of ``ranks`` machines: P steps of attention, P - 1 transfers that run beside them.

    ``seconds = compute + (P - 1) * max(compute, transfer)``. The ring's slowest link counts: inside a domain
    (``machine.links``) the fast one, across domains the slow one.

    Args:
        problem: the whole sequence; q_len and k_len are equal.
        ranks: P >= 1, no more than tokens.

    Raises:
        ValueError: lengths that differ, a window, too many ranks, or a machine without links.

    Example:
        >>> call = flashx.io.problem(2**20, heads=32, kv_heads=8, head_dim=128, causal=True)
        >>> flashx.io.ring(call, flashx.io.machine("H200"), 64).bound_by
    """
    if balance not in ("zigzag", "contiguous"):
        raise ValueError(f"balance must be zigzag or contiguous, got {balance!r}")
    alone = predict(ring_step(problem, 1, direction), machine, problem.dtype, overlap=overlap)
    if ranks == 1:
        cost = ring_step(problem, 1, direction)
        return RingPoint(1, problem.q_len, cost, 0, alone.seconds, 0.0, alone.seconds, 1.0, alone.bound_by)
    cost, sent = ring_step(problem, ranks, direction, balance), ring_sent(problem, ranks, direction)
    step, links = predict(cost, machine, problem.dtype, overlap=overlap), _links(machine)
    bandwidth = links.inside if ranks <= links.domain else links.outside
    transfer = sent / bandwidth + links.latency
    seconds = step.seconds + (ranks - 1) * max(step.seconds, transfer)
    bound = step.bound_by
    if transfer > step.seconds:
        bound = "link" if sent / bandwidth > links.latency else "latency"
    return RingPoint(
        ranks, _tokens(problem, ranks), cost, sent, step.seconds, transfer, seconds, alone.seconds / seconds, bound
    )


def ring_sweep(
    problem: Problem, machine: Machine, ranks: Iterable[int], direction: Direction = "fwd", *,
    balance: Balance = "zigzag", overlap: float = 1.0,
) -> list[RingPoint]:  # fmt: skip
    """``ring`` for each number of ranks."""
    return [ring(problem, machine, count, direction, balance=balance, overlap=overlap) for count in ranks]


def stops_paying(points: Iterable[RingPoint], least: float = 0.5) -> RingPoint | None:
    """The first ring whose ranks are used by less than ``least`` of what they could do; None if all pay.

    In order of ranks; efficiency falls with them, since a rank's work per byte sent does.
    """
    for point in sorted(points, key=lambda point: point.ranks):
        if point.efficiency < least:
            return point
    return None


def ring_tokens(problem: Problem, machine: Machine, direction: Direction = "fwd", *, outside: bool = True) -> int:
    """Tokens that a rank must have for its products to hide the transfers, at peak rates.

    A step's products grow with the square of them, its bytes with the first power:
    ``n >= sent bytes per token / link bandwidth * FLOP rate / FLOPs per pair``, twice that for causal zigzag.
    Independent of head dim and batch.
    """
    links = _links(machine)
    bandwidth = links.outside if outside else links.inside
    per_token = ring_sent(replace(problem, q_len=2, k_len=2), 2, direction)
    factor = {"fwd": 1.0, "bwd": 2.5, "both": 3.5}[direction]
    per_pair = 2 * (problem.head_dim + problem.value_dim) * problem.q_heads * problem.batch * factor
    if problem.mask.right == 0:
        per_pair /= 2
    return int(-(-per_token / bandwidth * machine.flops_of(problem.dtype) // per_pair))


def _tokens(problem: Problem, ranks: int) -> int:
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks must be an int >= 1, got {ranks!r}")
    if problem.q_len != problem.k_len:
        raise ValueError(f"q_len must be k_len for a ring, got {problem.q_len} and {problem.k_len}")
    if problem.mask.left is not None:
        raise ValueError(f"window's left must be None for a ring, got {problem.mask.left}")
    if ranks > problem.q_len:
        raise ValueError(f"ranks must be at most the {problem.q_len} tokens, got {ranks}")
    return ceil_div(problem.q_len, ranks)


def _links(machine: Machine) -> Links:
    if machine.links is None:
        raise ValueError(f"machine must have links to other ones for a ring, got {machine.name}")
    return machine.links
