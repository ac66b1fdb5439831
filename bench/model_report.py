"""Tables of ``flashx-bench model``, and what stands in their rows and in the JSON."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flashx import io
from flashx.io import algorithms, examples
from flashx.problem import Problem


@dataclass(frozen=True, slots=True)
class Row:
    """An algorithm's case on a machine. Bytes, FLOPs of all heads; seconds predicted."""

    algorithm: str
    machine: str
    flops: int
    exps: int
    read: int
    written: int
    slow_bytes: int
    intensity: float
    seconds: float
    bound_by: str
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class RingRow:
    """A ring of ranks; bytes and seconds of one rank."""

    machine: str
    ranks: int
    tokens: int
    compute: float
    transfer: float
    sent: int
    seconds: float
    speedup: float
    efficiency: float
    bound_by: str


@dataclass(frozen=True, slots=True)
class SramRow:
    """Elements that one head moves with a fast memory of so many elements; None where a schedule does not fit."""

    elements: int
    flash: int | None
    flash2: int | None
    small: int | None
    bound: float
    small_regime: bool


def new_table(*titles: str) -> Table:
    """An empty table; all columns but the first are numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def rows_table(rows: Sequence[Row], call: Problem, options: argparse.Namespace) -> Table:
    """Algorithms, by machine."""
    table = new_table("algorithm", "machine", "GFLOP", "bytes", "slow", "FLOP/B", "ms", "TFLOP/s", "bound by")
    needed = algorithms.compulsory(call, options.direction).flops
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].machine != row.machine
        rate = "" if options.prefix is not None or options.density is not None else _short(needed / row.seconds / 1e12)
        table.add_row(
            row.algorithm, row.machine, _short(row.flops / 1e9), readable(row.read + row.written),
            readable(row.slow_bytes), _short(row.intensity), milliseconds(row.seconds), rate, row.bound_by,
            style="bold" if row.algorithm == "flashx" else "", end_section=last,
        )  # fmt: skip
    return table


def ring_table(points: Sequence[RingRow]) -> Table:
    """Rings; those that waste more than half of their ranks in yellow."""
    table = new_table(
        "ranks", "machine", "tokens each", "step, ms", "transfer, ms", "sent a step", "total, ms", "speed-up",
        "efficiency", "bound by",
    )  # fmt: skip
    for point in points:
        table.add_row(
            str(point.ranks), point.machine, str(point.tokens), milliseconds(point.compute),
            milliseconds(point.transfer) if point.ranks > 1 else "", readable(point.sent), milliseconds(point.seconds),
            _short(point.speedup), f"{100 * point.efficiency:.0f} %", point.bound_by,
            style="" if point.efficiency >= 0.5 else "yellow",
        )  # fmt: skip
    return table


def ring_notes(
    call: Problem, machines: Sequence[io.Machine], points: Sequence[RingRow], options: argparse.Namespace
) -> list[Text]:
    """How many tokens hide the links, and where a ring stops paying, by machine."""
    notes = []
    for machine in machines:
        links = machine.links
        if links is None:
            continue
        inside, outside = (io.ring_tokens(call, machine, options.direction, outside=out) for out in (False, True))
        text = (
            f"{machine.name}: at peak rates a rank's products hide its transfers from {inside} tokens on over the fast "
            f"links ({links.domain} ranks, {readable(links.inside)}/s), from {outside} over the slow ones "
            f"({readable(links.outside)}/s)"
        )
        wasted = [point.ranks for point in points if point.machine == machine.name and point.efficiency < 0.5]
        if wasted:
            text += f"; it stops paying at {min(wasted)} ranks, where less than half of what they could do is used"
        notes.append(Text(text))
    return notes


def sram_tables(call: Problem, rows: Sequence[SramRow]) -> list[Any]:
    """Fast memories, with a title and a note."""
    title = Text(
        f"elements moved by one head, N {call.q_len}, d {call.head_dim}; d^2 = {call.head_dim**2} elements "
        f"({readable(call.head_dim**2 * call.dtype.itemsize)})",
        style="bold",
    )
    table = new_table(
        "fast memory", "elements", "FlashAttention", "FlashAttention-2", "tiled products", "lower bound", "best/bound",
        "regime",
    )  # fmt: skip
    for row in rows:
        moved = {"flash": row.flash, "flash2": row.flash2, "small": row.small}
        fits = [count for count in moved.values() if count is not None]
        best = min(fits, default=None)
        table.add_row(
            readable(row.elements * call.dtype.itemsize), str(row.elements),
            *(Text(_elements(count), style="bold" if count == best and count is not None else "")
              for count in moved.values()),
            _elements(row.bound), "" if best is None else f"{best / row.bound:.2f}",
            "M < d^2" if row.small_regime else "M >= d^2",
        )  # fmt: skip
    note = (
        'lower bound: Saha and Ye, "The I/O Complexity of Attention", N^2 d^2 / M or N^2 d / sqrt(M), its constant '
        "taken for 1, and at least 4 N d. tests/test_io.py runs and counts the schedules."
    )
    return [title, table, Text(note, style="dim")]


def example_table(rows: Sequence[examples.Row]) -> Table:
    """A paper's figures beside the model's."""
    table = new_table(
        "GPT-2 medium, A100", "GFLOP", "published", "GB", "published", "error", "ms", "published", "bound by"
    )
    for row in rows:
        paper = row.published
        table.add_row(
            row.name, _short(row.cost.flops / 1e9), "" if paper is None else str(paper.gflops),
            f"{row.cost.bytes / 1e9:.1f}", "" if paper is None else str(paper.gigabytes),
            "" if row.bytes_error is None else f"{100 * row.bytes_error:+.1f} %", milliseconds(row.seconds),
            "" if paper is None else str(paper.milliseconds), row.bound_by,
        )  # fmt: skip
    return table


def _short(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(decimals, 0)}f}"


def milliseconds(seconds: float) -> str:
    """Three significant digits of them."""
    return _short(1e3 * seconds)


def readable(size: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{_short(size)} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{_short(size)} PB"


def _elements(count: float | None) -> str:
    if count is None:
        return "does not fit"
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{_short(count)} {unit}".strip()
        count /= 1000
    return f"{_short(count)} P"
