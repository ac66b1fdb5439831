"""Published figures beside what the model says of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import algorithms
from .calls import problem
from .cost import Cost
from .machines import MACHINES
from .timing import predict

GIGA = 1e9


class Published(NamedTuple):
    """A figure of a paper: GFLOPs, gigabytes moved, milliseconds."""

    gflops: float
    gigabytes: float
    milliseconds: float


class Row(NamedTuple):
    """One implementation of an example.

    Attributes:
        name: of the implementation, with what is assumed of it.
        cost: what the model counts.
        seconds: predicted, at the machine's peaks.
        bound_by: what bounds it.
        published: the paper's figures, where there are any.
    """

    name: str
    cost: Cost
    seconds: float
    bound_by: str
    published: Published | None

    @property
    def bytes_error(self) -> float | None:
        """Bytes counted over bytes published, less 1."""
        return None if self.published is None else self.cost.bytes / (GIGA * self.published.gigabytes) - 1


STANDARD = Published(66.6, 40.3, 41.7)
FLASH = Published(75.2, 4.4, 7.3)

NOTES = (
    'Published: Dao et al., "FlashAttention", figure 2 left: GPT-2 medium, length 1024, head dim 64, 16 heads, batch '
    "64, A100, forward and backward. What its count of the standard one includes is not said; the paper's benchmarks "
    "run with dropout and a padding mask (section 4.3).",
    "Standard, mask and dropout: float16 scores; one additive mask pass, forward; dropout that keeps a byte for each "
    "element. That is 18 passes over N x N and 12 over N x d; bare, 11 and 12. Chosen because it fits.",
    "FlashAttention: the blocks of algorithm 1 for 164 KB of shared memory, 328 keys, so 4 passes over Q and O; "
    "dropout's bits are made again, not stored; O and dQ are kept in float16.",
    "The published GFLOPs do not follow from the published sizes: 12 N^2 d for each of 1024 heads is 825. Their ratio, "
    "1.13, is near to that of 7 products and 6, 1.17.",
    "Milliseconds are a lower bound at data-sheet peaks (A100, 40 GB).",
)


def gpt2_medium() -> list[Row]:
    """FlashAttention's own example: the HBM traffic of standard attention against its own, forward and backward.

    Dao et al., "FlashAttention", figure 2 (left); ``NOTES`` says what is assumed.

    Example:
        >>> [round(row.cost.bytes / 1e9, 1) for row in flashx.io.examples.gpt2_medium()]
        [40.3, 25.2, 4.7, 16.9]
    """
    call = problem(1024, heads=16, batch=64, head_dim=64, dtype=torch.float16)
    machine = MACHINES["A100-40GB"]
    costs = [
        ("standard, mask and dropout", algorithms.standard(call, "both", dropout=True, mask_passes=1), STANDARD),
        ("standard, bare", algorithms.standard(call, "both"), None),
        ("FlashAttention", algorithms.flash_attention(call, "both", fast_bytes=machine.fast_bytes), FLASH),
        ("FlashAttention-2, 128 x 64", algorithms.flash_attention2(call, "both"), None),
    ]
    rows = []
    for name, cost, published in costs:
        found = predict(cost, machine, call.dtype)
        rows.append(Row(name, cost, found.seconds, found.bound_by, published))
    return rows
