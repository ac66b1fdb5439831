"""The command line: ``flashx-bench`` and ``python -m flashx.bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import cases, environment, report
from .cases import DIRECTIONS, DTYPES, Case
from .implementations import IMPLEMENTATIONS
from .measure import Row, measure

T = TypeVar("T")

# Exit codes; argparse exits with 2 on bad arguments.
OK, WRONG, INTERRUPTED = 0, 1, 130

# Width of the whole table, for output that goes to a file.
FULL_WIDTH = 140

DESCRIPTION = """\
Measure how exact and how fast attention is: flashx, torch's scaled_dot_product_attention and naive attention. Every
result is compared with naive attention in float64 before it is timed."""

EPILOG = """\
exit codes: 0 all well, 1 a flashx row is wrong or failed, 2 bad arguments, 130 interrupted (Ctrl-C; what was measured
until then is reported). Examples:

  flashx-bench                                            a first look, about a minute
  flashx-bench --seqlen 512,1024,2048 --causal both       a grid
  flashx-bench --seqlen 1x8192 --heads 32 --kv-heads 8    decoding with grouped queries
  flashx-bench --seqlen 4096 --window 256,0 --json a.json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        SystemExit: with code 2 on bad arguments, 0 after --help.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    plan = _plan(parser, options)
    if options.json is not None:
        _check_writable(parser, options.json)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    try:
        stamp = environment.stamp()
    except ValueError as error:  # FLASHX_CPU_ISA names what this machine does not have
        parser.error(str(error))
    rows, interrupted = _run(plan, options)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FULL_WIDTH
    report.show(console, stamp, rows)
    if options.json is not None:
        settings = {"impl": options.impl, "repeats": options.repeats, "min_time": options.min_time}
        options.json.write_text(report.as_json(stamp, settings, rows, interrupted))
    if interrupted:
        measured = len({row.case for row in rows})
        console.print(f"interrupted after {measured} of {len(plan)} cases", style="bold yellow")
        return INTERRUPTED
    bad = [row for row in rows if row.implementation == "flashx" and row.status in ("wrong", "failed")]
    return WRONG if bad else OK


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``flashx-bench``."""
    parser = argparse.ArgumentParser(
        "flashx-bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    grid = parser.add_argument_group(
        "cases", "Lists are separated by commas, and every combination is measured. Without any of these: a small tour."
    )
    grid.add_argument("--seqlen", type=_list(_size), metavar="N|LQxLK,...", help="lengths (1024)")
    grid.add_argument("--headdim", type=_list(_size), metavar="D|DxDV,...", help="dims of key and value heads (64)")
    grid.add_argument("--heads", type=_list(_positive), metavar="H,...", help="query heads (8)")
    grid.add_argument("--kv-heads", type=_list(_positive), metavar="H,...", help="key heads (as many as query heads)")
    grid.add_argument("--batch", type=_list(_positive), metavar="B,...", help="batch sizes (1)")
    grid.add_argument("--dtype", type=_list(_dtype), metavar="DTYPE,...", help=f"{', '.join(DTYPES)} (fp32)")
    grid.add_argument("--causal", choices=["no", "yes", "both"], help="causal masks, aligned bottom-right (no)")
    grid.add_argument(
        "--window",
        type=_window,
        action="append",
        metavar="LEFT[,RIGHT]",
        help="sliding window: keys seen on each side, or 'none' for all; RIGHT is 0 if left out; may be repeated",
    )

    run = parser.add_argument_group("what to measure, and how")
    run.add_argument(
        "--direction",
        type=_list(_choice("direction", DIRECTIONS)),
        default=["fwd", "both"],
        metavar="DIR,...",
        help="fwd, bwd, or both: forward and backward in one (fwd,both)",
    )
    run.add_argument(
        "--impl",
        type=_list(_choice("implementation", IMPLEMENTATIONS)),
        default=list(IMPLEMENTATIONS),
        metavar="NAME,...",
        help=f"implementations to compare ({','.join(IMPLEMENTATIONS)})",
    )
    run.add_argument("--threads", type=_positive, metavar="N", help="torch's number of threads (torch's choice)")
    run.add_argument("--repeats", type=_positive, default=5, metavar="N", help="samples of each row, at least (5)")
    run.add_argument(
        "--min-time", type=_seconds, default=0.3, metavar="S", help="seconds of samples of each row, at least (0.3)"
    )
    run.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to this file")
    run.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _plan(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    grid = ("seqlen", "headdim", "heads", "kv_heads", "batch", "dtype", "causal", "window")
    if all(getattr(options, name) is None for name in grid):
        return cases.default_cases(options.direction)
    causal = {"no": [False], "yes": [True], "both": [False, True]}[options.causal or "no"]
    windows = [
        (left, 0 if is_causal else right) for left, right in options.window or [cases.FULL] for is_causal in causal
    ]
    try:
        return cases.grid(
            seqlens=options.seqlen or [(1024, 1024)],
            head_dims=options.headdim or [(64, 64)],
            heads=options.heads or [8],
            kv_heads=options.kv_heads,
            batches=options.batch or [1],
            dtypes=options.dtype or ["fp32"],
            windows=windows,
            directions=options.direction,
        )
    except ValueError as error:
        parser.error(str(error))


def _run(plan: Sequence[Case], options: argparse.Namespace) -> tuple[list[Row], bool]:
    """The rows, and whether Ctrl-C cut them short."""
    implementations = {name: IMPLEMENTATIONS[name] for name in options.impl}
    rows: list[Row] = []
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        disable=options.no_progress or not sys.stderr.isatty(),
    )
    try:
        with progress:
            task = progress.add_task("", total=len(plan))
            for case in plan:
                progress.update(task, description=f"{case} {case.direction}")
                rows += measure(case, implementations, options.repeats, options.min_time)
                progress.advance(task)
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _check_writable(parser: argparse.ArgumentParser, path: Path) -> None:
    """Before a minute of measuring, not after it."""
    try:
        path.open("a").close()
    except OSError as error:
        parser.error(f"argument --json: {path} cannot be written: {error.strerror}")


def _list(item: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [item(part.strip()) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, got {text!r}")
    return seconds


def _size(text: str) -> cases.Size:
    first, cross, second = text.partition("x")
    return _positive(first), _positive(second if cross else first)


def _window(text: str) -> cases.Window:
    left, comma, right = text.partition(",")
    return _width(left), _width(right) if comma else 0


def _width(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0 or 'none', got {text!r}")
    return int(text)


def _dtype(text: str) -> str:
    long = {str(dtype).removeprefix("torch."): short for short, dtype in DTYPES.items()}
    return _choice("dtype", DTYPES)(long.get(text, text))


def _choice(what: str, names: Collection[str]) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{what} must be one of {', '.join(names)}, got {text!r}")
        return text

    return choose
