"""What a computation costs: bytes by tensor, matrix products, exponentials; sums of kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

# What tells kernels where to read; counted as asked for, lane by lane, since caches answer nearly all of it.
TABLES = frozenset({"sequences", "members", "member_begin", "page_table", "block_map", "block_bits"})


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch, or one phase of an algorithm.

    Attributes:
        name: of the kernel.
        traffic: bytes (read, written) of each tensor in slow memory, as often as they are asked for.
        flops: multiplications and additions of the matrix products, padding of tiles and head dims included.
        exps: exponentials.
        unique: bytes of a tensor that is read or added to more than once, counted once.
        blocks: thread blocks; 0 for as many as the machine likes.
        row_blocks: blocks that read the same streamed tensors (those of one key head and batch entry).
        stream_bytes: what one such group streams, its keys and values, say: once.
        launches: kernels that this stands for.
    """

    name: str
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    flops: int = 0
    exps: int = 0
    unique: Mapping[str, int] = field(default_factory=dict)
    blocks: int = 0
    row_blocks: int = 1
    stream_bytes: int = 0
    launches: int = 1

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(read for read, _ in self.traffic.values())

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(written for _, written in self.traffic.values())

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Cost:
    """Kernels that run one after the other. ``+`` joins costs.

    Example:
        >>> call = flashx.io.problem(1024, heads=16, dtype=torch.float16)
        >>> cost = flashx.io.kernels.forward(call)
        >>> cost.bytes, cost.flops, round(cost.intensity)
    """

    kernels: tuple[Kernel, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.kernels + other.kernels)

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """All kernels of the costs, in order."""
        return Cost(tuple(kernel for cost in costs for kernel in cost.kernels))

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes (read, written) by tensor."""
        sums: dict[str, tuple[int, int]] = {}
        for kernel in self.kernels:
            for name, (read, written) in kernel.traffic.items():
                before = sums.get(name, (0, 0))
                sums[name] = (before[0] + read, before[1] + written)
        return sums

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(kernel.read for kernel in self.kernels)

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(kernel.written for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matrix products."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def exps(self) -> int:
        """Exponentials."""
        return sum(kernel.exps for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Kernel launches."""
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def without_tables(self) -> Cost:
        """The same, without the bytes of tables (``TABLES``)."""
        return Cost(
            tuple(
                replace(kernel, traffic={name: moved for name, moved in kernel.traffic.items() if name not in TABLES})
                for kernel in self.kernels
            )
        )


class Tally:
    """Bytes by tensor while they are being counted."""

    def __init__(self) -> None:
        self._read: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def read(self, name: str, count: int) -> None:
        """Adds bytes read."""
        if count:
            self._read[name] = self._read.get(name, 0) + count

    def write(self, name: str, count: int) -> None:
        """Adds bytes written."""
        if count:
            self._written[name] = self._written.get(name, 0) + count

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes (read, written) by tensor."""
        names = [*self._read, *(name for name in self._written if name not in self._read)]
        return {name: (self._read.get(name, 0), self._written.get(name, 0)) for name in names}
