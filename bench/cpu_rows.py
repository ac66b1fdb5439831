"""The rows of cpu-report: one for each case that has a target."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

# By name: flashx.patch() changes torch.nn.functional, and flashx must not be compared with itself.
from torch.nn.functional import scaled_dot_product_attention

import flashx

from .cpu_measure import Build, Call, Measure, Row, Setting, Skipped, Unit, Workload, peak
from .cpu_oracle import GRADIENTS, Accuracy, Oracle, Results, Sample, dense_samples, some_rows
from .timing import Timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

sdpa: Callable[..., torch.Tensor] = scaled_dot_product_attention


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ratio(name: str, timings: Mapping[str, Timing], to: str, goal: float | None = None, of: str = "flashx") -> Measure:
    """How many times as fast as ``to``."""
    return Measure(name, timings[to].median / timings[of].median, at_least=goal)


def fraction(
    name: str, timings: Mapping[str, Timing], work: float, probe: str, amount: float, goal: float | None = None
) -> Measure:
    """Of the rate that the probe reached."""
    return Measure(name, work / timings["flashx"].median / peak(amount, timings[probe]), "fraction", at_least=goal)


def unit_measures(
    probes: Mapping[str, tuple[Call, float]], flops: float, goals: Mapping[str, float], timings: Mapping[str, Timing]
) -> list[Measure]:
    """The fraction of each probed unit's peak."""
    names = {"fp32": "of fp32 FMA peak", "bf16_pairs": "of bf16 dot-product peak", "bf16_tiles": "of AMX peak"}
    return [
        fraction(name, timings, flops, unit, probes[unit][1], goals.get(unit))
        for unit, name in names.items()
        if unit in probes
    ]


FORWARD_GOALS = {"fp32": 2.3, "bf16": 3.8, "fp16": 3.6}
TRAINING_GOALS = {"fp32": 2.1, "bf16": 2.8}


def prefill(dtype: str, dim: int, causal: bool, backward: bool, setting: Setting) -> Workload:
    """B1 H8 N4096, forward, or forward and backward."""
    length, heads = setting.size(4096, 256), setting.size(8, 2)
    shape = (1, heads, length, dim)
    query, key, value, grad_out = (draw(*shape, dtype=DTYPES[dtype], seed=seed) for seed in range(4))

    def run(attend: Callable[..., torch.Tensor]) -> Call:
        if not backward:
            return partial(attend, query, key, value)
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]

        def call() -> Results:
            out = attend(*leaves)
            grads = torch.autograd.grad(out, leaves, grad_out)
            return {"out": out.detach(), **dict(zip(GRADIENTS, grads, strict=True))}

        return call

    calls = {"flashx": run(partial(flashx.attention, causal=causal)), "torch": run(partial(sdpa, is_causal=causal))}
    pairs = length * (length + 1) / 2 if causal else length**2
    flops = heads * pairs * 4 * dim * (3.5 if backward else 1)
    # The unit that the products of this dtype run on; AMX beside the vectors, whose peak is the target.
    units: list[Unit] = ["bf16_pairs", "bf16_tiles"] if dtype == "bf16" else ["fp32"]
    probes = {str(unit): setting.probes.multiply_adds(unit) for unit in units if setting.probes.has(unit)}
    asides: dict[str, Call] = {}
    if dtype == "bf16" and not probes and not backward:
        wide = [tensor.float() for tensor in (query, key, value)]
        asides["fp32 kernel"] = partial(flashx.attention, *wide, causal=causal)

    def measures(timings: Mapping[str, Timing]) -> list[Measure]:
        goals = {} if backward or dtype == "fp16" else {"fp32": 0.82, "bf16_pairs": 0.70}
        of_peak = unit_measures(probes, flops, goals, timings)
        if asides:
            of_peak = [ratio("× fp32 kernel", timings, "fp32 kernel", 1)]
        return [ratio("× torch", timings, "torch", (TRAINING_GOALS if backward else FORWARD_GOALS)[dtype]), *of_peak]

    seen = (lambda rows: torch.arange(length) <= rows) if causal else None
    samples = dense_samples(query, key, value, seen, grad_out if backward else None)
    return Workload(calls, samples, measures, f"B1 H{heads} N{length}", flops, asides=asides, probes=probes)


def decode(dtype: str, batch: int, setting: Setting) -> Workload:
    """One query of 32 heads over 16384 keys of 8 heads."""
    length, dim = setting.size(16384, 512), 128
    query = draw(batch, 32, 1, dim, dtype=DTYPES[dtype], seed=0)
    key, value = (draw(batch, 8, length, dim, dtype=DTYPES[dtype], seed=seed) for seed in (1, 2))
    cache = flashx.KVCache(key, value, torch.full((batch,), length))
    calls = {
        "flashx": partial(flashx.decode_attention, query, cache),
        "torch": partial(sdpa, query, key, value, enable_gqa=True),
    }
    probes = {"read": setting.probes.read(setting.probes.buffer), "read keys": setting.probes.read(key, value)}
    bytes_ = key.nbytes + value.nbytes

    def measures(timings: Mapping[str, Timing]) -> list[Measure]:
        # The stricter one: keys and values may come out of a cache that the larger buffer does not fit.
        best = max(probes, key=lambda name: peak(probes[name][1], timings[name]))
        goal = 20 if dtype == "bf16" else None
        return [
            fraction("of read bandwidth", timings, bytes_, best, probes[best][1], 0.8),
            ratio("× torch", timings, "torch", goal),
        ]

    detail = f"Hq32 Hkv8 D{dim} L{length}, {bytes_ / 2**20:.0f} MiB"
    samples = dense_samples(query, key, value)
    return Workload(calls, samples, measures, detail, bytes=bytes_, probes=probes, min_time=setting.size(1, 0) * 0.1)


def short(dtype: str, length: int, batch: int, setting: Setting) -> Workload:
    """Sequences that fit a cache."""
    query, key, value = (draw(batch, 8, length, 64, dtype=DTYPES[dtype], seed=seed) for seed in range(3))
    calls = {"flashx": partial(flashx.attention, query, key, value), "torch": partial(sdpa, query, key, value)}
    return Workload(
        calls,
        dense_samples(query, key, value),
        lambda timings: [ratio("× torch", timings, "torch", 1)],
        "H8 D64",
        flops=batch * 8 * length**2 * 4 * 64,
        min_time=setting.size(1, 0) * 0.05,
    )


def overhead(setting: Setting) -> Workload:
    """What a call costs that has next to nothing to compute."""
    query, key, value = (draw(1, 1, 1, 64, dtype=torch.float32, seed=seed) for seed in range(3))
    return Workload(
        {"flashx": partial(flashx.attention, query, key, value), "torch": partial(sdpa, query, key, value)},
        dense_samples(query, key, value),
        lambda timings: [Measure("per call", 1e6 * timings["flashx"].median, "us", at_most=10)],
        "B1 H1 N1 D64 fp32",
        min_time=setting.size(1, 0) * 0.2,
        burst=setting.size(500, 5),
    )


def sparse_measures(share: float, timings: Mapping[str, Timing]) -> list[Measure]:
    ideal = share * timings["dense"].median
    return [Measure("× visible × own dense", timings["flashx"].median / ideal, at_most=1.15)]


def window(dtype: str, setting: Setting) -> Workload:
    """Causal, 256 keys behind each query."""
    length, width = setting.size(8192, 512), setting.size(256, 32)
    query, key, value = (draw(1, 8, length, 64, dtype=DTYPES[dtype], seed=seed) for seed in range(3))
    pairs = width * (width + 1) // 2 + (length - width) * (width + 1)
    columns = torch.arange(length)
    return Workload(
        {"flashx": partial(flashx.sliding_window_attention, query, key, value, width)},
        dense_samples(query, key, value, lambda rows: (columns <= rows) & (columns >= rows - width)),
        partial(sparse_measures, pairs / length**2),
        f"B1 H8 N{length} D64, {pairs / length**2:.1%} visible",
        flops=8 * pairs * 4 * 64,
        asides={"dense": partial(flashx.attention, query, key, value)},
    )


def block_sparse(dtype: str, setting: Setting) -> Workload:
    """A tenth of the 64 x 64 blocks, at random."""
    length = setting.size(8192, 640)
    query, key, value = (draw(1, 8, length, 64, dtype=DTYPES[dtype], seed=seed) for seed in range(3))
    mask = flashx.BlockMask.random(length, length, 0.1, seed=0)
    share = (mask.map > 0).double().mean().item()  # whole blocks only, and none is cut off
    blocks = mask.map[0, 0] > 0
    columns = torch.arange(length) // 64
    return Workload(
        {"flashx": partial(flashx.block_sparse_attention, query, key, value, mask)},
        dense_samples(query, key, value, lambda rows: blocks[rows // 64, columns]),
        partial(sparse_measures, share),
        f"B1 H8 N{length} D64, {share:.1%} visible",
        flops=8 * share * length**2 * 4 * 64,
        asides={"dense": partial(flashx.attention, query, key, value)},
    )


def neighborhood(dtype: str, setting: Setting) -> Workload:
    """2-D, window 9 x 9."""
    side, width = setting.size(64, 16), 9
    length = side * side
    query, key, value = (draw(1, 8, length, 64, dtype=DTYPES[dtype], seed=seed) for seed in range(3))
    grid = [tensor.unflatten(2, (side, side)) for tensor in (query, key, value)]
    y, x = torch.arange(length) // side, torch.arange(length) % side

    def near(place: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        begin = (place - width // 2).clamp(0, side - width)
        return (other >= begin) & (other < begin + width)

    share = width**2 / length
    return Workload(
        {"flashx": partial(flashx.neighborhood_attention, *grid, width)},
        dense_samples(query, key, value, lambda rows: near(rows // side, y) & near(rows % side, x)),
        partial(sparse_measures, share),
        f"B1 H8 {side} x {side} D64, {share:.1%} visible",
        flops=8 * share * length**2 * 4 * 64,
        asides={"dense": partial(flashx.attention, query, key, value)},
        adapt={"flashx": lambda out: out.flatten(2, 3)},
    )


def shared_prefix(setting: Setting) -> Workload:
    """A query for each of 64 sequences behind one prefix of 4096 keys."""
    batch, prefix, suffix = setting.size(64, 4), setting.size(4096, 256), setting.size(128, 16)
    heads, dim = 8, 128
    query = draw(batch, heads, 1, dim, dtype=torch.bfloat16, seed=0)
    prefixes = [draw(heads, prefix, dim, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    key, value = (draw(batch, heads, suffix, dim, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    whole_key, whole_value = (
        torch.cat([shared.expand(batch, -1, -1, -1), own], 2)
        for shared, own in zip(prefixes, (key, value), strict=True)
    )
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def cascade() -> torch.Tensor:
        packed = query.transpose(0, 2)  # (1, H, B, D): the batch as the rows of one query
        far, far_lse = flash(packed, prefixes[0][None], prefixes[1][None])
        near, near_lse = flash(query, key, value)
        # The prefix's share: exp(far) / (exp(far) + exp(near)).
        share = torch.sigmoid(far_lse.transpose(0, 2) - near_lse)[..., None]
        return torch.lerp(near.float(), far.transpose(0, 2).float(), share).to(query.dtype)

    calls: dict[str, Call] = {
        "flashx": partial(flashx.shared_prefix_attention, query, *prefixes, key, value),
        "torch": partial(sdpa, query, whole_key, whole_value),
        "cascade": cascade,
    }

    def measures(timings: Mapping[str, Timing]) -> list[Measure]:
        return [
            ratio("× torch on the concatenation", timings, "torch", 20),
            ratio("× cascade of torch's kernels", timings, "cascade", 1.5),
        ]

    # Read once: the prefix, and every suffix.
    bytes_ = sum(tensor.nbytes for tensor in (*prefixes, key, value))
    detail = f"B{batch} H{heads} Lq1 Lp{prefix} Ls{suffix} D{dim}"
    return Workload(calls, dense_samples(query, whole_key, whole_value), measures, detail, bytes=bytes_)


def ragged_lengths(count: int, longest: int) -> list[int]:
    """Log-normal, of median longest / 6 and with a long tail that is cut at ``longest``, which one of them has."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = (longest / 6 * normal.exp()).clamp(min(8, longest), longest).int().tolist()
    return [*lengths[1:], longest]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Packed sequences, (total, H, D)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lengths: list[int]
    ends: torch.Tensor

    @classmethod
    def drawn(cls, dtype: str, setting: Setting) -> Ragged:
        lengths = ragged_lengths(setting.size(64, 6), setting.size(2048, 128))
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        shape = (sum(lengths), 4, 64)
        query, key, value = (draw(*shape, dtype=DTYPES[dtype], seed=seed) for seed in range(3))
        return cls(query, key, value, lengths, ends)

    def attend(self) -> torch.Tensor:
        return flashx.varlen_attention(self.query, self.key, self.value, self.ends, self.ends, causal=True)

    @property
    def flops(self) -> float:
        return sum(length * (length + 1) / 2 for length in self.lengths) * 4 * 4 * 64

    def samples(self) -> list[Sample]:
        """Some sequences, the longest (which is the last) among them."""
        samples = []
        for index in sorted({0, len(self.lengths) // 2, len(self.lengths) - 1}):
            begin, length, head = int(self.ends[index]), self.lengths[index], index % 4
            rows = some_rows(length)

            def pick(results: Results, at: torch.Tensor = begin + rows, head: int = head) -> Results:
                return {"out": results["out"][at, head]}

            own = slice(begin, begin + length)
            shown = torch.arange(length) <= rows[:, None]
            query, key, value = self.query[begin + rows, head], self.key[own, head], self.value[own, head]
            samples.append(Sample(query, key, value, shown, pick))
        return samples


def varlen(dtype: str, setting: Setting) -> Workload:
    """Against a padded batch; causal, so that torch needs no mask: no row sees the padding behind it."""
    ragged = Ragged.drawn(dtype, setting)
    longest, count = max(ragged.lengths), len(ragged.lengths)
    real = torch.arange(longest) < torch.tensor(ragged.lengths)[:, None]  # (B, Lmax)
    padded = []
    for tensor in (ragged.query, ragged.key, ragged.value):
        rows = torch.zeros(count, longest, 4, 64, dtype=tensor.dtype)
        rows[real] = tensor
        padded.append(rows.transpose(1, 2).contiguous())
    share = ragged.flops / (count * longest * (longest + 1) / 2 * 4 * 4 * 64)
    return Workload(
        {"flashx": ragged.attend, "torch": partial(sdpa, *padded, is_causal=True)},
        ragged.samples(),
        lambda timings: [ratio("× torch padded", timings, "torch", 2.5)],
        f"{count} sequences up to {longest}, {share:.0%} of the padded pairs, H4 D64 causal",
        flops=ragged.flops,
        adapt={"torch": lambda out: out.transpose(1, 2)[real]},
    )


def scaling(what: str, dtype: str, setting: Setting) -> Workload:
    """The same call on one thread and on two."""
    if torch.get_num_threads() < 2:
        raise Skipped("torch has a single thread here")
    if what == "ragged":
        ragged = Ragged.drawn(dtype, setting)
        call, samples, flops = ragged.attend, ragged.samples(), ragged.flops
        detail = "as varlen"
    else:
        work = prefill(dtype, 64, what == "causal", False, setting)
        call, samples, flops, detail = work.calls["flashx"], work.samples, work.flops, work.detail + " D64"

    def on(threads: int, inner: Call) -> Any:
        torch.set_num_threads(threads)
        return inner()

    probes = {f"fp32 {count}": setting.probes.multiply_adds("fp32", count) for count in (1, 2)}

    def measures(timings: Mapping[str, Timing]) -> list[Measure]:
        rates = [peak(work, timings[name]) for name, (_, work) in probes.items()]
        return [
            ratio("× one thread", timings, "flashx 1 thread", 1.85),
            Measure("FMA peak × one thread", rates[1] / rates[0]),
        ]

    calls = {"flashx": partial(on, 2, call), "flashx 1 thread": partial(on, 1, call)}
    return Workload(calls, samples, measures, detail, flops, probes=probes)


_RESET = Path("/proc/self/clear_refs")
# The child allocates its inputs, forgets the peak so far, runs, and reads the new one.
MEMORY = """
import sys, torch
from flashx.bench.cpu_rows import peak_growth
torch.set_num_threads(int(sys.argv[3]))
print(*peak_growth(int(sys.argv[1]), backward=sys.argv[2] == "backward"))
"""


def peak_growth(length: int, backward: bool) -> tuple[float, float, float]:
    """Bytes beyond inputs and outputs at the peak of a causal call; then its largest error for its budget, and that.

    Raises:
        OSError: the system cannot tell (Linux's /proc can).
    """

    def attend(n: int) -> tuple[list[torch.Tensor], Results, float]:
        inputs = [draw(1, 1, n, 64, dtype=torch.float32, seed=seed) for seed in range(4)]
        leaves = [tensor.requires_grad_(backward) for tensor in inputs[:3]]
        gc.collect()
        _RESET.write_text("5")  # the peak to what is resident now
        before = _resident("VmHWM")
        out, lse = flashx.attention(leaves[0], leaves[1], leaves[2], causal=True, return_lse=True)
        results = {"out": out.detach(), "lse": lse.detach()}
        if backward:
            results |= dict(zip(GRADIENTS, torch.autograd.grad(out, leaves, inputs[3]), strict=True))
        grown = _resident("VmHWM") - before
        return inputs, results, grown - sum(result.nbytes for result in results.values())

    attend(1000)  # what torch and the threads need once
    inputs, results, grown = attend(length)
    query, key, value, grad_out = (tensor.detach() for tensor in inputs)
    rows = some_rows(length)
    # Of the gradients only query's, which needs no other rows.
    names = ("out", "grad_query") if backward else ("out",)
    sample = Sample(
        query[0, 0, rows], key[0, 0], value[0, 0], torch.arange(length) <= rows[:, None],
        lambda found: {name: found[name][0, 0, rows] for name in names}, grad_out[0, 0, rows] if backward else None,
    )  # fmt: skip
    oracle = Oracle([sample])
    oracle.budgets = {name: oracle.budgets[name] for name in names}
    worst = max(oracle.check(results).values(), key=lambda accuracy: accuracy.error / accuracy.budget)
    return grown, worst.error, worst.budget


def _resident(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def memory(direction: str, setting: Setting) -> Row:
    """In a process of its own, whose peak is not that of the rows before."""
    length = setting.size(65536, 2048)
    if not os.access(_RESET, os.W_OK):
        raise Skipped(f"needs {_RESET} to tell the peak of a single call")
    row = Row(f"memory {direction}", detail=f"B1 H1 N{length} D64 fp32 causal")
    command = [sys.executable, "-c", MEMORY, str(length), direction, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        row.status, row.reasons = "failed", [(done.stderr.strip() or "no message").splitlines()[-1]]
        return row
    grown, error, budget = map(float, done.stdout.split())
    row.accuracy = {"flashx": {"worst": Accuracy(error, budget)}}
    if not row.accuracy["flashx"]["worst"].ok:
        row.status, row.reasons = "wrong", [f"flashx is off by {error:.3g}, budget {budget:.3g}"]
        return row
    row.measures = [Measure("beyond inputs and outputs", max(grown, 0) / 2**20, "MiB", at_most=64)]
    return row


def plan() -> dict[str, Build]:
    """Every row, by name."""
    rows: dict[str, Build] = {}
    masks = {"full": False, "causal": True}
    for backward, dtypes in ((False, FORWARD_GOALS), (True, TRAINING_GOALS)):
        for dtype in dtypes:
            for dim in (64, 128):
                for mask, causal in masks.items():
                    name = "forward+backward" if backward else "forward"
                    rows[f"{name} {dtype} D{dim} {mask}"] = partial(prefill, dtype, dim, causal, backward)
    for dtype in ("fp32", "bf16"):
        for batch in (1, 8):
            rows[f"decode {dtype} B{batch}"] = partial(decode, dtype, batch)
    for dtype in ("fp32", "bf16"):
        for length in (16, 64, 256):
            for batch in (1, 8, 32):
                rows[f"short {dtype} N{length} B{batch}"] = partial(short, dtype, length, batch)
    rows["call overhead N1"] = overhead
    for dtype in ("fp32", "bf16"):
        rows[f"window {dtype}"] = partial(window, dtype)
        rows[f"block-sparse {dtype}"] = partial(block_sparse, dtype)
        rows[f"neighborhood {dtype}"] = partial(neighborhood, dtype)
    rows["shared prefix bf16"] = shared_prefix
    for dtype in ("fp32", "bf16"):
        rows[f"varlen {dtype}"] = partial(varlen, dtype)
    for direction in ("forward", "backward"):
        rows[f"memory {direction}"] = partial(memory, direction)
    for what, dtype in (("full", "fp32"), ("causal", "fp32"), ("causal", "bf16"), ("ragged", "fp32")):
        rows[f"threads {what} {dtype}"] = partial(scaling, what, dtype)
    return rows
