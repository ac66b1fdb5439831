"""Measuring a case: check, then time. Whoever refuses, fails or is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import flashx

from . import check, timing
from .cases import Case
from .implementations import Implementation, Refused

Status = Literal["ok", "refused", "failed", "wrong"]


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation on one case.

    ``status``: "ok", "refused" (``reasons`` say why), "failed" (it raised; ``reasons`` hold the message) or "wrong"
    (some ``accuracy`` is not ok). Only "ok" has a timing. ``ratios``: how many times as fast as each other
    implementation on the same case, where both were timed.
    """

    case: Case
    implementation: str
    status: Status
    reasons: list[str] = field(default_factory=list)
    accuracy: dict[str, check.Accuracy] = field(default_factory=dict)
    timing: timing.Timing | None = None
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def gflops(self) -> float | None:
        """GFLOP/s over the median."""
        return None if self.timing is None else self.case.flops() / self.timing.median / 1e9

    @property
    def gbytes(self) -> float | None:
        """Compulsory GB/s over the median."""
        return None if self.timing is None else self.case.bytes() / self.timing.median / 1e9

    @property
    def ratio_to_torch(self) -> float | None:
        """How many times as fast as the fastest of torch's rows, which a torch row itself may be."""
        if self.timing is None:
            return None
        own = [1.0] if is_torch(self.implementation) else []
        return min([ratio for name, ratio in self.ratios.items() if is_torch(name)] + own, default=None)

    @property
    def worst(self) -> check.Accuracy | None:
        """The accuracy of the result that comes closest to its budget, or is furthest over it."""
        return max(self.accuracy.values(), key=lambda accuracy: accuracy.share, default=None)


def is_torch(implementation: str) -> bool:
    """Whether a name is that of one of torch's own ways."""
    return implementation.partition("-")[0] == "torch"


def measure(
    case: Case,
    implementations: Mapping[str, Implementation],
    repeats: int,
    min_time: float,
    device: str = "cpu",
    sample: Callable[[Callable[[], object]], float] = timing.wall,
) -> list[Row]:
    """A row for each implementation, in their order; see timing.interleaved for repeats, min_time and sample."""
    inputs = case.inputs().to(device)
    oracle = check.Oracle(case, inputs)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], check.Results]] = {}
    for name, implementation in implementations.items():
        try:
            call = check.run(case, implementation.prepare(case, inputs), inputs)
            accuracy = oracle.check(call())
            if all(result.ok for result in accuracy.values()):
                accuracy = oracle.check(call())  # what a first call leaves behind may lead the next ones astray
        except Refused as refusal:
            rows[name] = Row(case, name, "refused", [str(reason) for reason in refusal.args])
            continue
        except (flashx.UnsupportedError, torch.OutOfMemoryError) as error:
            rows[name] = Row(case, name, "refused", [_first_line(error)])
            continue
        except Exception as error:  # a peer may raise anything, and the other rows still count
            rows[name] = Row(case, name, "failed", [f"{type(error).__name__}: {_first_line(error)}"])
            continue
        if all(result.ok for result in accuracy.values()):
            rows[name], calls[name] = Row(case, name, "ok", accuracy=accuracy), call
        else:
            rows[name] = Row(case, name, "wrong", accuracy=accuracy)
    try:
        timings = timing.interleaved(calls, repeats, min_time, sample)
    except Exception as error:
        reasons = [f"one of the timed calls: {type(error).__name__}: {_first_line(error)}"]
        rows |= {name: Row(case, name, "failed", reasons) for name in calls}
        timings = {}
    for name, measured in timings.items():
        rows[name] = replace(rows[name], timing=measured)
    return compared(list(rows.values()))


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case, with their ratios."""
    medians = {row.implementation: row.timing.median for row in rows if row.timing is not None}
    return [
        replace(
            row,
            ratios={name: median / row.timing.median for name, median in medians.items() if name != row.implementation}
            if row.timing is not None
            else {},
        )
        for row in rows
    ]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
