"""What a row of cpu-report is, and how it is measured: checked, then timed beside its peers and the machine's peaks."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch

from flashx import _C
from flashx.backends import cpu

from .cpu_oracle import Accuracy, Oracle, Sample
from .timing import Timing, interleaved, wall

# How much further than flashx from the oracle a peer may be: enough to show that it computed the same thing.
PEER_FACTOR = 4

Call = Callable[[], Any]
Unit = Literal["fp32", "bf16_pairs", "bf16_tiles"]


class Probes:
    """The peaks of the machine, as calls to be timed beside the kernels; each comes with the work that it does."""

    def __init__(self, quick: bool) -> None:
        self.threads = torch.get_num_threads()
        self._seconds = 0.001 if quick else 0.01
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._bytes = 2**24 if quick else min(2**30, memory // 8)
        self._rounds: dict[Unit, int] = {}

    def has(self, unit: Unit) -> bool:
        """Whether the instruction set in use has the unit."""
        return _C.cpu_multiply_adds(cpu.isa(), unit, 1, 1) > 0

    def multiply_adds(self, unit: Unit, threads: int | None = None) -> tuple[Call, float]:
        """The call, a hundredth of a second of multiply-adds, and its operations."""
        threads = threads or self.threads
        if unit not in self._rounds:
            few = 2**12
            seconds = min(wall(partial(_C.cpu_multiply_adds, cpu.isa(), unit, few, self.threads)) for _ in range(9))
            self._rounds[unit] = max(int(few * self._seconds / seconds), 1)
        call = partial(_C.cpu_multiply_adds, cpu.isa(), unit, self._rounds[unit], threads)
        return call, call()

    def read(self, *tensors: torch.Tensor) -> tuple[Call, float]:
        """The call that reads the tensors once, and its bytes."""
        parts = [(tensor.data_ptr(), tensor.nbytes // 4) for tensor in tensors]

        def call() -> None:
            for address, words in parts:
                _C.cpu_read(cpu.isa(), address, words, self.threads)

        return call, sum(tensor.nbytes for tensor in tensors)

    @cached_property
    def buffer(self) -> torch.Tensor:
        """1 GiB (less where the machine has little memory): far more than a core's share of any cache."""
        return torch.arange(self._bytes // 4, dtype=torch.int32)

    def summary(self, repeats: int) -> dict[str, float]:
        """Best rates in operations or bytes a second; reads of several sizes, to see that they settle."""
        units: list[Unit] = ["fp32", "bf16_pairs", "bf16_tiles"]
        probes = {f"{unit}_flops": self.multiply_adds(unit) for unit in units if self.has(unit)}
        for share in (16, 4, 1):
            part = self.buffer[: len(self.buffer) // share]
            probes[f"read_{part.nbytes // 2**20}_mib"] = self.read(part)
        timings = interleaved({name: call for name, (call, _) in probes.items()}, repeats, 0)
        return {name: peak(probes[name][1], timing) for name, timing in timings.items()}


def peak(work: float, timing: Timing) -> float:
    """The rate of a probe: that of its fastest call, since what slows it down is no lower limit of the machine."""
    return work / min(timing.samples)


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a row and, if it has one, its target."""

    name: str
    value: float
    unit: Literal["ratio", "fraction", "us", "MiB"] = "ratio"
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(slots=True)
class Workload:
    """What a row runs.

    ``calls`` by name ("flashx..." or a peer's) return the results of one and the same problem, which are checked;
    ``asides`` are timed beside them only. ``probes`` have the amount of work that their call does.
    """

    calls: Mapping[str, Call]
    samples: list[Sample]
    measures: Callable[[Mapping[str, Timing]], list[Measure]]
    detail: str = ""
    flops: float = 0
    bytes: float = 0
    asides: Mapping[str, Call] = field(default_factory=dict)
    probes: Mapping[str, tuple[Call, float]] = field(default_factory=dict)
    adapt: Mapping[str, Callable[[Any], torch.Tensor]] = field(default_factory=dict)  # a peer's layout to flashx's
    min_time: float = 0
    burst: int = 1  # calls in one sample


@dataclass(slots=True)
class Row:
    """What came out. ``status``: ok, wrong, failed (it raised), or skipped (this machine cannot show it)."""

    name: str
    status: Literal["ok", "wrong", "failed", "skipped"] = "ok"
    detail: str = ""
    reasons: list[str] = field(default_factory=list)
    accuracy: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    flops: float = 0
    bytes: float = 0

    @property
    def rate(self) -> str:
        """Of flashx, as text."""
        if "flashx" not in self.timings:
            return ""
        seconds = self.timings["flashx"].median
        if self.bytes:
            return f"{self.bytes / seconds / 1e9:.1f} GB/s"
        return f"{self.flops / seconds / 1e9:.0f} GF/s" if self.flops else ""


class Skipped(Exception):
    """Why a row cannot be measured here."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What every row gets."""

    quick: bool
    repeats: int
    probes: Probes

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


Build = Callable[[Setting], Workload | Row]


def measured(name: str, build: Build, setting: Setting) -> Row:
    """Build, check, then time."""
    row, threads = Row(name), torch.get_num_threads()
    try:
        work = build(setting)
        if isinstance(work, Row):
            return work
        row.detail, row.flops, row.bytes = work.detail, work.flops, work.bytes
        oracle = Oracle(work.samples)
        for call_name, call in work.calls.items():
            raw = call()
            raw = work.adapt[call_name](raw) if call_name in work.adapt else raw
            results = {"out": raw} if isinstance(raw, torch.Tensor) else raw
            factor = 1 if call_name.startswith("flashx") else PEER_FACTOR
            row.accuracy[call_name] = accuracy = oracle.check(results, factor)
            row.reasons += [
                f"{call_name}: {result} is off by {it.error:.3g}, budget {it.budget:.3g}"
                for result, it in accuracy.items()
                if not it.ok
            ]
        if row.reasons:
            row.status = "wrong"
            return row
        calls = {**work.calls, **work.asides, **{probe: call for probe, (call, _) in work.probes.items()}}
        row.timings = timed(calls, setting.repeats, work.min_time, work.burst)
        row.measures = work.measures(row.timings)
    except Skipped as reason:
        row.status, row.reasons = "skipped", [str(reason)]
    except Exception as error:  # the other rows still count
        row.status, row.reasons = "failed", [f"{type(error).__name__}: {error}".splitlines()[0]]
    finally:
        torch.set_num_threads(threads)
    return row


def timed(calls: Mapping[str, Call], repeats: int, min_time: float, burst: int) -> dict[str, Timing]:
    """interleaved, without the garbage collector; a sample is the mean of ``burst`` calls in a row."""

    def sample(call: Call) -> float:
        start = time.perf_counter()
        for _ in range(burst):
            call()
        return (time.perf_counter() - start) / burst

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return interleaved(calls, repeats, min_time / burst, wall if burst == 1 else sample)
    finally:
        if collecting:
            gc.enable()
