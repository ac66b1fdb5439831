"""``flashx-bench cpu-report``: flashx's CPU kernels against their targets, torch, and what the machine can do at best.

Every row is exact before it is timed (cpu_oracle.py). Its calls then take turns (timing.interleaved), and with them the
probes of the machine, multiply-adds in registers and reads of memory: a fraction of a peak is one of two medians from
the same seconds. docs/benchmarks.md describes rows and figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cpu_measure import Build, Measure, Probes, Row, Setting, measured
from .cpu_rows import plan
from .environment import stamp
from .timing import Timing

# Version of the JSON's schema: raised by any change that a reader could trip over.
SCHEMA = 1
# Exit codes; argparse exits with 2 on bad arguments.
OK, WRONG, INTERRUPTED = 0, 1, 130
# Width of the table, for output that goes to a file.
FULL_WIDTH = 140


def show(console: Console, environment: Mapping[str, Any], peaks: Mapping[str, float], rows: Sequence[Row]) -> None:
    """Print the environment, the machine's peaks, a line for every measure, and what comes out of them."""
    built = environment["flashx"]
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    versions = f"flashx {built['version']} ({built['cpu_isa']}), torch {environment['torch']}{commit}"
    console.print(Text(f"{environment['cpu']}, {environment['threads']} threads; {versions}", style="bold"))
    console.print(Text(_peaks(peaks)))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, title in enumerate(("row", "flashx ms", "torch ms", "rate", "measure", "target", "measured", "")):
        table.add_column(title, justify="left" if index in (0, 4, 7) else "right", no_wrap=index > 0)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        for cells in _lines(row):
            table.add_row(*cells, style=_STYLES[row.status])
        if following is None or following.name.split()[0] != row.name.split()[0]:
            table.add_section()
    console.print(table)
    for row in rows:
        for reason in row.reasons:
            console.print(Text(f"{row.status}: {row.name}: {reason}", style=_STYLES[row.status]))
    exact = sum(row.status == "ok" for row in rows)
    console.print(Text(f"exact and measured: {exact} of {len(rows)} rows", style="bold"))
    targets = [measure.met for row in rows for measure in row.measures if measure.met is not None]
    console.print(Text(f"targets met: {sum(targets)} of {len(targets)}", style="bold"))


def _peaks(peaks: Mapping[str, float]) -> str:
    units = {"fp32_flops": "fp32 FMA", "bf16_pairs_flops": "bf16 dot product", "bf16_tiles_flops": "AMX bf16"}
    flops = [f"{units[name]} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items() if name in units]
    reads = [f"{name.split('_')[1]} MiB {rate / 1e9:.1f}" for name, rate in peaks.items() if name not in units]
    return f"peaks: {', '.join(flops)}; GB/s read of {', '.join(reads)}"


_STYLES = {"ok": "", "wrong": "bold red", "failed": "bold red", "skipped": "yellow"}
_MARKS = {True: Text("pass", "green"), False: Text("MISS", "red"), None: Text()}


def _lines(row: Row) -> Iterator[list[str | Text]]:
    """The table's, one for each measure; the status stands where the time would, so that nobody overlooks it."""
    times = [_milliseconds(row.timings.get(name)) for name in ("flashx", "torch")]
    if row.status != "ok":
        times[0] = row.status.upper()
    names = [row.name, f"  {row.detail}"] if len(row.measures) > 1 else [f"{row.name}, {row.detail}".strip(", ")]
    for index, measure in enumerate(row.measures or [None]):
        start: list[str | Text] = [names[index] if index < len(names) else ""]
        start += [*times, row.rate] if index == 0 else ["", "", ""]
        if measure is None:
            yield start
            return
        target, value = _target(measure), _number(measure.value, measure.unit)
        yield [*start, measure.name, target, value, _MARKS[measure.met]]


def _milliseconds(timing: Timing | None) -> str:
    return "" if timing is None else f"{1e3 * timing.median:.4g}"


def _target(measure: Measure) -> str:
    if measure.at_least is not None:
        return f"≥ {_number(measure.at_least, measure.unit)}"
    return "" if measure.at_most is None else f"≤ {_number(measure.at_most, measure.unit)}"


def _number(value: float, unit: str) -> str:
    texts = {"ratio": f"{value:.2f}", "fraction": f"{value:.0%}", "us": f"{value:.1f} µs", "MiB": f"{value:.1f} MiB"}
    return texts[unit]


def as_json(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Times in seconds; numbers that are not finite are null."""
    return json.dumps(_finite({**document, "rows": [_row(row) for row in rows]}), indent=1, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    times = {
        name: {"median": timing.median, "p20": timing.percentile(20), "p80": timing.percentile(80)}
        | {"samples": list(timing.samples)}
        for name, timing in row.timings.items()
    }
    return {
        "name": row.name,
        "detail": row.detail,
        "status": row.status,
        "reasons": row.reasons,
        "accuracy": {
            call: {name: asdict(accuracy) for name, accuracy in found.items()} for call, found in row.accuracy.items()
        },
        "times": times,
        "flops": row.flops,
        "bytes": row.bytes,
        "measures": [asdict(measure) | {"met": measure.met} for measure in row.measures],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flashx-bench cpu-report``."""
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="rows whose name contains TEXT (may be repeated: any of them)"
    )
    parser.add_argument("--repeats", type=_positive, default=7, metavar="N", help="rounds of each row, at least (7)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast")
    parser.add_argument("--strict", action="store_true", help="a missed target makes the exit code 1")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to this file")


def run(options: argparse.Namespace) -> int:
    """Measure and report; returns the exit code.

    Raises:
        ValueError: no row has the text of --only in its name, or --json cannot be written.
    """
    chosen = _chosen(options.only)
    if options.json is not None:
        _check_writable(options.json)
    setting = Setting(options.quick, options.repeats, Probes(options.quick))
    environment = stamp()
    peaks: dict[str, float] = {}
    rows: list[Row] = []
    interrupted = False
    try:
        peaks = setting.probes.summary(options.repeats)
        for row in _rows(chosen, setting):
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FULL_WIDTH
    show(console, environment, peaks, rows)
    if options.json is not None:
        settings = {"only": options.only, "repeats": options.repeats, "quick": options.quick}
        document = {"schema": SCHEMA, "environment": environment, "settings": settings, "peaks": peaks}
        options.json.write_text(as_json({**document, "interrupted": interrupted}, rows))
    if interrupted:
        return INTERRUPTED
    bad = any(row.status in ("wrong", "failed") for row in rows)
    missed = any(measure.met is False for row in rows for measure in row.measures)
    return WRONG if bad or (options.strict and missed) else OK


def _rows(chosen: Mapping[str, Build], setting: Setting) -> Iterator[Row]:
    for index, (name, build) in enumerate(chosen.items(), 1):
        if sys.stderr.isatty():
            print(f"\r{index} of {len(chosen)}: {name}\x1b[K", end="", file=sys.stderr, flush=True)
        yield measured(name, build, setting)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _chosen(only: Sequence[str] | None) -> dict[str, Build]:
    rows = plan()
    chosen = {name: row for name, row in rows.items() if not only or any(text in name for text in only)}
    if not chosen:
        raise ValueError(f"only must be part of a row's name ({', '.join(rows)}), got {', '.join(only or ())!r}")
    return chosen


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after them."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"json: {path} cannot be written: {error.strerror}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("flashx-bench cpu-report", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
