"""Machines as numbers: what they compute, move and exponentiate in a second.

GPUs from data sheets, this CPU measured.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Links:
    """What joins the ranks of a ring, in bytes per second and direction and rank.

    Attributes:
        domain: ranks that the fast links join.
        inside, outside: bandwidth within a domain, and where a ring leaves it.
        latency: seconds of a transfer besides its bytes.
    """

    domain: int
    inside: float
    outside: float
    latency: float = 10e-6


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine. Rates are per second, sizes in bytes.

    Attributes:
        name: of the machine.
        source: where the numbers are from.
        matmul: FLOPs of dense matrix products by dtype; float32 is TF32's on GPUs, whose kernels issue three products.
        bandwidth: of slow memory (HBM, DRAM).
        exp: exponentials.
        cores: multiprocessors, or threads.
        fast_bytes: fast memory of a core: shared memory of a multiprocessor, L2 of a CPU's.
        cache_bytes: of the cache that all cores share (L2 of a GPU, L3 of a CPU); 0 for none.
        cache_bandwidth: of that cache; inf where nobody says.
        blocks_per_core: thread blocks that a core runs side by side.
        launch: seconds that a kernel launch takes where nothing hides it.
        links: to other machines like it.
        shared_units: exponentials run on the units that multiply, so that their times add up (CPUs).
    """

    name: str
    source: str
    matmul: Mapping[torch.dtype, float]
    bandwidth: float
    exp: float
    cores: int
    fast_bytes: int
    cache_bytes: int = 0
    cache_bandwidth: float = float("inf")
    blocks_per_core: int = 1
    launch: float = 0.0
    links: Links | None = None
    shared_units: bool = False

    def flops_of(self, dtype: torch.dtype) -> float:
        """FLOPs per second of the dtype's products.

        Raises:
            ValueError: the machine has no rate for it.
        """
        if dtype not in self.matmul:
            names = ", ".join(str(known).removeprefix("torch.") for known in self.matmul)
            raise ValueError(f"dtype must be one of {names} for {self.name}, got {dtype}")
        return self.matmul[dtype]

    def derated(self, matmul: float = 1.0, bandwidth: float = 1.0, exp: float = 1.0) -> Machine:
        """The same, at fractions of its peaks: what kernels reach, where somebody has measured it."""
        for name, share in (("matmul", matmul), ("bandwidth", bandwidth), ("exp", exp)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        return replace(
            self,
            matmul={dtype: rate * matmul for dtype, rate in self.matmul.items()},
            bandwidth=self.bandwidth * bandwidth,
            exp=self.exp * exp,
        )

    @staticmethod
    def measure_cpu(seconds: float = 1.0) -> Machine:
        """This CPU with torch's threads: a probe of its products, of reading memory, and of exponentials.

        Products of 512 x 512 matrices by torch, sums of 16 MB at a time out of 256 MB, ``exp`` of 256 KB a thread: the
        best one of many short calls each. Others who use the CPU meanwhile make it look slower, but with a single
        thread, whose own time is taken.

        Args:
            seconds: that it takes, about.
        """
        return _measure_cpu(seconds)


_A100_SOURCE = (
    "NVIDIA A100 data sheet and Ampere whitepaper (108 SMs, 1.41 GHz, 164 KB shared memory, 40 MB L2, 5120 B/clk); "
    "16 exp/clk/SM: CUDA programming guide, arithmetic instructions; NVLink 3 600 GB/s both ways, HDR InfiniBand 200 "
    "Gb/s"
)
_HOPPER = (
    "(132 SMs, 227 KB shared memory, 50 MB L2; 989 TFLOP/s are 132 x 4096 x 1.83 GHz; 16 exp/clk/SM: 3.9 T/s, "
    "FlashAttention-3, section 3.2); L2 bytes a clock taken for A100's; NVLink 4 900 GB/s both ways, NDR InfiniBand "
    "400 Gb/s"
)


def _gpu(
    name: str, source: str, half: float, tf32: float, bandwidth: float, cores: int, clock: float, shared: int,
    cache: int, links: Links,
) -> Machine:  # fmt: skip
    return Machine(
        name=name,
        source=source,
        matmul={torch.float16: half, torch.bfloat16: half, torch.float32: tf32},
        bandwidth=bandwidth,
        exp=16 * cores * clock,
        cores=cores,
        fast_bytes=shared * 1024,
        cache_bytes=cache * 2**20,
        cache_bandwidth=5120 * clock,
        blocks_per_core=2,
        launch=2e-6,
        links=links,
    )


MACHINES: dict[str, Machine] = {
    "A100": _gpu(
        "A100", f"SXM, 80 GB. {_A100_SOURCE}", 312e12, 156e12, 2.039e12, 108, 1.41e9, 164, 40,
        Links(8, 300e9, 25e9),
    ),
    "A100-40GB": _gpu(
        "A100-40GB", f"SXM, 40 GB, FlashAttention's. {_A100_SOURCE}", 312e12, 156e12, 1.555e12, 108, 1.41e9, 164, 40,
        Links(8, 300e9, 25e9),
    ),
    "H100": _gpu(
        "H100", f"SXM. NVIDIA H100 data sheet {_HOPPER}", 989.4e12, 494.7e12, 3.35e12, 132, 1.83e9, 227, 50,
        Links(8, 450e9, 50e9),
    ),
    "H200": _gpu(
        "H200", f"SXM. NVIDIA H200 data sheet {_HOPPER}", 989.4e12, 494.7e12, 4.8e12, 132, 1.83e9, 227, 50,
        Links(8, 450e9, 50e9),
    ),
    "B200": _gpu(
        "B200",
        "HGX, 1000 W. NVIDIA Blackwell data sheet (2.25 PFLOP/s dense, 8 TB/s, NVLink 5 1.8 TB/s both ways); 148 SMs, "
        "8192 FLOPs and 16 exp a clock and SM: FlashAttention-4, section 3 (so 1.86 GHz); L2 126 MB, its bytes a clock "
        "taken for A100's; InfiniBand 400 Gb/s a GPU",
        2250e12, 1125e12, 8e12, 148, 1.856e9, 227, 126, Links(8, 900e9, 50e9),
    ),
}  # fmt: skip


def machine(name: str) -> Machine:
    """A machine of ``MACHINES`` by name, or ``cpu``: this one, measured.

    Raises:
        ValueError: no such machine.

    Example:
        >>> flashx.io.machine("H200").bandwidth
        4800000000000.0
    """
    if name.lower() == "cpu":
        return Machine.measure_cpu()
    known = {known.lower(): known for known in MACHINES}
    if name.lower() not in known:
        raise ValueError(f"machine must be one of {', '.join([*MACHINES, 'cpu'])}, got {name!r}")
    return MACHINES[known[name.lower()]]


def clock() -> Callable[[], float]:
    """Seconds, to time work on this CPU with: of a single thread those that it computes, whoever else does."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass
class _Probe:
    """The best rate of rounds that take so many seconds together."""

    seconds: float
    rounds: int = field(default=3)

    def rate(self, work: float, run: Callable[[], object]) -> float:
        now = clock()
        run()
        best, spent, done = float("inf"), 0.0, 0
        while spent < self.seconds or done < self.rounds:
            start = now()
            run()
            taken = max(now() - start, 1e-9)
            best, spent, done = min(best, taken), spent + taken, done + 1
        return work / best


def _measure_cpu(seconds: float) -> Machine:
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    probe = _Probe(seconds / 6)
    size, matmul = 512, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype)
        matmul[dtype] = probe.rate(2 * size**3, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
    chunks = itertools.cycle(torch.ones(2**26).chunk(16))
    bandwidth = probe.rate(2**24, lambda: next(chunks).sum())
    threads = torch.get_num_threads()
    # Long enough for all threads, little enough for their caches.
    line = torch.randn(threads, 2**16)
    raised = torch.empty_like(line)
    exp = probe.rate(line.numel(), lambda: torch.exp(line, out=raised))
    return Machine(
        name=f"cpu ({threads} threads)",
        source="measured: torch.mm of 512 x 512, torch.sum over 256 MB, torch.exp of 256 KB a thread",
        matmul=matmul,
        bandwidth=bandwidth,
        exp=exp,
        cores=threads,
        fast_bytes=_cache_size(2, 2**20),
        cache_bytes=_cache_size(3, 2**25),
        shared_units=True,
    )


def _cache_size(level: int, otherwise: int) -> int:
    """Bytes of this CPU's cache of a level, where Linux says so."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in sorted(folder.glob("index*")) if folder.is_dir() else []:
        try:
            if int((index / "level").read_text()) == level:
                text = (index / "size").read_text().strip()
                return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)
        except (OSError, ValueError):
            continue
    name = f"SC_LEVEL{level}_CACHE_SIZE"
    return (os.sysconf(name) if name in os.sysconf_names else 0) or otherwise
