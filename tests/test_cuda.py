"""csrc/cuda's kernels: what they read and write, splits, precision, and what their launch code refuses.

That they compute attention is tested with every other backend (test_attention.py and its neighbours).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tolerance
import torch
from cases import CASES, COMBINED, Bias, Case
from conftest import CUDA_ENGINES

import flashx
from flashx import _C
from flashx.backends import native
from flashx.masks import IntervalMask
from flashx.problem import Inputs, Problem

emulated = pytest.mark.skipif("cuda_emulated" not in CUDA_ENGINES, reason="this build has no emulator")
on_cuda = pytest.mark.parametrize("engine", CUDA_ENGINES, indirect=True)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# csrc/cuda/sm80/config.h
ROWS = 128  # of a plain forward tile, 16-bit elements, head dims up to 128
KEYS = 64
SPLIT_KEYS = 1024


@pytest.fixture
def counted() -> Iterator[Any]:
    """The emulator's machine, its counts reset."""
    _C.cuda_emulated.reset_traffic()
    yield _C.cuda_emulated


def traffic() -> dict[str, tuple[int, int]]:
    """Bytes of global memory (read, written) since the last reset, by tensor."""
    return {name: (read, written) for name, read, written in _C.cuda_emulated.traffic()}


def draw(q_len: int, k_len: int, dim: int, heads: int = 1, kv_heads: int = 1, batch: int = 1) -> list[torch.Tensor]:
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim)]
    return [torch.randn(shape).half() for shape in shapes]


def attend(tensors: list[torch.Tensor], **arguments: Any) -> Any:
    return flashx.attention(*tensors, **arguments, backend="cuda_emulated")


# ---- Traffic: the kernels read what FlashAttention-2's loop order says, and nothing else


@emulated
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [256, 512, 1024])
def test_forward_traffic(counted: Any, length: int, dim: int) -> None:
    """Q and O once, K and V once per query tile; standard attention moves the N x N scores four times as well."""
    attend(draw(length, length, dim))
    once = length * dim * 2
    moved = traffic()
    assert moved["query"] == (once, 0) and moved["out"] == (0, once)
    assert moved["key"] == moved["value"] == (length // ROWS * once, 0)
    total = sum(read + written for read, written in moved.values())
    assert total == pytest.approx((2 + 2 * (length // ROWS)) * once, rel=0.02)
    assert total < 4 * once + 4 * 2 * length * length


@emulated
def test_forward_traffic_of_ragged_lengths(counted: Any) -> None:
    """Rows past the end are not read."""
    attend(draw(200, 130, 40))
    assert traffic()["query"] == (200 * 40 * 2, 0)
    assert traffic()["key"] == (2 * 130 * 40 * 2, 0)


@emulated
def test_window_reads_visible_tiles_only(counted: Any) -> None:
    length, width = 1024, 64
    attend(draw(length, length, 64), window=(width, 0))
    tiles = 0
    for first in range(0, length, ROWS):
        low, high = max(first - width, 0), first + ROWS
        tiles += -(-high // KEYS) - low // KEYS
    assert traffic()["key"] == (tiles * KEYS * 64 * 2, 0)
    assert tiles < length // ROWS * 5


@emulated
def test_grouped_heads_share_the_keys_they_read(counted: Any) -> None:
    attend(draw(4, 256, 64, heads=8, kv_heads=2), causal=True)
    assert traffic()["key"] == (2 * 256 * 64 * 2, 0)


@emulated
def test_splits_read_the_keys_once(counted: Any) -> None:
    keys = 3 * SPLIT_KEYS + 5
    attend(draw(1, keys, 64, heads=2))
    assert traffic()["key"] == (keys * 64 * 2, 0)
    assert counted.counters()["launches"] == 2


@emulated
def test_backward_traffic(counted: Any) -> None:
    """dK and dV: K and V once, Q and dO once per key tile. dQ: Q and dO once, K and V once per query tile."""
    length, dim, tile = 256, 64, 64
    leaves = [tensor.requires_grad_() for tensor in draw(length, length, dim)]
    out = attend(leaves)
    counted.reset_traffic()
    out.backward(torch.ones_like(out))
    once, tiles = length * dim * 2, length // tile
    moved = traffic()
    for name in ("query", "key", "value"):
        assert moved[name] == (once + tiles * once, 0), name
        assert moved[f"grad_{name}"] == (0, once), name
    assert moved["grad_out"] == (once + tiles * once + once, 0)  # and for delta
    assert moved["out"] == (once, 0)


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_matrix_loads_without_bank_conflicts(counted: Any, dim: int, dtype: torch.dtype) -> None:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in draw(70, 70, dim)]
    attend(leaves).sum().backward()
    counters = counted.counters()
    assert counters["ldmatrix"] > 0 and counters["ldmatrix_conflicts"] == 0


# ---- Splits


SPLITS = [
    Case(1, 2 * SPLIT_KEYS, 32),
    Case(1, 2 * SPLIT_KEYS + 7, 16, heads=4, kv_heads=1, causal=True),
    Case(5, 3 * SPLIT_KEYS - 1, 16, 24, batch=2, heads=2, causal=True, sinks=True),
    Case(2, 2 * SPLIT_KEYS + 100, 8, heads=2, window=(40, 0), sinks=True),  # the first split sees nothing
    Case(3, 2 * SPLIT_KEYS + 70, 8, bias=Bias("b11k", "bool_few"), alibi="h", softcap=3.0, dropout_p=0.2),
    Case(2, 2 * SPLIT_KEYS + 1, 8, bias=Bias("qk", "bool_none")),
    Case(2, 2 * SPLIT_KEYS + 1, 8, bias=Bias("qk", "bool_none"), sinks=True),
]


@on_cuda
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_splits_within_budget(case: Case, dtype: torch.dtype, engine: str) -> None:
    tolerance.check(case, dtype, tolerance.attend(case, case.inputs(dtype), engine))


@on_cuda
def test_splits_do_not_depend_on_the_batch(engine: str) -> None:
    query, key, value = draw(1, 2 * SPLIT_KEYS + 50, 16, heads=4, kv_heads=2, batch=5)
    together = flashx.attention(query, key, value, backend=engine)
    for b in range(5):
        alone = flashx.attention(query[b : b + 1], key[b : b + 1], value[b : b + 1], backend=engine)
        tolerance.same_bits(f"sequence {b}", together[b : b + 1], alone)


@on_cuda
def test_poison_in_another_split(engine: str) -> None:
    """NaN in a value that is hidden changes nothing, in one that is seen it shows, whichever split reads it."""
    query, key, value = draw(2, 2 * SPLIT_KEYS + 50, 16)
    mask = torch.ones(key.shape[2], dtype=torch.bool)
    mask[[3, SPLIT_KEYS + 1]] = False
    expected = flashx.attention(query, key, value, bias=mask, backend=engine)
    value[:, :, [3, SPLIT_KEYS + 1]] = torch.nan
    tolerance.same_bits("out", flashx.attention(query, key, value, bias=mask, backend=engine), expected)
    assert flashx.attention(query, key, value, backend=engine).isnan().all()


# ---- Precision of float32


@on_cuda
def test_tf32_only_where_torch_allows_it(engine: str) -> None:
    """Three products are as exact as float32 (test_attention.py); one of them is not, and no worse than TF32."""
    case = Case(65, 70, 64)
    inputs, expected = case.inputs(torch.float32), tolerance.oracle(case, torch.float32)
    errors, before = {}, torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            results = tolerance.attend(case, inputs, engine)
            errors[allowed] = max(float((results[name] - expected[name]).abs().max()) for name in expected)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-5 < errors[True] < 2e-2


# ---- Both ways in which asynchronous copies may arrive


@emulated
def test_early_copies_give_the_same_bits() -> None:
    """Other tests have copies arrive late; here are cases of all kinds with early ones, warps in the other order."""
    chosen = [*CASES[::12], *COMBINED]
    for number, case in enumerate(chosen):
        dtype = DTYPES[number % 3]
        late = tolerance.attend(case, case.inputs(dtype), "cuda_emulated")
        _C.cuda_emulated.set_completion("early")
        try:
            early = tolerance.attend(case, case.inputs(dtype), "cuda_emulated")
        finally:
            _C.cuda_emulated.set_completion("late")
        for name in late:
            tolerance.same_bits(f"{case} {name}", early[name], late[name])


# ---- What the launch code refuses


def problem(**changes: Any) -> tuple[Any, list[Any]]:
    """A native problem with tensors for it, and attributes changed behind the checks of flashx/problem.py."""
    tensors = draw(8, 8, 16)
    inputs = Inputs(*tensors, None, None, None, None)
    checked = Problem.from_tensors(inputs, IntervalMask(), 1.0)
    described = native.with_inputs(checked, inputs)
    out, lse = torch.empty_like(tensors[0]), torch.empty(1, 1, 8)
    for name, value in changes.items():
        setattr(described, name, value)
    return described, [*native.forward_tensors(checked, inputs, out, lse), tensors, out, lse]


@emulated
@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"head_dim": 0}, "head dims of 1..256"),
        ({"head_dim": 257}, "head dims of 1..256"),
        ({"value_dim": 300}, "head dims of 1..256"),
        ({"value_dim": -1}, "sizes of at least 0"),
        ({"q_len": -1}, "sizes of at least 0"),
        ({"batch": -3}, "sizes of at least 0"),
        ({"kv_heads": 0}, "query heads that are a multiple"),
        ({"kv_heads": 2}, "query heads that are a multiple"),
        ({"q_len": 2**31}, r"fewer than 2\*\*31 rows"),
        ({"k_len": 2**40}, r"fewer than 2\*\*31 rows"),
        ({"batch": 2**31}, r"fewer than 2\*\*31 rows"),
        ({"k_len": 2**31 - 1}, r"fewer than 2\*\*31 rows"),
        ({"q_len": 2**62, "q_heads": 4}, r"fewer than 2\*\*31 rows"),  # as packed rows 2**64, or 0
        ({"k_len": 2**27}, "at most 65535 splits"),
        ({"dtype": 3}, "float16, bfloat16 and float32"),
    ],
    ids=str,
)
def test_sizes_that_the_launch_refuses(counted: Any, changes: dict[str, int], rule: str) -> None:
    described, arguments = problem(**changes)
    with pytest.raises(ValueError, match=rule):
        counted.forward(described, *arguments[:5], None, 0, 0, 0, False)
    assert traffic() == {}


@emulated
@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "out"])
def test_addresses_that_the_launch_refuses(counted: Any, which: int) -> None:
    described, arguments = problem()
    address, *strides = arguments[which]
    arguments[which] = (address + 1, *strides)
    with pytest.raises(ValueError, match="multiples of the element size"):
        counted.forward(described, *arguments[:5], None, 0, 0, 0, False)
    assert traffic() == {}


@emulated
def test_faults_name_kernel_and_problem() -> None:
    described, arguments = problem()
    slopes = torch.zeros(2)
    described.set_alibi(slopes.data_ptr() + 2, 0)
    with pytest.raises(_C.cuda_emulated.Fault, match=r"sm80/forward.*<float16, 32> \(batch 1, .*lengths 8 x 8"):
        _C.cuda_emulated.forward(described, *arguments[:5], None, 0, 0, 0, False)


# ---- Determinism


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_from_run_to_run(dtype: torch.dtype, engine: str) -> None:
    case = replace(COMBINED[0], q_len=150, k_len=200)
    first = tolerance.attend(case, case.inputs(dtype), engine)
    for name, tensor in tolerance.attend(case, case.inputs(dtype), engine).items():
        tolerance.same_bits(name, tensor, first[name])
