"""Measuring a case: ask, check, then time. Whoever refuses, fails or is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from . import check, timing
from .cases import Case, Inputs
from .implementations import Implementation

Status = Literal["ok", "refused", "failed", "wrong"]


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation on one case.

    ``status``: "ok", "refused" (``reasons`` say why), "failed" (it raised; ``reasons`` hold the message) or "wrong"
    (some ``accuracy`` is not ok). Only "ok" has a timing. ``ratio_to_torch``: how many times as fast as torch on the
    same case; None if either was not timed.
    """

    case: Case
    implementation: str
    status: Status
    reasons: list[str] = field(default_factory=list)
    accuracy: dict[str, check.Accuracy] = field(default_factory=dict)
    timing: timing.Timing | None = None
    ratio_to_torch: float | None = None

    @property
    def gflops(self) -> float | None:
        """GFLOP/s over the median."""
        return None if self.timing is None else self.case.flops() / self.timing.median / 1e9

    @property
    def gbytes(self) -> float | None:
        """Compulsory GB/s over the median."""
        return None if self.timing is None else self.case.bytes() / self.timing.median / 1e9

    @property
    def worst(self) -> check.Accuracy | None:
        """The accuracy of the result that comes closest to its budget, or is furthest over it."""
        return max(self.accuracy.values(), key=lambda accuracy: accuracy.share, default=None)


def measure(
    case: Case,
    implementations: Mapping[str, Implementation],
    repeats: int,
    min_time: float,
    device: str = "cpu",
    sample: Callable[[Callable[[], object]], float] = timing.wall,
) -> list[Row]:
    """A row for each implementation, in their order; see timing.interleaved for repeats, min_time and sample."""
    inputs = Inputs(*(tensor.to(device) for tensor in case.inputs()))
    oracle = check.Oracle(case, inputs)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], check.Results]] = {}
    for name, implementation in implementations.items():
        if reasons := implementation.why_not(case):
            rows[name] = Row(case, name, "refused", reasons)
            continue
        try:
            call = check.run(case, implementation.prepare(case, inputs), inputs)
            accuracy = oracle.check(call())
        except Exception as error:  # a peer may raise anything, and the other rows still count
            rows[name] = Row(case, name, "failed", [f"{type(error).__name__}: {error}".splitlines()[0]])
            continue
        if all(result.ok for result in accuracy.values()):
            rows[name], calls[name] = Row(case, name, "ok", accuracy=accuracy), call
        else:
            rows[name] = Row(case, name, "wrong", accuracy=accuracy)
    timings = timing.interleaved(calls, repeats, min_time, sample)
    for name, measured in timings.items():
        ratio = timings["torch"].median / measured.median if "torch" in timings else None
        rows[name] = replace(rows[name], timing=measured, ratio_to_torch=ratio)
    return list(rows.values())
