"""The report of a run for people: the table, what its columns mean, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import Direction
from .machine import Machine
from .measure import Row
from .results import Run

LEGEND = """\
max error: largest distance of out (and of the gradients, with a backward) from naive attention in float64.
budget: 2 times the error that naive attention has in the row's own dtype, and 1 ulp. A row over it is not timed.
GFLOP/s: matrix products over visible (query, key) pairs only. × torch: times as fast as torch's attention."""
ROOF = "% roof: of what torch's matrix product and a pass over memory allow this machine, at the case's intensity."

DIRECTIONS: dict[Direction, str] = {"fwd": "fwd", "bwd": "bwd", "both": "fwd+bwd"}
_STYLES = {"ok": "", "refused": "yellow", "failed": "bold red", "wrong": "bold red"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table; consoles narrower than ``width`` characters go without it."""

    title: str
    cell: Callable[[Row], str]
    width: int = 0


def number(value: float | None) -> str:
    """Three significant digits, never with an exponent; nothing for None."""
    if value is None:
        return ""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def _milliseconds(row: Row, percent: float) -> str:
    return "" if row.timing is None else number(1e3 * row.timing.percentile(percent))


def _median(row: Row) -> str:
    """The status stands where the time would, so that nobody overlooks it."""
    return row.status.upper() if row.timing is None else _milliseconds(row, 50)


def columns(machine: Machine | None) -> list[Column]:
    """The table's columns, on paper as on a console."""

    def roof(row: Row) -> str:
        limit = machine.roof(row.case) if machine else None
        return "" if limit is None or row.gflops is None else f"{100 * row.gflops / limit:.0f}"

    return [
        Column("case", lambda row: str(row.case)),
        Column("direction", lambda row: DIRECTIONS[row.case.direction]),
        Column("impl", lambda row: row.implementation),
        Column("median ms", _median),
        Column("p20", lambda row: _milliseconds(row, 20), width=110),
        Column("p80", lambda row: _milliseconds(row, 80), width=110),
        Column("GFLOP/s", lambda row: number(row.gflops)),
        Column("GB/s", lambda row: number(row.gbytes), width=90),
        *([Column("% roof", roof, width=120)] if machine else []),
        Column("max error", lambda row: "" if row.worst is None else f"{row.worst.error:.1e}"),
        Column("budget", lambda row: "" if row.worst is None else f"{row.worst.budget:.1e}", width=100),
        Column("× torch", lambda row: "" if row.ratio_to_torch is None else f"{row.ratio_to_torch:.2f}"),
    ]


def headline(environment: dict[str, Any]) -> str:
    """The machine and the versions, in a line."""
    flashx = environment["flashx"]
    versions = f"flashx {flashx['version']} ({flashx['cpu_isa']}), torch {environment['torch']}"
    commit = f", commit {environment['commit']}" if environment["commit"] else ""
    machine = environment["gpu"]["name"] if "gpu" in environment else environment["cpu"]
    return f"{machine}, {environment['threads']} threads; {versions}{commit}"


def show(console: Console, run: Run) -> None:
    """Print the environment, the table, what the columns mean, and what comes out of it."""
    console.print(Text(headline(run.environment), style="bold"))
    console.print(_table(run, console.width))
    console.print(Text("\n".join([LEGEND, *([ROOF] if run.machine else [])]), style="dim"))
    for note in notes(run):
        console.print(Text(note))
    for warning in run.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    for line in _conclusions(run.rows):
        console.print(line)


def _table(run: Run, width: int) -> Table:
    shown = [column for column in columns(run.machine) if column.width <= width]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(shown):
        # Only the case may break into several lines; a broken number is no number.
        table.add_column(column.title, justify="left" if index < 3 else "right", no_wrap=index > 0)
    for rows in run.by_case():
        for index, row in enumerate(rows):
            cells = [column.cell(row) for column in shown]
            if index:
                cells[:2] = "", ""
            style = _STYLES[row.status] or ("bold" if row.implementation == "flashx" else "")
            table.add_row(*cells, style=style, end_section=index + 1 == len(rows))
    return table


def notes(run: Run) -> list[str]:
    """Who was left out, and every reason of a row that was not timed: its errors, if it is wrong."""
    absent = "; ".join(f"{name}: {reason}" for name, reason in run.absent.items())
    lines = [f"left out: {absent}"] if absent else []
    same: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.rows:
        reasons = list(row.reasons)
        if row.status == "wrong":
            bad = {name: accuracy for name, accuracy in row.accuracy.items() if not accuracy.ok}
            reasons = [f"{name} is off by {it.error:.3g}, budget {it.budget:.3g}" for name, it in bad.items()]
        if reasons:
            same.setdefault((row.status, row.implementation, "; ".join(reasons)), []).append(row)
    for (status, implementation, text), rows in same.items():
        label = f"{rows[0].case} {DIRECTIONS[rows[0].case.direction]}"
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        lines.append(f"{status}: {implementation}, {label}{more}: {text}")
    return lines


def conclusions(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """How exact and how fast flashx is, in a sentence each, and whether that is well."""
    tried = [row for row in rows if row.implementation == "flashx" and row.status != "refused"]
    if not tried:
        return []
    exact = sum(row.status == "ok" for row in tried)
    lines = [(f"flashx is exact in {exact} of {len(tried)} rows", exact == len(tried))]
    ratios = [row.ratio_to_torch for row in tried if row.ratio_to_torch is not None]
    if ratios:
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        spread = f"from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rows"
        lines.append((f"flashx is {mean:.2f} times as fast as torch (geometric mean; {spread})", True))
    return lines


def _conclusions(rows: Sequence[Row]) -> list[Text]:
    styles = ["bold green", "bold"]
    return [
        Text(line, style=style if well else "bold red")
        for (line, well), style in zip(conclusions(rows), styles, strict=False)
    ]
