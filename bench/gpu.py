"""``python -m flashx.bench.gpu``: the CUDA kernels against torch's own, on a GPU (docs/benchmarks.md).

Each case is checked first, as in flashx-bench. A sample is the time between two CUDA events around one call, the L2
cache flushed before; the GPU spins meanwhile, so that the CPU has handed over the whole call before its first kernel
starts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import flashx

from . import environment, peers, report, results, suites
from .cases import Case, Dense
from .implementations import Flashx, Implementation
from .measure import Row, measure
from .results import Run

# Exit codes; argparse exits with 2 on bad arguments.
OK, WRONG, NO_GPU, INTERRUPTED = 0, 1, 2, 130

HALVES = ("fp16", "bf16")

# What the flush writes: more than any GPU's L2 cache holds.
FLUSHED_BYTES = 256 * 2**20
# The spin before a call, in cycles: doubled until the CPU is done with the call before it ends, up to about 50 ms.
SPIN, LONGEST_SPIN = 2**20, 2**26

DESCRIPTION = """\
Measure flashx's CUDA kernels and torch's attention (flash, efficient, cuDNN and math, each alone) on this machine's
GPU: forward, and forward with backward. Every result is compared with naive attention in float64 before it is timed."""


IMPLEMENTATIONS: dict[str, Implementation] = {
    "flashx": Flashx("cuda"),
    **{name: peers.IMPLEMENTATIONS[name] for name in ("torch-flash", "torch-cudnn", "torch-efficient", "torch-math")},
}


def plan(dtypes: Sequence[str] = HALVES, lengths: Sequence[int] | None = None) -> list[Case]:
    """The suite fa2-grid as published, in both half precisions, forward and both directions in one."""
    suite = suites.SUITES["fa2-grid"]
    return [
        case
        for dtype in dtypes
        for case in suite.cases(1.0, dtype, ("fwd", "both"))
        if lengths is None or (isinstance(case, Dense) and case.q_len in lengths)
    ]


def why_not() -> list[str]:
    """Reasons against the CUDA kernels on this GPU."""
    tensor = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    return flashx.explain(tensor, tensor, tensor).refusals["cuda"]


class ColdClock:
    """Seconds of GPU time of one call that finds its inputs in memory, not in the L2 cache."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda" if cuda is torch.cuda else "cpu")
        self.spin = SPIN

    def __call__(self, call: Callable[[], object]) -> float:
        while True:
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            self.cuda._sleep(self.spin)
            start.record()
            call()
            end.record()
            # Has the GPU come to the call before the CPU was done with it? Then it waited for the CPU in between.
            starved = start.query()
            end.synchronize()
            if not starved or self.spin >= LONGEST_SPIN:
                return start.elapsed_time(end) / 1e3
            self.spin *= 2


def results_path(folder: Path, gpu: str, commit: str | None, today: date) -> Path:
    """<folder>/<gpu>/<date>-<commit>.json, the GPU's name in small letters and hyphens."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / slug / f"{today.isoformat()}-{commit or 'unknown'}.json"


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m flashx.bench.gpu``."""
    parser = argparse.ArgumentParser("flashx.bench.gpu", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER", help="for the JSON")
    parser.add_argument("--commit", metavar="ID", help="in the file's name, where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="one dtype and two lengths, for a first look")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="samples of each row, at least (30)")
    parser.add_argument("--min-time", type=float, default=0.0, metavar="S", help="seconds of samples, at least (0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        SystemExit: with code 2 on bad arguments, 0 after --help.
    """
    options = build_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"flashx.bench.gpu: torch {torch.__version__} sees no GPU here", file=sys.stderr)
        return NO_GPU
    if reasons := why_not():
        print(f"flashx.bench.gpu: {'; '.join(reasons)}", file=sys.stderr)
        return NO_GPU
    cases = plan(("bf16",), (1024, 8192)) if options.quick else plan()
    stamp = environment.stamp("cuda")
    stamp["commit"] = options.commit or stamp["commit"]
    settings = {"repeats": options.repeats, "min_time": options.min_time, "flushed_bytes": FLUSHED_BYTES}
    run = Run(stamp, settings, warnings=environment.warnings(stamp))
    try:
        for row in _measure(cases, options.repeats, options.min_time):
            run.rows.append(row)
    except KeyboardInterrupt:
        run.interrupted = True
    console = Console(width=None if sys.stdout.isatty() else 140)
    report.show(console, run)
    path = results_path(options.out, stamp["gpu"]["name"], stamp["commit"], date.today())
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write(path, run)
    console.print(f"written to {path}")
    if run.interrupted:
        return INTERRUPTED
    bad = any(row.implementation == "flashx" and row.status in ("wrong", "failed") for row in run.rows)
    return WRONG if bad else OK


def _measure(cases: Sequence[Case], repeats: int, min_time: float) -> Iterator[Row]:
    clock = ColdClock()
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {case} {case.direction}", file=sys.stderr, flush=True)
        yield from measure(case, IMPLEMENTATIONS, repeats, min_time, "cuda", clock)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
