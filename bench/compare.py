"""``flashx-bench compare``: what became slower from one run to another, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import environment
from .measure import Row
from .report import DIRECTIONS, number
from .results import Run

Verdict = Literal["slower", "faster", "same", "broken"]

# Resamples of the bootstrap, and the share of them that the interval holds.
RESAMPLES, CONFIDENCE = 4000, 0.95

_STYLES: dict[Verdict, str] = {"slower": "bold red", "broken": "bold red", "faster": "green", "same": ""}


@dataclass(frozen=True, slots=True)
class Pair:
    """The same row of two runs. ``ratio``: the second's median time over the first's, with its interval."""

    first: Row
    second: Row
    verdict: Verdict
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "broken")


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Bootstrap confidence interval of ``median(second) / median(first)``, percentiles; the same ones every time."""
    generator = torch.Generator().manual_seed(0)

    def medians(samples: Sequence[float]) -> torch.Tensor:
        values = torch.tensor(samples, dtype=torch.float64)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        return values[drawn].quantile(0.5, dim=1)

    ratios = medians(second) / medians(first)
    tail = (1 - CONFIDENCE) / 2
    low, high = ratios.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def pair(first: Row, second: Row, threshold: float) -> Pair:
    """Slower (or faster) only if the whole interval is beyond the threshold; broken if it is no longer timed."""
    if first.timing is None or second.timing is None:
        return Pair(first, second, "broken" if second.timing is None and first.timing is not None else "same")
    low, high = interval(first.timing.samples, second.timing.samples)
    ratio = second.timing.median / first.timing.median
    verdict: Verdict = "slower" if low > 1 + threshold else "faster" if high < 1 / (1 + threshold) else "same"
    return Pair(first, second, verdict, ratio, low, high)


def pairs(first: Run, second: Run, threshold: float, names: Sequence[str] | None) -> tuple[list[Pair], list[str]]:
    """The rows that both runs have, and a sentence for each that only one has."""
    rows = [
        {(row.case, row.implementation): row for row in run.rows if names is None or row.implementation in names}
        for run in (first, second)
    ]
    found = [pair(row, rows[1][key], threshold) for key, row in rows[0].items() if key in rows[1]]
    missing = [
        f"only in the {which} run: {row.implementation}, {row.case} {DIRECTIONS[row.case.direction]}"
        for which, here, there in (("first", rows[0], rows[1]), ("second", rows[1], rows[0]))
        for key, row in here.items()
        if key not in there
    ]
    return found, missing


def show(
    console: Console, first: Run, second: Run, found: Sequence[Pair], missing: Sequence[str], threshold: float
) -> None:
    """Print the pairs, what is missing, and the sum of it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    titles = ("case", "direction", "impl", "first ms", "second ms", "ratio", f"{100 * CONFIDENCE:g} % interval", "")
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < 3 else "right", no_wrap=index > 0)
    for it in found:
        table.add_row(
            str(it.first.case),
            DIRECTIONS[it.first.case.direction],
            it.first.implementation,
            *(_time(row) for row in (it.first, it.second)),
            "" if it.ratio is None else f"{it.ratio:.3f}",
            "" if it.low is None else f"{it.low:.3f} to {it.high:.3f}",
            "" if it.verdict == "same" else it.verdict,
            style=_STYLES[it.verdict],
        )
    console.print(table)
    console.print(
        Text(
            "ratio: the second run's median time over the first's; over 1 is slower. The interval is a bootstrap of "
            "the samples: what varies between one run and the next of the same code is not in it.",
            style="dim",
        )
    )
    for difference in environment.same_machine(first.environment, second.environment):
        console.print(Text(f"note: {difference}"))
    for line in missing:
        console.print(Text(line, style="yellow"))
    counts = {verdict: sum(it.verdict == verdict for it in found) for verdict in _STYLES}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    bad = any(it.regressed for it in found)
    console.print(
        Text(
            f"{len(found)} rows compared (threshold {100 * threshold:g} %): {summary or 'none'}",
            style="bold red" if bad else "bold green",
        )
    )


def _time(row: Row) -> str:
    return row.status.upper() if row.timing is None else number(1e3 * row.timing.median)
