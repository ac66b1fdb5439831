"""What a machine can do at best: the roofs of a roofline. Measured with torch's own matrix product and copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import timing
from .cases import DTYPES, Case

# Seconds that one matrix product of the probe may take; some CPUs have no instructions for half precision.
LONGEST = 0.05


@dataclass(frozen=True, slots=True)
class Machine:
    """GFLOP/s of matrix products in each dtype, and GB/s of reading memory."""

    gflops: dict[str, float]
    gbytes: float

    def roof(self, case: Case) -> float | None:
        """GFLOP/s that a case of its intensity can reach; None for a dtype that was not measured."""
        peak = self.gflops.get(case.dtype)
        return None if peak is None else min(peak, self.gbytes * case.flops() / case.bytes())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(dtypes: Iterable[str], device: str, sample: Callable[[Callable[[], object]], float] = timing.wall) -> Machine:
    """The best of a few samples; takes less than a second."""
    sizes, count = ((1024, 8192), 2**30) if device == "cuda" else ((256, 1024), 2**28)
    gflops = {dtype: max(_products(dtype, sizes, device, sample)) for dtype in dict.fromkeys(dtypes)}
    memory = torch.ones(count // 4, device=device)
    return Machine(gflops, memory.nbytes / _best(memory.sum, sample) / 1e9)


def _products(
    dtype: str, sizes: Iterable[int], device: str, sample: Callable[[Callable[[], object]], float]
) -> Iterator[float]:
    """GFLOP/s at growing sizes, as long as one product takes at most LONGEST seconds."""
    for size in sizes:
        factors = [torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2)]
        yield (rate := 2 * size**3 / _best(functools.partial(torch.matmul, *factors), sample) / 1e9)
        if 2 * (4 * size) ** 3 / rate / 1e9 > LONGEST:
            return


def _best(call: Callable[[], object], sample: Callable[[Callable[[], object]], float]) -> float:
    call()
    return min(sample(call) for _ in range(5))
