"""``flashx-bench model``: bytes, products and predicted times of a case, without running it (flashx.io, docs/io.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import flashx
from flashx import io
from flashx.dispatch import UnsupportedError
from flashx.io import algorithms, examples, schedules
from flashx.io.algorithms import Direction
from flashx.io.machines import clock
from flashx.problem import Problem

from .cases import DTYPES
from .model_report import (
    RingRow,
    Row,
    SramRow,
    example_table,
    milliseconds,
    new_table,
    readable,
    ring_notes,
    ring_table,
    rows_table,
    sram_tables,
)

T = TypeVar("T")

# Version of the JSON's schema (docs/io.md): raised by any change that a reader could trip over.
SCHEMA = 1
OK, BAD_ARGUMENTS = 0, 2
FULL_WIDTH = 140
# What --check may ask of the emulator: matrix instructions, 1.5 to 2 us each.
MOST_MMA = 20_000_000
# Pairs of a block mask whose tiles are walked one by one, as the kernels do.
MOST_SPARSE_PAIRS = 2**27

DESCRIPTION = """\
Predict what attention moves, computes and takes, without running it: flashx's own kernels, tile by tile, and the
algorithms of the papers. The time is a lower bound at the machine's peaks: the longest of products, bytes and
exponentials. docs/io.md says what is counted and how far it can be trusted."""

EPILOG = """\
exit codes: 0 all well, 2 bad arguments. Examples:

  flashx-bench model                                             a tour: what each algorithm moves, and why it matters
  flashx-bench model --example gpt2-medium                       FlashAttention's own figure, beside the model's
  flashx-bench model --seqlen 8192 --headdim 128 --heads 32 --kv-heads 8 --causal --machine H200,B200
  flashx-bench model --seqlen 1x32768 --heads 64 --kv-heads 8 --batch 16 --machine H200          decoding
  flashx-bench model --seqlen 1x512 --prefix 16384 --batch 64 --heads 32 --headdim 128           a shared prefix
  flashx-bench model --seqlen 8192 --heads 16 --headdim 128 --density 0.1                       a block mask
  flashx-bench model --seqlen 1048576 --heads 32 --headdim 128 --causal --ring 1,8,64,512,4096
  flashx-bench model --seqlen 4096 --headdim 64 --sram 1K,4K,16K,64K,256K
  flashx-bench model --seqlen 300 --headdim 64 --causal --check                                  against the emulator
  flashx-bench model --seqlen 2048 --heads 8 --dtype fp32 --machine cpu --measure                against a clock"""

ALGORITHMS = ("flashx", "flash-attention-2", "flash-attention", "standard", "compulsory")
EXAMPLES = ("gpt2-medium",)

LEGEND = """\
bytes: asked of memory by the kernels. slow: of them, those that the shared cache leaves to slow memory. FLOP/B:
products over bytes. ms: predicted, at peak rates. TFLOP/s: products of visible pairs over it. bound by: what takes
longest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``flashx-bench model``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    case = parser.add_argument_group("the case")
    case.add_argument("--seqlen", type=_size, metavar="N|LQxLK", default=(4096, 4096), help="length (4096)")
    case.add_argument("--headdim", type=_size, metavar="D|DxDV", default=(128, 128), help="dim of heads (128)")
    case.add_argument("--heads", type=_positive, metavar="H", default=16, help="query heads (16)")
    case.add_argument("--kv-heads", type=_positive, metavar="H", help="key heads (as many as query heads)")
    case.add_argument("--batch", type=_positive, metavar="B", default=1, help="batch size (1)")
    case.add_argument("--dtype", type=_dtype, metavar="DTYPE", default="bf16", help="fp16, bf16 or fp32 (bf16)")
    case.add_argument("--causal", action="store_true", help="causal mask, aligned bottom-right")
    case.add_argument("--window", type=_window, metavar="LEFT[,RIGHT]", help="sliding window; 'none' is unbounded")
    case.add_argument("--prefix", type=_positive, metavar="N", help="keys that the whole batch shares, before its own")
    case.add_argument("--density", type=_share, metavar="F", help="share of visible 128 x 128 blocks of a block mask")
    case.add_argument("--direction", choices=["fwd", "bwd", "both"], default="fwd", help="(fwd)")

    what = parser.add_argument_group("what to predict")
    what.add_argument(
        "--machine", type=_list(_machine), metavar="NAME,...", default=["H200"],
        help=f"{', '.join(io.MACHINES)}, or cpu: this one, measured in about a second (H200)",
    )  # fmt: skip
    what.add_argument(
        "--algorithm", type=_list(_choice("algorithm", ALGORITHMS)), metavar="NAME,...", default=list(ALGORITHMS),
        help=f"({','.join(ALGORITHMS)})",
    )  # fmt: skip
    what.add_argument("--ring", type=_list(_positive), metavar="P,...", help="ring attention over so many ranks")
    what.add_argument("--balance", choices=["zigzag", "contiguous"], default="zigzag", help="of a causal ring (zigzag)")
    what.add_argument("--overlap", type=_share, default=1.0, metavar="F", help="1: all parts hide each other; 0: none")
    what.add_argument(
        "--efficiency", type=_efficiency, default=(1.0, 1.0), metavar="M[,B]",
        help="shares of the peaks of products and of bandwidth that are reached (1,1)",
    )  # fmt: skip
    what.add_argument(
        "--sram", type=_list(_amount), metavar="SIZE,...",
        help="fast memories, bytes (K, M): what schedules move through them, against the lower bound",
    )  # fmt: skip
    what.add_argument("--example", choices=EXAMPLES, help="a paper's figure, beside the model's")

    checks = parser.add_argument_group("how true it is")
    checks.add_argument("--check", action="store_true", help="run the case on the emulator and compare bytes")
    checks.add_argument("--measure", action="store_true", help="time flashx on this CPU (--machine cpu) and compare")
    checks.add_argument(
        "--json", metavar="PATH", help="also write everything to this file; '-': nothing else, to stdout"
    )


def run(options: argparse.Namespace) -> int:
    """Predict and print; returns the exit code: 0, or 2 for what cannot be predicted."""
    try:
        document, tables = _predict(options)
        text = json.dumps(document, indent=1) + "\n"
        if options.json is not None and options.json != "-":
            Path(options.json).write_text(text)
    except OSError as error:
        return _fail(f"argument --json: {options.json} cannot be written: {error.strerror}")
    except (ValueError, TypeError) as error:
        return _fail(str(error))
    if options.json == "-":
        sys.stdout.write(text)
        return OK
    console = Console()
    if not console.is_terminal and console.width < FULL_WIDTH:
        console.width = FULL_WIDTH
    for item in tables:
        console.print(item)
    return OK


def _fail(message: str) -> int:
    print(f"flashx-bench model: error: {message}", file=sys.stderr)
    return BAD_ARGUMENTS


def _predict(options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The JSON document, and what is printed."""
    if options.example is not None:
        rows = examples.gpt2_medium()
        return {"schema": SCHEMA, "example": [_example_json(row) for row in rows]}, [
            example_table(rows),
            Text("\n".join(examples.NOTES), style="dim"),
        ]
    call = _problem(options)
    if options.sram is not None:
        sweep = _sram(call, options.sram)
        return {"schema": SCHEMA, "case": str(call), "sram": [asdict(row) for row in sweep]}, sram_tables(call, sweep)

    machines = [io.machine(name).derated(*options.efficiency) for name in options.machine]
    document: dict[str, Any] = {"schema": SCHEMA, "case": str(call), "direction": options.direction}
    document["machines"] = [{"name": it.name, "source": it.source} for it in machines]
    shown: list[Any] = [Text(f"{call}; {options.direction}", style="bold")]
    if options.ring is None:
        rows_ = [row for machine in machines for row in _rows(call, machine, options)]
        document["rows"] = [asdict(row) for row in rows_]
        shown += [rows_table(rows_, call, options), Text(LEGEND, style="dim")]
    else:
        points = [row for machine in machines for row in _ring(call, machine, options)]
        document["ring"] = [asdict(row) for row in points]
        shown += [ring_table(points), *ring_notes(call, machines, points, options)]
    if options.check:
        document["check"], table = _check(call, options)
        shown.append(table)
    if options.measure:
        document["measured"], line = _measure(call, machines, options)
        shown.append(line)
    return document, shown


def _problem(options: argparse.Namespace) -> Problem:
    (q_len, k_len), (head_dim, value_dim) = options.seqlen, options.headdim
    return io.problem(
        q_len, k_len, head_dim=head_dim, value_dim=value_dim, heads=options.heads, kv_heads=options.kv_heads,
        batch=options.batch, dtype=DTYPES[options.dtype], causal=options.causal, window=options.window,
        device="cpu" if options.machine == ["cpu"] else "cuda",
    )  # fmt: skip


# ---- Rows


def _rows(call: Problem, machine: io.Machine, options: argparse.Namespace) -> list[Row]:
    rows = []
    for name, cost in _costs(call, machine, options):
        found = io.predict(cost, machine, call.dtype, overlap=options.overlap)
        rows.append(
            Row(
                name, machine.name, cost.flops, cost.exps, cost.read, cost.written, found.slow_bytes, cost.intensity,
                found.seconds, found.bound_by, found.parts._asdict(),
            )
        )  # fmt: skip
    return rows


def _costs(call: Problem, machine: io.Machine, options: argparse.Namespace) -> list[tuple[str, io.Cost]]:
    """Of the algorithms that were asked for, those that have such a case."""
    if options.prefix is not None:
        if options.direction != "fwd":
            raise ValueError(f"--prefix must have --direction fwd, got {options.direction}")
        return [
            ("shared prefix", algorithms.shared_prefix(call, options.prefix)),
            ("concatenated", algorithms.concatenated_prefix(call, options.prefix)),
        ]
    direction: Direction = options.direction
    if options.density is not None:
        return _sparse_costs(call, direction, options.density)
    is_cpu = machine.name.startswith("cpu")
    made: dict[str, Callable[[], io.Cost]] = {
        "flashx": lambda: io.cpu.kernels(call, direction) if is_cpu else _kernels(call, direction),
        "flash-attention-2": lambda: algorithms.flash_attention2(call, direction),
        "flash-attention": lambda: algorithms.flash_attention(call, direction, fast_bytes=machine.fast_bytes),
        "standard": lambda: algorithms.standard(call, direction),
        "compulsory": lambda: algorithms.compulsory(call, direction),
    }
    return [(name, made[name]()) for name in options.algorithm]


def _sparse_costs(call: Problem, direction: Direction, density: float) -> list[tuple[str, io.Cost]]:
    if call.mask.left is not None or call.mask.right is not None:
        raise ValueError("--density must be without --causal and --window")
    mask = flashx.BlockMask.random(call.q_len, call.k_len, density=density, block=(128, 128), seed=0)
    tables = io.Tables(block_map=mask.map)
    masked = replace(call, block=mask.block)
    costs = [
        ("block-sparse", algorithms.block_sparse(call, mask, direction)),
        ("compulsory", algorithms.compulsory(masked, direction, tables)),
        ("dense, flash-attention-2", algorithms.flash_attention2(call, direction)),
    ]
    if call.q_len * call.k_len <= MOST_SPARSE_PAIRS:
        costs.insert(0, ("flashx", _kernels(masked, direction, tables)))
    return costs


def _kernels(call: Problem, direction: Direction, tables: io.Tables | None = None) -> io.Cost:
    cost = io.Cost()
    if direction != "bwd":
        cost += io.kernels.forward(call, tables)
    if direction != "fwd":
        cost += io.kernels.backward(call, tables)
    return cost


def _ring(call: Problem, machine: io.Machine, options: argparse.Namespace) -> list[RingRow]:
    points = io.ring_sweep(
        call, machine, options.ring, options.direction, balance=options.balance, overlap=options.overlap
    )
    return [
        RingRow(
            machine.name, point.ranks, point.tokens, point.compute, point.transfer, point.sent, point.seconds,
            point.speedup, point.efficiency, point.bound_by,
        )
        for point in points
    ]  # fmt: skip


def _sram(call: Problem, sizes: Sequence[int]) -> list[SramRow]:
    if call.q_len != call.k_len or call.head_dim != call.value_dim:
        raise ValueError("--sram must have one length and one head dim: its schedules are those of square cases")
    rows = []
    for size in sizes:
        elements = size // call.dtype.itemsize
        bound = io.lower_bound(call.q_len, call.head_dim, elements)
        counts = [
            count(call.q_len, call.head_dim, elements)
            for count in (schedules.flash_count, schedules.flash2_count, schedules.small_count)
        ]
        flash, flash2, small = (None if count is None else count.total for count in counts)
        rows.append(SramRow(elements, flash, flash2, small, bound.least, bound.small))
    return rows


# ---- How true it is


def _check(call: Problem, options: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """The case on the emulator: bytes predicted and counted, tensor by tensor."""
    if options.prefix is not None or options.ring is not None or options.density is not None:
        raise ValueError("--check must be without --prefix, --density and --ring: it runs one dense call")
    cost = _kernels(call, options.direction)
    mma = cost.flops // 4096
    if mma > MOST_MMA:
        raise ValueError(
            f"--check must have a case of at most {MOST_MMA} matrix instructions, since the emulator is slow, "
            f"got about {mma}: shorten --seqlen, or use fewer heads"
        )
    query, key, value = (
        torch.randn(call.batch, heads, length, dim).to(call.dtype).requires_grad_(options.direction != "fwd")
        for heads, length, dim in (
            (call.q_heads, call.q_len, call.head_dim),
            (call.kv_heads, call.k_len, call.head_dim),
            (call.kv_heads, call.k_len, call.value_dim),
        )
    )
    window = (call.mask.left, call.mask.right)

    def attend() -> torch.Tensor:
        return flashx.attention(query, key, value, window=window, backend="cuda_emulated")

    try:
        if options.direction == "fwd":
            found = io.compare(attend)
        elif options.direction == "both":
            found = io.compare(lambda: attend().sum().backward())
        else:
            out = attend()
            found = io.compare(lambda: out.backward(torch.ones_like(out)))
    except UnsupportedError as refusal:
        raise ValueError(f"--check: {refusal}") from refusal
    table = new_table("tensor", "predicted", "counted by the emulator", "error")
    errors, predicted = found.errors(), found.predicted.traffic
    for name, error in errors.items():
        table.add_row(
            name, readable(sum(predicted.get(name, (0, 0)))), readable(sum(found.counted.get(name, (0, 0)))),
            f"{100 * error:+.2f} %",
        )  # fmt: skip
    table.add_row("all", readable(found.predicted.bytes), "", f"{100 * found.error:+.2f} %", style="bold")
    return {"error": found.error, "tensors": errors}, table


def _measure(call: Problem, machines: Sequence[io.Machine], options: argparse.Namespace) -> tuple[dict[str, Any], Text]:
    """flashx on this CPU: the best of some calls beside the prediction."""
    machine = next((it for it in machines if it.name.startswith("cpu")), None)
    if machine is None or options.prefix is not None or options.ring is not None or options.density is not None:
        raise ValueError("--measure must have --machine cpu, and no --prefix, --density or --ring")
    if options.direction == "bwd":
        raise ValueError("--measure must have --direction fwd or both, got bwd")
    predicted = io.predict(io.cpu.kernels(call, options.direction), machine, call.dtype, overlap=options.overlap)
    seconds = measured_cpu(call, options.direction)
    error = predicted.seconds / seconds - 1
    text = (
        f"measured on this CPU: {milliseconds(seconds)} ms; predicted {milliseconds(predicted.seconds)} ms, "
        f"{100 * error:+.0f} %"
    )
    return {"seconds": seconds, "predicted": predicted.seconds, "error": error}, Text(text, style="bold")


def measured_cpu(call: Problem, direction: Direction, repeats: int = 7) -> float:
    """Seconds of a call on this CPU: the shortest of ``repeats``, as the machine's probe takes the best of many.

    Args:
        direction: "fwd", or "both" for the forward and the backward in one.
    """
    backward = direction == "both"
    tensors = [
        torch.randn(call.batch, heads, length, dim).to(call.dtype).requires_grad_(backward)
        for heads, length, dim in (
            (call.q_heads, call.q_len, call.head_dim),
            (call.kv_heads, call.k_len, call.head_dim),
            (call.kv_heads, call.k_len, call.value_dim),
        )
    ]
    grad = torch.randn(call.batch, call.q_heads, call.q_len, call.value_dim).to(call.dtype)
    window, samples = (call.mask.left, call.mask.right), []
    now = clock()
    for _ in range(repeats + 1):  # the first one warms up
        start = now()
        out = flashx.attention(*tensors, window=window, backend="cpu")
        if backward:
            out.backward(grad)
        samples.append(now() - start)
    return min(samples[1:])


def _example_json(row: examples.Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "flops": row.cost.flops,
        "bytes": row.cost.bytes,
        "seconds": row.seconds,
        "published": None if row.published is None else row.published._asdict(),
    }


# ---- Arguments


def _list(item: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [item(part.strip()) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    first, cross, second = text.partition("x")
    return _positive(first), _positive(second if cross else first)


def _window(text: str) -> tuple[int | None, int | None]:
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
    return _choice("dtype", [name for name in DTYPES if name != "fp64"])(long.get(text, text))


def _machine(text: str) -> str:
    names = {name.lower(): name for name in (*io.MACHINES, "cpu")}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"machine must be one of {', '.join(names.values())}, got {text!r}")
    return names[text.lower()]


def _amount(text: str) -> int:
    unit = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    return _positive(text[:-1] if unit > 1 else text) * unit


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")
    return share


def _efficiency(text: str) -> tuple[float, float]:
    first, comma, second = text.partition(",")
    shares = _share(first), _share(second) if comma else 1.0
    if 0 in shares:
        raise argparse.ArgumentTypeError(f"must be over 0, got {text!r}")
    return shares


def _choice(what: str, names: Sequence[str]) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{what} must be one of {', '.join(names)}, got {text!r}")
        return text

    return choose


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m flashx.bench.model``: the subcommand by itself."""
    parser = argparse.ArgumentParser("flashx-bench model")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
