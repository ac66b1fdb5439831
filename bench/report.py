"""Reports of a run: the table for people, the JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import Direction
from .measure import Row

# Version of the JSON's schema (docs/benchmarks.md): raised by any change that a reader could trip over.
SCHEMA = 1

LEGEND = """\
max error: largest distance of out (and of the gradients, with a backward) from naive attention in float64.
budget: 2 times the error that naive attention has in the row's own dtype, and 1 ulp. A row over it is not timed.
GFLOP/s: matrix products over visible (query, key) pairs only. × torch: times as fast as torch's attention."""

_DIRECTIONS: dict[Direction, str] = {"fwd": "fwd", "bwd": "bwd", "both": "fwd+bwd"}
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


COLUMNS = [
    Column("case", lambda row: str(row.case)),
    Column("direction", lambda row: _DIRECTIONS[row.case.direction]),
    Column("impl", lambda row: row.implementation),
    Column("median ms", _median),
    Column("p20", lambda row: _milliseconds(row, 20), width=110),
    Column("p80", lambda row: _milliseconds(row, 80), width=110),
    Column("GFLOP/s", lambda row: number(row.gflops)),
    Column("GB/s", lambda row: number(row.gbytes), width=90),
    Column("max error", lambda row: "" if row.worst is None else f"{row.worst.error:.1e}"),
    Column("budget", lambda row: "" if row.worst is None else f"{row.worst.budget:.1e}", width=100),
    Column("× torch", lambda row: "" if row.ratio_to_torch is None else f"{row.ratio_to_torch:.2f}"),
]


def show(console: Console, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Print the environment, the table, what the columns mean, and what comes out of it."""
    flashx = environment["flashx"]
    versions = f"flashx {flashx['version']} ({flashx['cpu_isa']}), torch {environment['torch']}"
    commit = f", commit {environment['commit']}" if environment["commit"] else ""
    machine = environment["gpu"]["name"] if "gpu" in environment else environment["cpu"]
    console.print(Text(f"{machine}, {environment['threads']} threads; {versions}{commit}", style="bold"))
    console.print(_table(rows, console.width))
    console.print(Text(LEGEND, style="dim"))
    for note in _notes(rows):
        console.print(Text(note))
    for line in _conclusions(rows):
        console.print(line)


def _table(rows: Sequence[Row], width: int) -> Table:
    columns = [column for column in COLUMNS if column.width <= width]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        # Only the case may break into several lines; a broken number is no number.
        table.add_column(column.title, justify="left" if index < 3 else "right", no_wrap=index > 0)
    for index, row in enumerate(rows):
        cells = [column.cell(row) for column in columns]
        if index and row.case == rows[index - 1].case:
            cells[:2] = "", ""
        last = index + 1 == len(rows) or row.case != rows[index + 1].case
        style = _STYLES[row.status] or ("bold" if row.implementation == "flashx" else "")
        table.add_row(*cells, style=style, end_section=last)
    return table


def _notes(rows: Sequence[Row]) -> list[str]:
    """Every reason of a row that was not timed, and for a wrong one its errors."""
    notes = []
    for row in rows:
        reasons = list(row.reasons)
        if row.status == "wrong":
            bad = {name: accuracy for name, accuracy in row.accuracy.items() if not accuracy.ok}
            reasons = [f"{name} is off by {it.error:.3g}, budget {it.budget:.3g}" for name, it in bad.items()]
        if reasons:
            label = f"{row.implementation}, {row.case} {_DIRECTIONS[row.case.direction]}"
            notes.append(f"{row.status}: {label}: {'; '.join(reasons)}")
    return notes


def _conclusions(rows: Sequence[Row]) -> list[Text]:
    """How exact and how fast flashx is, in a sentence each."""
    tried = [row for row in rows if row.implementation == "flashx" and row.status != "refused"]
    if not tried:
        return []
    exact = sum(row.status == "ok" for row in tried)
    style = "bold green" if exact == len(tried) else "bold red"
    lines = [Text(f"flashx is exact in {exact} of {len(tried)} rows", style=style)]
    ratios = [row.ratio_to_torch for row in tried if row.ratio_to_torch is not None]
    if ratios:
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        spread = f"from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rows"
        lines.append(Text(f"flashx is {mean:.2f} times as fast as torch (geometric mean; {spread})", style="bold"))
    return lines


def as_json(environment: dict[str, Any], settings: dict[str, Any], rows: Sequence[Row], interrupted: bool) -> str:
    """The run as JSON; times in seconds, numbers that are not finite are null."""
    document = {
        "schema": SCHEMA,
        "environment": environment,
        "settings": settings,
        "interrupted": interrupted,
        "rows": [_row_as_dict(row) for row in rows],
    }
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def _row_as_dict(row: Row) -> dict[str, Any]:
    return {
        "case": asdict(row.case),
        "implementation": row.implementation,
        "status": row.status,
        "reasons": row.reasons,
        "accuracy": {name: asdict(accuracy) for name, accuracy in row.accuracy.items()},
        "flops": row.case.flops(),
        "bytes": row.case.bytes(),
        "median": row.timing and row.timing.percentile(50),
        "p20": row.timing and row.timing.percentile(20),
        "p80": row.timing and row.timing.percentile(80),
        "samples": row.timing and list(row.timing.samples),
        "gflops": row.gflops,
        "gbytes": row.gbytes,
        "ratio_to_torch": row.ratio_to_torch,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
