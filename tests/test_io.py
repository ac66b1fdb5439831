"""flashx.io: what it predicts is what the emulator counts, its schedules compute attention, its bounds hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CUDA_ENGINES

import flashx
from flashx import io
from flashx.io import algorithms, examples, kernels, schedules
from flashx.io.calls import interval_pairs
from flashx.masks import IntervalMask

emulated = pytest.mark.skipif("cuda_emulated" not in CUDA_ENGINES, reason="this build has no emulator")
HALF, FLOAT = torch.float16, torch.float32
BACKEND = "cuda_emulated"


def draw(*shape: int, dtype: torch.dtype = HALF, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


# ---- Predictions beside the emulator's counts


def agrees(run: Callable[[], Any]) -> None:
    """Every tensor and block mask to the byte, every other table within 5 %, and the products to the instruction."""
    found = io.compare(run)
    assert found.counted
    rough = io.cost.TABLES - {"block_map", "block_bits"}
    wrong = [name for name, error in found.errors().items() if abs(error) > (0.05 if name in rough else 0)]
    assert not wrong, {name: (found.predicted.traffic.get(name), found.counted.get(name)) for name in wrong}
    assert abs(found.error) < 0.05
    assert found.mma in (found.predicted.flops // 4096, found.predicted.flops // 2048)


def both(run: Callable[[], torch.Tensor]) -> None:
    """``agrees`` of a forward, then of its backward."""
    made: list[torch.Tensor] = []
    agrees(lambda: made.append(run()))
    agrees(lambda: made[0].backward(torch.ones_like(made[0])))


def attend(
    q_len: int, k_len: int, dim: int, heads: int = 1, kv_heads: int = 1, batch: int = 1,
    dtype: torch.dtype = HALF, value_dim: int | None = None, grad: bool = True, **options: Any,
) -> Callable[[], torch.Tensor]:  # fmt: skip
    query = draw(batch, heads, q_len, dim, dtype=dtype, grad=grad)
    key = draw(batch, kv_heads, k_len, dim, dtype=dtype, grad=grad)
    value = draw(batch, kv_heads, k_len, value_dim or dim, dtype=dtype, grad=grad)
    return lambda: flashx.attention(query, key, value, backend=BACKEND, **options)


DENSE: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((256, 256, 64), {}),
    ((200, 130, 40), {"value_dim": 24}),
    ((130, 200, 64), {"heads": 4, "kv_heads": 2, "batch": 2, "causal": True}),
    ((190, 170, 32), {"window": (30, 10), "dtype": FLOAT}),
    ((300, 300, 64), {"window": (64, 0)}),
    ((70, 90, 128), {"dtype": FLOAT}),
    ((150, 70, 128), {"dtype": torch.bfloat16}),
    ((70, 90, 192), {"causal": True}),
    ((70, 66, 256), {}),
    ((70, 66, 256), {"dtype": FLOAT}),
    ((100, 130, 64), {"heads": 4, "kv_heads": 2, "softcap": 2.0, "alibi_slopes": torch.ones(4), "causal": True}),
    ((100, 70, 96), {"sinks": torch.ones(1), "dropout_p": 0.2}),
    ((70, 80, 16), {"heads": 2, "batch": 2, "bias": torch.zeros(1, 2, 70, 80).half()}),
]


@emulated
@pytest.mark.parametrize("shape, options", DENSE, ids=str)
def test_dense_kernels(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    both(attend(*shape, **options))


@emulated
@pytest.mark.parametrize("size", [(2, 2, 70, 90), (1, 2, 1, 90), (2, 1, 70, 1), (70, 90)], ids=str)
def test_gradient_of_a_bias(size: tuple[int, ...]) -> None:
    both(attend(70, 90, 16, 2, 1, 2, bias=draw(*size, grad=True), causal=True))


@emulated
@pytest.mark.parametrize(
    "q_len, k_len, options",
    [(1, 2100, {}), (3, 2200, {"window": (100, 0), "sinks": torch.ones(4)}), (2, 1500, {"dtype": FLOAT})],
    ids=str,
)
def test_split_keys(q_len: int, k_len: int, options: dict[str, Any]) -> None:
    agrees(attend(q_len, k_len, 32, 4, 2, grad=False, **options))


@emulated
def test_sink_tokens() -> None:
    tensors = [draw(1, 2, 300, 64, grad=True) for _ in range(3)]
    both(lambda: flashx.sliding_window_attention(*tensors, (40, 0), sink_tokens=70, backend=BACKEND))


@emulated
@pytest.mark.parametrize("block", [(64, 64), (128, 128), (16, 128), (32, 48)], ids=str)
def test_block_masks(block: tuple[int, int]) -> None:
    """Blocks that are hidden, whole and partly visible; maps by head, of grouped heads."""
    torch.manual_seed(0)
    grid = 2, -(-320 // block[0]), -(-320 // block[1])
    shown, full = (
        (torch.rand(grid) < share).repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :320, :320]
        for share in (0.5, 0.7)
    )
    dense = (shown & (torch.rand(2, 320, 320) < 0.98)) | (shown & full)
    mask = flashx.BlockMask.from_dense(dense, block)
    tensors = [draw(1, heads, 320, 32, grad=True) for heads in (2, 1, 1)]
    both(lambda: flashx.block_sparse_attention(*tensors, mask, causal=block[0] == 64, backend=BACKEND))


@emulated
def test_gradient_of_a_bias_under_a_block_mask() -> None:
    mask = flashx.BlockMask.causal(150, 150) & flashx.BlockMask.random(150, 150, density=0.6, seed=1)
    tensors = [draw(1, heads, 150, 16, grad=True) for heads in (2, 1, 1)]
    bias = draw(150, 150, grad=True)
    both(lambda: flashx.attention(*tensors, block_mask=mask, bias=bias, backend=BACKEND))


@emulated
@pytest.mark.parametrize("prefix, q_len", [(300, 1), (300, 20), (4500, 1)])
def test_shared_prefix(prefix: int, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of groups, states carried from level to level, and their splits."""
    monkeypatch.setattr("flashx.prefix_plan.LEVEL_LAUNCHES", {"cpu": -1000})
    grad = prefix < 1000
    query = draw(4, 4, q_len, 32, grad=grad)
    prefixes = [draw(2, 2, prefix, 32, grad=grad) for _ in range(2)]
    own = [draw(4, 2, 40, 32, grad=grad) for _ in range(2)]
    lens = torch.tensor([40, 3, 20, 39])

    def run() -> torch.Tensor:
        return flashx.shared_prefix_attention(query, *prefixes, *own, suffix_lens=lens, backend=BACKEND)

    assert flashx.explain(flashx.shared_prefix_attention, query, *prefixes, *own).plan.form == "levels"
    (both if grad else agrees)(run)


@emulated
def test_trees() -> None:
    levels = [
        flashx.PrefixLevel(draw(1, 2, 130, 64), draw(1, 2, 130, 64), torch.zeros(6, dtype=torch.int64)),
        flashx.PrefixLevel(draw(3, 2, 70, 64), draw(3, 2, 70, 64), torch.tensor([0, 0, 1, 2, 2, 2])),
    ]
    tensors = [draw(6, heads, length, 64, grad=True) for heads, length in ((8, 9), (2, 30), (2, 30))]
    both(lambda: flashx.tree_attention(tensors[0], levels, *tensors[1:], window=(50, 0), backend=BACKEND))


@emulated
def test_packed_sequences() -> None:
    starts = [torch.tensor(cu, dtype=torch.int32) for cu in ([0, 70, 71, 71, 200], [0, 100, 400, 450, 580])]
    tensors = [draw(length, heads, 64, grad=True) for length, heads in ((200, 2), (580, 1), (580, 1))]
    both(lambda: flashx.varlen_attention(*tensors, *starts, 130, 300, causal=True, backend=BACKEND))


@emulated
def test_caches() -> None:
    cache = flashx.KVCache(draw(3, 2, 2200, 64), draw(3, 2, 2200, 64), torch.tensor([2100, 5, 1500]))
    query = draw(3, 8, 1, 64)
    agrees(lambda: flashx.decode_attention(query, cache, backend=BACKEND))
    table = torch.randperm(40).view(4, 10).int()
    paged = flashx.PagedKVCache(draw(40, 16, 2, 32), draw(40, 16, 2, 32), table, torch.tensor([150, 3, 0, 99]))
    query = draw(4, 8, 3, 32)
    agrees(lambda: flashx.decode_attention(query, paged, window=(60, 0), backend=BACKEND))


@emulated
def test_a_wrong_prediction_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashx.io.tiles.forward_tiles", lambda *_: io.tiles.Tiles(64, 64, 4))
    found = io.compare(attend(256, 256, 64, grad=False))
    assert found.worst() == 1.0 and found.errors()["query"] == 0


# ---- Schedules through a small fast memory

SCHEDULES = ["flash", "flash2", "small"]


@pytest.mark.parametrize("length, dim", [(24, 8), (23, 11)])
@pytest.mark.parametrize("fast", [5, 12, 37, 49, 64, 100, 200, 1000, 5000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_exact_and_move_what_the_formulas_say(name: str, fast: int, length: int, dim: int) -> None:
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(length, dim, dtype=torch.float64) for _ in range(3))
    run, count = getattr(schedules, name), getattr(schedules, f"{name}_count")(length, dim, fast)
    if count is None:
        with pytest.raises(schedules.OutOfMemory):
            run(query, key, value, fast)
        return
    found = run(query, key, value, fast)
    torch.testing.assert_close(found.out, torch.softmax(query @ key.T, 1) @ value)
    assert found.counts == count
    assert found.peak <= fast
    assert found.counts.total >= io.lower_bound(length, dim, fast).least


def test_fast_memory_refuses_more_than_it_holds() -> None:
    memory, slow = schedules.FastMemory(10), torch.randn(4, 2)
    tile = memory.load(slow)
    with pytest.raises(schedules.OutOfMemory, match="8 of 10 elements are held: no room for 3 more"):
        memory.new(3, 1)
    memory.free(tile)
    memory.new(5, 2)
    assert memory.counts == (8, 0) and memory.peak == memory.held == 10
    with pytest.raises(ValueError, match="one that was freed"):
        memory.store(tile, slow)


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_the_small_cache_schedule_is_better_below_about_d_squared(dim: int) -> None:
    """Saha and Ye: tiled products below d^2, FlashAttention's order above; constants move the border a little."""
    length = 4096

    def moved(fast: int) -> list[int]:
        counts = [getattr(schedules, f"{name}_count")(length, dim, fast) for name in SCHEDULES]
        return [count.total for count in counts]

    flash, flash2, small = moved(max(dim**2 // 8, 4 * dim + 5))
    assert small < flash2 < flash
    flash, flash2, small = moved(8 * dim**2)
    assert flash2 < flash < small
    assert 4 <= schedules.crossover(length, dim) / dim**2 <= 6
    assert 0.6 <= schedules.crossover(length, dim, "flash2") / dim**2 <= 1.3


def test_schedules_are_optimal_but_for_a_constant() -> None:
    """At every size of the fast memory the better one moves at most 8 times the bound, whose own constant is 1."""
    length = 2**14
    for dim, power in itertools.product((32, 64, 128), range(6, 22)):
        counts = [getattr(schedules, f"{name}_count")(length, dim, 2**power) for name in SCHEDULES]
        best = min(count.total for count in counts if count is not None)
        assert 1 <= best / io.lower_bound(length, dim, 2**power).least < 8


def test_the_bound_is_one_curve() -> None:
    n, d = 1024, 64
    assert io.lower_bound(n, d, d * d).bound == n * n
    assert io.lower_bound(n, d, d * d - 1).bound == pytest.approx(n * n, rel=1e-3)
    assert io.lower_bound(n, d, 4 * d * d).bound == n * n / 4
    assert io.lower_bound(n, d, d * d // 4).bound == 2 * n * n
    assert io.lower_bound(n, d, 2**30).least == io.lower_bound(n, d, 2**30).compulsory == 4 * n * d
    with pytest.raises(ValueError, match="fast_elements must be >= 1, got 0"):
        io.lower_bound(n, d, 0)


# ---- Algorithms


def test_standard_attention_by_hand() -> None:
    """4 and 7 passes over N x N, 4 and 8 over N x d; a byte of dropout for each element."""
    n, d, call = 256, 64, io.problem(256, head_dim=64, heads=3, batch=2, dtype=HALF)
    heads, scores, row = 6, 256 * 256 * 2, 256 * 64 * 2
    assert algorithms.standard(call).bytes == heads * (4 * scores + 4 * row)
    assert algorithms.standard(call, "bwd").bytes == heads * (7 * scores + 8 * row)
    assert algorithms.standard(call, "both").flops == heads * 12 * n * n * d
    full = algorithms.standard(call, "both", dropout=True, mask_passes=1)
    assert full.bytes == heads * (18 * scores + 12 * row)
    assert full.traffic["kept"] == (heads * n * n, heads * n * n)


@pytest.mark.parametrize("fast", [60, 100, 333, 2000])
def test_algorithms_move_what_their_schedules_move(fast: int) -> None:
    length, dim = 97, 8
    call = io.problem(length, head_dim=dim, dtype=torch.float64)
    for name, algorithm in (("flash", algorithms.flash_attention), ("flash2", algorithms.flash_attention2)):
        count = getattr(schedules, f"{name}_count")(length, dim, fast)
        moved = algorithm(call, blocks=getattr(schedules, f"{name}_blocks")(dim, fast)).traffic
        elements = [sum(moved[tensor]) // 8 for tensor in ("query", "key", "value", "out")]
        statistics = sum(moved.get("statistics", (0, 0))) // 4
        assert sum(elements) + statistics == count.total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_have_flash_attention_2s_order(dim: int, causal: bool) -> None:
    call = io.problem(1000, head_dim=dim, heads=2, dtype=HALF, causal=causal)
    assert kernels.forward(call).traffic == algorithms.flash_attention2(call, blocks=(128, 64)).traffic


def test_flash_attention_reads_less_with_more_memory() -> None:
    call = io.problem(4096, head_dim=64, dtype=HALF)
    moved = [algorithms.flash_attention(call, "both", fast_bytes=2**power).bytes for power in range(12, 22)]
    assert all(a >= b for a, b in itertools.pairwise(moved)) and moved[0] > 20 * moved[-1]
    assert moved[-1] < 4 * algorithms.compulsory(call, "both").bytes
    causal = dataclasses.replace(call, mask=IntervalMask(right=0))
    assert 0.5 < algorithms.flash_attention(causal, "both", fast_bytes=2**14).bytes / moved[2] < 0.6


def test_windows_cost_their_width() -> None:
    long, longer = (io.problem(n, head_dim=64, dtype=HALF, window=(512, 0)) for n in (2**14, 2**15))
    for cost in (kernels.forward, kernels.backward, lambda call: algorithms.flash_attention2(call, "bwd")):
        assert cost(longer).bytes / cost(long).bytes == pytest.approx(2, rel=0.05)


def test_block_sparse_costs_its_density() -> None:
    call = io.problem(2048, head_dim=64, heads=4, batch=2, dtype=HALF)
    whole = flashx.BlockMask.from_dense(torch.ones(2048, 2048, dtype=torch.bool), (128, 64))
    for direction in ("fwd", "bwd"):
        dense = algorithms.flash_attention2(call, direction).traffic
        full = algorithms.block_sparse(call, whole, direction).traffic
        for name in ("query", "key", "value", "grad_out", "lse", "grad_key"):
            assert full.get(name) == dense.get(name), name
    quarter = flashx.BlockMask.random(2048, 2048, density=0.25, block=(128, 64), seed=0)
    density = float((quarter.map != 0).double().mean())
    sparse = algorithms.block_sparse(call, quarter)
    assert sparse.traffic["key"][0] == density * algorithms.flash_attention2(call).traffic["key"][0]
    # Its tiles are the kernels', but for their rows: two of them share a block.
    known = dataclasses.replace(call, block=quarter.block), io.Tables(block_map=quarter.map)
    assert kernels.forward(*known).traffic["key"][0] == 2 * sparse.traffic["key"][0]
    assert sparse.flops == algorithms.compulsory(*known[:1], tables=known[1]).flops
    with pytest.raises(ValueError, match="mask must be for 100 x 100"):
        algorithms.block_sparse(io.problem(100), quarter)


def test_a_shared_prefix_is_read_once() -> None:
    call = io.problem(1, 512, head_dim=128, heads=32, batch=64, dtype=HALF)
    shared, copied = algorithms.shared_prefix(call, 16384), algorithms.concatenated_prefix(call, 16384)
    assert shared.traffic["prefix_key"] == (16384 * 32 * 128 * 2, 0)
    assert copied.bytes > 60 * shared.bytes
    assert algorithms.shared_prefix(call, 16384, groups=4).traffic["prefix_key"] == (4 * 16384 * 32 * 128 * 2, 0)


@pytest.mark.parametrize("window", [None, (3000, 0)])
def test_decoding_as_the_kernels_do_it(window: tuple[int, int] | None) -> None:
    call = io.problem(1, 10_000, head_dim=128, heads=32, kv_heads=8, batch=4, dtype=HALF, window=window)
    ideal, kernel = algorithms.decode(call), kernels.forward(call)
    assert ideal.bytes == pytest.approx(kernel.bytes, rel=0.03)
    assert algorithms.decode(call, packed=False).traffic["key"][0] == 4 * ideal.traffic["key"][0]


@pytest.mark.parametrize(
    "mask",
    [
        IntervalMask(), IntervalMask(right=0), IntervalMask(3, 2, 5), IntervalMask(0, 0, -4), IntervalMask(2, 0, 6, 4),
        IntervalMask(2, None, 0, 5), IntervalMask(None, 0, -3, 2),
    ],
    ids=str,
)  # fmt: skip
def test_visible_pairs(mask: IntervalMask) -> None:
    for q_len, k_len in ((1, 9), (9, 1), (13, 17)):
        assert interval_pairs(mask, q_len, k_len) == int(mask.dense(q_len, k_len).sum())


def test_visible_blocks() -> None:
    mask = flashx.BlockMask.random(100, 130, density=0.5, block=(16, 64), seed=0)
    call = dataclasses.replace(io.problem(100, 130, heads=2, batch=3), block=mask.block)
    assert io.visible_pairs(call, io.Tables(block_map=mask.map)) == 6 * int(mask.to_dense().sum())


# ---- FlashAttention's own example


def test_gpt2_medium() -> None:
    """Figure 2 of "FlashAttention": 40.3 GB to a tenth with mask and dropout; 4.4 GB within 6 %; see examples.NOTES."""
    standard, bare, flash, _ = examples.gpt2_medium()
    assert round(standard.cost.bytes / 1e9, 1) == examples.STANDARD.gigabytes
    assert flash.bytes_error is not None and 0 < flash.bytes_error < 0.06
    assert 5 < bare.cost.bytes / flash.cost.bytes < 6 and 8 < standard.cost.bytes / flash.cost.bytes < 9.2
    assert standard.bound_by == "memory"
    # A bound at data-sheet peaks is below what was measured, and not far below.
    for row in (standard, flash):
        assert row.published is not None and 0.4 < 1e3 * row.seconds / row.published.milliseconds < 1


# ---- Machines and times


@pytest.mark.parametrize("name", list(io.MACHINES))
def test_machines_are_of_one_piece(name: str) -> None:
    """Tensor cores' FLOPs a clock are powers of two: rate, cores and clock belong together."""
    machine = io.machine(name.lower())
    clock = machine.exp / 16 / machine.cores
    per_clock = machine.flops_of(HALF) / machine.cores / clock
    assert per_clock == pytest.approx(2 ** round(math.log2(per_clock)), rel=0.01)
    assert machine.flops_of(torch.bfloat16) == 2 * machine.flops_of(FLOAT) and machine.source
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32 for"):
        machine.flops_of(torch.float64)


def test_what_bounds_a_case() -> None:
    h200 = io.machine("H200")

    def bound(call: Any, cost: io.Cost | None = None) -> str:
        return io.predict(kernels.forward(call) if cost is None else cost, h200, call.dtype).bound_by

    prefill = io.problem(8192, heads=16, head_dim=128, causal=True)
    assert bound(prefill) == "matmul"
    assert bound(io.problem(1, 2**16, heads=64, kv_heads=8, head_dim=128, batch=16)) == "memory"
    assert bound(prefill, algorithms.standard(prefill)) == "memory"
    assert bound(io.problem(16, heads=1, head_dim=64)) == "launch"
    # Products of 128 x 128 x 16 take as long as their exponentials, and head dims of 32 are padded to no less.
    assert bound(io.problem(8192, heads=16, head_dim=32)) == "exp"


def test_times_are_bounds() -> None:
    h200, call = io.machine("H200"), io.problem(8192, heads=16, head_dim=128, causal=True)
    cost = kernels.forward(call)
    found, serial = (io.predict(cost, h200, call.dtype, overlap=overlap) for overlap in (1.0, 0.0))
    assert found.seconds == pytest.approx(max(found.parts[:4]) + h200.launch)
    assert serial.seconds == pytest.approx(sum(found.parts))
    half = io.predict(cost, h200.derated(0.5), call.dtype)
    assert half.parts.matmul == pytest.approx(2 * found.parts.matmul) and half.parts.memory == found.parts.memory
    # Keys and values come from the cache when they are read again; slow memory moves what it must.
    assert found.slow_bytes == pytest.approx(algorithms.compulsory(call).bytes, rel=0.01)
    assert cost.bytes > 10 * found.slow_bytes
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\], got"):
            io.predict(cost, h200, call.dtype, overlap=wrong)


def test_few_blocks_use_few_cores() -> None:
    h200 = io.machine("H200")
    one, many = (io.problem(128, 2**16, heads=heads, head_dim=128) for heads in (1, 132))
    times = [io.predict(kernels.forward(call), h200, call.dtype).seconds for call in (one, many)]
    assert times[1] < 2 * times[0]
    call = io.problem(128, 2**16, heads=1, head_dim=128)  # a single block
    found = io.predict(kernels.forward(call), h200, call.dtype)
    assert found.parts.matmul == pytest.approx(call.q_len * call.k_len * 4 * 128 / h200.flops_of(call.dtype) * 132)


def test_keys_that_no_cache_holds_are_read_again() -> None:
    h200, call = io.machine("H200"), io.problem(2**20, heads=1, head_dim=128)
    small = dataclasses.replace(h200, cache_bytes=2**20)
    cost = kernels.forward(call)
    moved = [io.predict(cost, machine, call.dtype).slow_bytes for machine in (h200, small)]
    waves = 2**20 // 128 / (2 * h200.cores)
    assert moved[0] == moved[1] > 0.9 * math.ceil(waves) * 2 * 2**20 * 128 * 2  # 512 MB of keys and values: neither
    shorter = io.problem(2**14, heads=1, head_dim=128)
    moved = [io.predict(kernels.forward(shorter), machine, call.dtype).slow_bytes for machine in (h200, small)]
    assert moved[0] <= moved[1]


def test_this_cpu_can_be_measured() -> None:
    machine = io.Machine.measure_cpu(0.05)
    assert machine.cores == torch.get_num_threads() and machine.shared_units
    for rate in (*machine.matmul.values(), machine.bandwidth, machine.exp):
        assert 1e6 < rate < 1e15
    call = io.problem(512, heads=2, dtype=FLOAT)
    forward, backward = (io.predict(io.cpu.kernels(call, way), machine, FLOAT).seconds for way in ("fwd", "bwd"))
    assert 0 < forward < backward


# ---- Rings


def test_where_a_ring_stops_paying() -> None:
    """A rank's work falls with the square of its tokens, what it sends with the first power."""
    h200 = io.machine("H200")
    call = io.problem(2**20, heads=32, head_dim=128, causal=True)
    points = io.ring_sweep(call, h200, [2**power for power in range(13)])
    efficiency = [point.efficiency for point in points]
    assert efficiency[0] == 1 and all(a >= b for a, b in itertools.pairwise(efficiency))
    last = io.stops_paying(points)
    assert last is not None and last.bound_by == "link" and 2 < last.ranks < 4096
    assert io.stops_paying(points[:4]) is None
    # More tokens, more ranks; fewer key heads, fewer bytes.
    grouped = io.problem(2**20, heads=32, kv_heads=8, head_dim=128, causal=True)
    assert io.ring_tokens(grouped, h200) == pytest.approx(io.ring_tokens(call, h200) / 4, rel=0.01)
    assert io.ring_tokens(call, h200, outside=False) < io.ring_tokens(call, h200) / 8
    assert io.ring(grouped, h200, last.ranks).efficiency > last.efficiency


def test_ring_tokens_is_where_products_and_transfers_meet() -> None:
    h200 = dataclasses.replace(io.machine("H200"), exp=math.inf, cache_bandwidth=math.inf, bandwidth=math.inf, launch=0)
    h200 = dataclasses.replace(h200, links=io.Links(1, 1.0, 50e9, 0.0))
    call = io.problem(2**20, heads=32, head_dim=128)
    tokens = io.ring_tokens(call, h200)
    enough, too_few = (io.ring(call, h200, ranks) for ranks in (2**20 // tokens - 2, 2**20 // tokens + 4))
    assert enough.compute >= enough.transfer and too_few.compute < too_few.transfer


def test_ring_bytes() -> None:
    call = io.problem(4096, head_dim=64, heads=8, kv_heads=2, batch=3, dtype=HALF)
    point = io.ring(call, io.machine("A100"), 16)
    assert point.sent == 3 * 2 * 256 * 128 * 2 and point.total_sent == 15 * point.sent
    assert io.ring(call, io.machine("A100"), 16, "bwd").sent == 3 * 2 * 256 * 128 * (2 + 4)
    carried = point.cost.traffic["carry"]
    assert carried == (3 * 8 * 256 * 66 * 4,) * 2


def test_causal_rings_are_balanced_by_zigzag() -> None:
    call = io.problem(2**18, heads=8, head_dim=128, causal=True)
    zigzag, contiguous = (io.ring(call, io.machine("H100"), 8, balance=balance) for balance in ("zigzag", "contiguous"))
    assert contiguous.seconds == pytest.approx(2 * zigzag.seconds, rel=0.05)


# ---- What is refused


@pytest.mark.parametrize(
    "run, rule",
    [
        (lambda: io.problem(0), "q_len must be >= 1, got 0"),
        (lambda: io.problem(8, heads=3, kv_heads=2), "heads must be a multiple of kv_heads, got 3 and 2"),
        (lambda: io.problem(8, window=(-1, 0)), "window must be >= 0, got -1"),
        (lambda: io.problem(8, window=(1,)), r"window must be \(left, right\)"),
        (lambda: kernels.forward(io.problem(8, head_dim=300)), "must be at most 256 for the CUDA kernels, got 300"),
        (lambda: kernels.forward(io.problem(8, dtype=torch.float64)), "dtype must be float16, bfloat16 or float32"),
        (
            lambda: kernels.forward(dataclasses.replace(io.problem(8), ragged=True)),
            "tables.sequences must be given for this problem",
        ),
        (lambda: algorithms.standard(io.problem(8), "up"), "direction must be fwd, bwd or both, got 'up'"),
        (lambda: algorithms.flash_attention(io.problem(8)), "fast_bytes or blocks must be given, and not both"),
        (lambda: algorithms.flash_attention2(io.problem(8), blocks=(0, 1)), r"blocks must be \(query rows, keys\)"),
        (lambda: algorithms.shared_prefix(io.problem(8, batch=3), 4, groups=2), "groups must divide the batch size 3"),
        (lambda: io.machine("H300"), "machine must be one of A100, .*cpu, got 'H300'"),
        (lambda: io.machine("H100").derated(0.0), r"matmul must be in \(0, 1\], got 0.0"),
        (lambda: io.ring(io.problem(8, 9), io.machine("H100"), 2), "q_len must be k_len for a ring, got 8 and 9"),
        (lambda: io.ring(io.problem(8, window=(3, 0)), io.machine("H100"), 2), "window's left must be None for a ring"),
        (lambda: io.ring(io.problem(8), io.machine("H100"), 9), "ranks must be at most the 8 tokens, got 9"),
        (lambda: io.ring(io.problem(8), io.machine("H100"), 0), "ranks must be an int >= 1, got 0"),
        (lambda: schedules.FastMemory(0), "capacity must be >= 1, got 0"),
        (lambda: schedules.crossover(64, 8, "slow"), "schedule must be flash or flash2, got 'slow'"),
    ],
)
def test_bad_input(run: Callable[[], Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        run()


def test_types_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"q_len must be an int, got 8\.0"):
        io.problem(8.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be torch\.float16, .*got 'half'"):
        io.problem(8, dtype="half")  # type: ignore[arg-type]
