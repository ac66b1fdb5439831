"""``python -m flashx.bench.gpu``: the CUDA kernels against torch's own, on a GPU (docs/benchmarks.md).

Each case is checked first, as in flashx-bench. A sample is the time between two CUDA events around one call, the L2
cache flushed before; the GPU spins meanwhile, so that the CPU has handed over the whole call before its first kernel
starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import flashx
from flashx import dispatch

from . import environment, report
from .cases import CAUSAL, FULL, Case, Direction, Inputs
from .implementations import Attend, Implementation
from .measure import Row, measure

# Exit codes; argparse exits with 2 on bad arguments.
OK, WRONG, NO_GPU, INTERRUPTED = 0, 1, 2, 130

# FlashAttention-2's setting (Dao, section 4.1): as many tokens and as wide a model whatever the length and head dim.
TOKENS, HIDDEN = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
HALVES = ("fp16", "bf16")

# What the flush writes: more than any GPU's L2 cache holds.
FLUSHED_BYTES = 256 * 2**20
# The spin before a call, in cycles: doubled until the CPU is done with the call before it ends, up to about 50 ms.
SPIN, LONGEST_SPIN = 2**20, 2**26

DESCRIPTION = """\
Measure flashx's CUDA kernels and torch's attention (flash, efficient, cuDNN and math, each alone) on this machine's
GPU: forward, and forward with backward. Every result is compared with naive attention in float64 before it is timed."""


def plan(
    lengths: Sequence[int] = LENGTHS,
    head_dims: Sequence[int] = HEAD_DIMS,
    dtypes: Sequence[str] = HALVES,
    directions: Sequence[Direction] = ("fwd", "both"),
) -> list[Case]:
    """Every combination, causal and not, TOKENS tokens each."""
    axes = itertools.product(dtypes, head_dims, (FULL, CAUSAL), lengths, directions)
    return [
        Case(
            length,
            length,
            dim,
            dim,
            batch=max(TOKENS // length, 1),
            q_heads=HIDDEN // dim,
            kv_heads=HIDDEN // dim,
            dtype=dtype,
            window=window,
            direction=direction,
        )
        for dtype, dim, window, length, direction in axes
    ]


class Cuda:
    """flashx.attention on the CUDA kernels."""

    def why_not(self, case: Case) -> list[str]:
        return dispatch.BACKENDS["cuda"].why_not(dataclasses.replace(case.problem(), device="cuda"))

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        return lambda query, key, value: flashx.attention(query, key, value, window=case.window, backend="cuda")


class Torch:
    """torch's attention, held to one of its backends."""

    def __init__(self, backend: SDPBackend) -> None:
        self.backend = backend

    def why_not(self, case: Case) -> list[str]:
        plain = case.window == FULL or (case.window == CAUSAL and case.q_len == case.k_len)
        return [] if plain and case.q_heads == case.kv_heads else ["measured without mask, and causal, only"]

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            only: AbstractContextManager[None] = sdpa_kernel(self.backend)
            with only:
                return sdpa(query, key, value, is_causal=case.window == CAUSAL)

        return attend


IMPLEMENTATIONS: dict[str, Implementation] = {
    "flashx": Cuda(),
    "torch flash": Torch(SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": Torch(SDPBackend.CUDNN_ATTENTION),
    "torch efficient": Torch(SDPBackend.EFFICIENT_ATTENTION),
    "torch math": Torch(SDPBackend.MATH),
}


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


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case with their ratios to the fastest of torch's backends."""
    peers = [row.timing.median for row in rows if row.timing is not None and row.implementation.startswith("torch")]
    return [
        dataclasses.replace(row, ratio_to_torch=min(peers) / row.timing.median if row.timing and peers else None)
        for row in rows
    ]


def gpu_stamp() -> dict[str, Any]:
    """What must be known of the GPU."""
    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory": device.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


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
    cases = plan(lengths=(1024, 8192), dtypes=("bf16",)) if options.quick else plan()
    if reasons := IMPLEMENTATIONS["flashx"].why_not(cases[0]):
        print(f"flashx.bench.gpu: {'; '.join(reasons)}", file=sys.stderr)
        return NO_GPU
    stamp = environment.stamp()
    stamp |= {"gpu": gpu_stamp(), "commit": options.commit or stamp["commit"]}
    rows: list[Row] = []
    interrupted = False
    try:
        for row in _measure(cases, options.repeats, options.min_time):
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
    console = Console(width=None if sys.stdout.isatty() else 140)
    report.show(console, stamp, rows)
    settings = {"repeats": options.repeats, "min_time": options.min_time, "flushed_bytes": FLUSHED_BYTES}
    path = results_path(options.out, stamp["gpu"]["name"], stamp["commit"], date.today())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.as_json(stamp, settings, rows, interrupted))
    console.print(f"written to {path}")
    if interrupted:
        return INTERRUPTED
    return WRONG if any(row.implementation == "flashx" and row.status in ("wrong", "failed") for row in rows) else OK


def _measure(cases: Sequence[Case], repeats: int, min_time: float) -> Iterator[Row]:
    clock = ColdClock()
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {case} {case.direction}", file=sys.stderr, flush=True)
        yield from compare(measure(case, IMPLEMENTATIONS, repeats, min_time, "cuda", clock))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
