"""The emulated GPU: each instruction does what the PTX ISA document says, and each kind of bug is caught.

The conformance tests run on a real GPU too, where there is one: expectations come from the document, not from the
emulator. Fragments: an instruction's registers r of lane l, as (row, column) of the matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashx import _C

emulated: Any = getattr(_C, "cuda_emulated", None)
MACHINES = [
    pytest.param("cuda_emulated", marks=pytest.mark.skipif(emulated is None, reason="built without the emulator")),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not hasattr(_C, "cuda") or not torch.cuda.is_available(), reason="built without CUDA, or no GPU"
        ),
    ),
]
on_emulator = pytest.mark.skipif(emulated is None, reason="built without the emulator")

Array = np.ndarray


class Run:
    """run(name, input, output bytes): what the conformance kernel wrote."""

    def __init__(self, machine: str) -> None:
        self.machine = machine

    def __call__(self, name: str, data: Array, out_bytes: int) -> Array:
        source = torch.frombuffer(bytearray(np.ascontiguousarray(data).tobytes()), dtype=torch.uint8).clone()
        out = torch.full((out_bytes,), 0xA5, dtype=torch.uint8)
        if self.machine == "cuda":
            source, out = source.cuda(), out.cuda()
        arguments = [name, source.data_ptr(), source.numel(), out.data_ptr(), out.numel()]
        if self.machine == "cuda":
            arguments += [source.device.index, torch.cuda.current_stream().cuda_stream]
        getattr(_C, self.machine).conformance(*arguments)
        return out.cpu().numpy()


@pytest.fixture(params=MACHINES)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


@pytest.fixture
def emulator() -> Iterator[None]:
    """Restores the emulator's settings, and begins with its counts at zero."""
    emulated.reset_traffic()
    yield
    emulated.set_completion("late")
    emulated.set_race_check(True)
    emulated.set_workers(0)


@pytest.fixture(params=["late", "early"])
def completion(request: pytest.FixtureRequest, emulator: None) -> str:
    emulated.set_completion(request.param)
    return request.param


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- Threads, barriers, shuffles


def test_place(run: Run) -> None:
    out = run("place", np.zeros(2, np.int32), 12 * 64 * 6 * 4).view(np.int32).reshape(2, 3, 2, 64, 6)
    thread = np.arange(64)
    for z, y, x in np.ndindex(2, 3, 2):
        expected = np.stack([thread, thread % 32, thread // 32, *np.broadcast_to([[x], [y], [z]], (3, 64))], axis=1)
        np.testing.assert_array_equal(out[z, y, x], expected)


def test_bar_sync(run: Run) -> None:
    data = rng().integers(0, 2**32, (3, 128), np.uint32)
    np.testing.assert_array_equal(run("bar_sync", data, data.nbytes).view(np.uint32).reshape(3, 128), data[:, ::-1])


def test_bar_sync_with_an_id_and_a_count(run: Run) -> None:
    data = rng().integers(0, 2**31, (3, 2, 64), np.uint32)
    out = run("bar_sync_id", data, data.nbytes).view(np.uint32).reshape(data.shape)
    np.testing.assert_array_equal(out[:, 0], data[:, 0, ::-1] + 1)
    np.testing.assert_array_equal(out[:, 1], data[:, 1, ::-1] + 3)  # mirrored three times


def test_bar_red_or(run: Run) -> None:
    data = np.zeros((4, 128), np.uint32)
    data[1, 37] = 0x80000001
    data[2] = rng().integers(0, 2**32, 128, np.uint32) & rng().integers(0, 2**8, 128, np.uint32)
    data[3] = 0xFFFFFFFF
    out = run("bar_red_or", data, data.nbytes).view(np.uint32).reshape(data.shape)
    np.testing.assert_array_equal(out, np.broadcast_to(np.bitwise_or.reduce(data, axis=1)[:, None], data.shape))


def test_bar_warp_sync(run: Run) -> None:
    data = rng().integers(0, 2**32, (2, 4, 32), np.uint32)
    out = run("bar_warp_sync", data, data.nbytes).view(np.uint32).reshape(data.shape)
    np.testing.assert_array_equal(out, data[:, :, ::-1])


def test_shfl_bfly(run: Run) -> None:
    data = rng().standard_normal((2, 32)).astype(np.float32)
    out = run("shfl_bfly", data, 2 * 32 * 32 * 4).view(np.float32).reshape(2, 32, 32)
    lanes = np.arange(32)
    for mask in range(32):
        np.testing.assert_array_equal(out[:, mask], data[:, lanes ^ mask])


def test_shfl_idx(run: Run) -> None:
    data = rng().integers(0, 2**32, (2, 32), np.uint32)
    out = run("shfl_idx", data, 2 * 32 * 32 * 4).view(np.uint32).reshape(2, 32, 32)
    lanes = np.arange(32)
    for n in range(32):
        np.testing.assert_array_equal(out[:, n], data[:, (lanes * n + n) % 32])


def test_vote_ballot(run: Run) -> None:
    data = rng().integers(0, 2**32, (2, 32), np.uint32)
    out = run("vote_ballot", data, 2 * 32 * 32 * 4).view(np.uint32).reshape(2, 32, 32)
    bits = data[:, None, :] >> np.arange(32, dtype=np.uint32)[:, None] & 1  # round, lane
    want = (bits << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    np.testing.assert_array_equal(out, np.broadcast_to(want[..., None], out.shape))


def test_redux(run: Run) -> None:
    data = rng().integers(-(2**31), 2**31, (3, 32), np.int32)
    data[1] = np.abs(data[1] // 2)
    out = run("redux", data, 3 * 2 * 32 * 4).view(np.int32).reshape(3, 2, 32)
    np.testing.assert_array_equal(out[:, 0], np.broadcast_to(data.min(1)[:, None], data.shape))
    np.testing.assert_array_equal(out[:, 1], np.broadcast_to(data.max(1)[:, None], data.shape))


# ---- Memory


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_global_loads_and_stores(run: Run, size: int) -> None:
    data = rng().integers(0, 256, (3, 32, size), np.uint8)
    out = run(f"global_{size}", data, data.nbytes).reshape(data.shape)
    np.testing.assert_array_equal(out, data[:, ::-1])


@pytest.mark.parametrize("size", [2, 4])
def test_shared_loads_and_stores(run: Run, size: int) -> None:
    data = rng().integers(0, 256, (3, 128, size), np.uint8)
    out = run(f"shared_{size}", data, data.nbytes).reshape(data.shape)
    expected = np.empty_like(data)
    expected[:, np.arange(128) * 5 % 128] = data
    np.testing.assert_array_equal(out, expected)


def test_cp_async_copies_some_bytes_and_zeros_the_rest(run: Run) -> None:
    data = rng().integers(1, 256, (2, 32, 16), np.uint8)
    out = run("cp_async", data, data.nbytes).reshape(data.shape)
    for lane in range(32):
        bytes_ = lane % 17
        np.testing.assert_array_equal(out[:, lane, :bytes_], data[:, lane, :bytes_])
        assert not out[:, lane, bytes_:].any()


def test_cp_async_groups(run: Run) -> None:
    data = rng().integers(0, 256, (2, 4, 128, 16), np.uint8)
    out = run("cp_async_groups", data, data.nbytes).reshape(data.shape)
    np.testing.assert_array_equal(out, data)


# ---- Matrices


@pytest.mark.parametrize("name", ["ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix(run: Run, name: str) -> None:
    """Four 8 x 8 matrices of 16-bit elements, whose rows lie anywhere in shared memory, repeatedly too."""
    memory = rng().integers(0, 2**16, (4, 1024), np.uint16)
    offsets = np.stack(
        [
            np.arange(32) * 16,
            np.arange(32)[::-1] * 64,
            rng().permutation(128)[:32] * 16,
            rng().integers(0, 4, 32) * 16,
        ]
    ).astype(np.uint32)
    data = np.concatenate([memory.view(np.uint8), offsets.view(np.uint8)], axis=1)
    out = run(name, data, 4 * 512).view(np.uint16).reshape(4, 32, 4, 2)
    for block in range(4):
        rows = memory[block][offsets[block][:, None] // 2 + np.arange(8)]
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8]
            if name.endswith("trans"):
                matrix = matrix.T
            for lane in range(32):
                np.testing.assert_array_equal(out[block, lane, m], matrix[lane // 4, [lane % 4 * 2, lane % 4 * 2 + 1]])


# The document's formulas for mma.m16n8k16 (16-bit elements a0..a7, b0..b3) and mma.m16n8k8 (tf32 a0..a3, b0..b1).
def a16(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b16(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def a32(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def b32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + (4 if i == 1 else 0), lane >> 2


def c32(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def fragments(matrices: Array, place: Callable[[int, int], tuple[int, int]], count: int) -> Array:
    """(blocks, rows, columns) to (blocks, lanes, count)."""
    at = np.array([[place(lane, i) for i in range(count)] for lane in range(32)])
    return matrices[:, at[..., 0], at[..., 1]]


def matrices(values: Array, place: Callable[[int, int], tuple[int, int]], rows: int, columns: int) -> Array:
    out = np.empty((len(values), rows, columns), values.dtype)
    for lane in range(32):
        for i in range(values.shape[2]):
            row, column = place(lane, i)
            out[:, row, column] = values[:, lane, i]
    return out


def bfloat16_bits(x: Array) -> Array:
    """Rounded by torch."""
    return torch.from_numpy(np.asarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def multiply(run: Run, name: str, a: Array, b: Array, d: Array) -> tuple[Array, Array, Array]:
    """d + a b by mma, its exact value, and the sum of the magnitudes; a and b rounded to the elements first."""
    blocks = len(a)
    if name == "mma_tf32":
        a, b = (x.astype(np.float32).view(np.uint32) & ~np.uint32(0x1FFF) for x in (a, b))
        # The low 13 bits must not matter: they are set at random.
        noisy = [x | rng().integers(0, 2**13, x.shape, np.uint32) * np.isfinite(x.view(np.float32)) for x in (a, b)]
        words = fragments(noisy[0], a32, 4), fragments(noisy[1], b32, 2)
        a, b = a.view(np.float32), b.view(np.float32)
    else:
        to_bits = bfloat16_bits if name == "mma_bf16" else lambda x: x.astype(np.float16).view(np.uint16)
        a, b = to_bits(a), to_bits(b)
        words = fragments(a, a16, 8).copy().view(np.uint32), fragments(b, b16, 4).copy().view(np.uint32)
        a, b = ((from_bfloat16(x) if name == "mma_bf16" else x.view(np.float16)) for x in (a, b))
    d = d.astype(np.float32)
    parts = [fragments(d, c32, 4).copy().view(np.uint32), *words]
    data = np.concatenate([np.ascontiguousarray(x).reshape(blocks, -1) for x in parts], axis=1)
    out = run(name, data, blocks * 512).view(np.float32).reshape(blocks, 32, 4)
    a, b, d = (x.astype(np.float64) for x in (a, b, d))
    with np.errstate(invalid="ignore"):
        return matrices(out, c32, 16, 8), d + a @ b, abs(d) + abs(a) @ abs(b)


MMAS = ["mma_f16", "mma_bf16", "mma_tf32"]


def depth(name: str) -> int:
    return 8 if name == "mma_tf32" else 16


@pytest.mark.parametrize("name", MMAS)
def test_mma_of_small_integers_is_exact(run: Run, name: str) -> None:
    shape = depth(name)
    a, b = rng().integers(-8, 9, (5, 16, shape)), rng().integers(-9, 8, (5, shape, 8))
    out, expected, _ = multiply(run, name, a, b, rng().integers(-100, 100, (5, 16, 8)))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", MMAS)
def test_mma_rounds_in_float32(run: Run, name: str) -> None:
    # GPUs align the summands before they add them, and drop what falls off the end.
    error = 2.0**-24 if run.machine == "cuda_emulated" else 2.0**-20
    a, b = rng().standard_normal((20, 16, depth(name))), rng().standard_normal((20, depth(name), 8))
    out, expected, magnitudes = multiply(run, name, a, b, rng().standard_normal((20, 16, 8)))
    assert (abs(out - expected) <= error * magnitudes).all()


@pytest.mark.parametrize("name", MMAS)
def test_mma_hands_on_nan_and_inf(run: Run, name: str) -> None:
    a, b, d = np.ones((3, 16, depth(name))), np.ones((3, depth(name), 8)), np.zeros((3, 16, 8))
    a[0, 3, 5] = np.inf
    b[1, 2, 6] = np.nan
    a[2, 1, 1], b[2, 1, 4], d[2, 0, 0] = np.inf, 0, -np.inf
    out, _, _ = multiply(run, name, a, b, d)
    expected = np.full((3, 16, 8), float(depth(name)))
    expected[0, 3] = np.inf
    expected[1, :, 6] = np.nan
    expected[2, :, 4] -= 1
    expected[2, 1] = np.inf
    expected[2, 1, 4] = np.nan
    expected[2, 0, 0] = -np.inf
    np.testing.assert_array_equal(out, expected)


# ---- Numbers

PARTS: list[Array | list[float]] = [
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38],
    # Halves: largest, the tie to inf and its neighbours, denormals and their ties.
    [65504, 65519.996, 65520, -65520, 65536, 6.1035156e-05, 6.1e-05, 5.9604645e-08, 2.9802322e-08, 2.9802326e-08],
    [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-9, 8.940697e-08, 6.0975552e-05],
    rng().standard_normal(1000),
    rng().integers(0, 2**32, 3000, np.uint32).view(np.float32),
]
NUMBERS = np.concatenate([np.asarray(part, np.float32) for part in PARTS])
NUMBERS = np.concatenate([NUMBERS, np.zeros(-len(NUMBERS) % 64, np.float32)])
NUMBERS.view(np.uint32)[np.isnan(NUMBERS)] |= 0x400000  # quiet


def same_numbers(actual: Array, expected: Array) -> None:
    """The same bits, but for those of NaN."""
    nan = np.isnan(expected.astype(np.float32) if expected.dtype == np.float16 else expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = {2: np.uint16, 4: np.uint32}[actual.itemsize]
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def test_ex2(run: Run) -> None:
    x = np.concatenate([NUMBERS, np.linspace(-127, 129, 4096, dtype=np.float32), np.linspace(-2, 2, 4096)])
    x = x.astype(np.float32)
    out = run("ex2", x, x.nbytes).view(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp2(x.astype(np.float64))
        expected = exact.astype(np.float32)
    expected[exact < 2.0**-126] = 0
    np.testing.assert_array_equal(np.isnan(out), np.isnan(x))
    special = ~np.isfinite(expected) | (expected == 0) | np.isnan(x)
    np.testing.assert_array_equal(out[special], expected[special])
    assert out[x == 0].tolist() == [1.0] * (x == 0).sum()
    out, exact = out[~special], exact[~special]
    assert (abs(out - exact) <= 2.0**-22 * exact).all()


def test_cvt_rna_tf32(run: Run) -> None:
    """10 bits of mantissa, ties away from zero."""
    out = run("cvt_tf32", NUMBERS, NUMBERS.nbytes).view(np.float32)
    wide = NUMBERS.astype(np.float64)
    normal = np.isfinite(wide) & (abs(wide) >= 2.0**-126)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        unit = 2.0 ** (np.floor(np.log2(abs(wide))) - 10)
        expected = (np.sign(wide) * np.floor(abs(wide) / unit + 0.5) * unit).astype(np.float32)
    expected[~normal] = NUMBERS[~normal]
    denormal = ~normal & (NUMBERS != 0) & np.isfinite(NUMBERS)
    same_numbers(out[~denormal], expected[~denormal])
    assert (out.view(np.uint32)[np.isfinite(out)] & 0x1FFF == 0).all()


@pytest.mark.parametrize("name", ["cvt_f16x2", "cvt_bf16x2"])
def test_cvt_rn_x2(run: Run, name: str) -> None:
    """Two numbers, nearest, ties to even; the first in the lower half."""
    pairs = np.stack([NUMBERS, np.roll(NUMBERS, 1)], axis=1)
    out = run(name, pairs, pairs.size * 2).view(np.uint16).reshape(pairs.shape)
    if name == "cvt_f16x2":
        with np.errstate(over="ignore", invalid="ignore"):
            same_numbers(out.view(np.float16), pairs.astype(np.float16))
    else:
        same_numbers(from_bfloat16(out), from_bfloat16(bfloat16_bits(pairs)))


@pytest.mark.parametrize("name", ["cvt_f32_f16", "cvt_f32_bf16"])
def test_cvt_f32_of_every_number(run: Run, name: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    out = run(name, bits, 4 * bits.size).view(np.float32)
    with np.errstate(invalid="ignore"):
        same_numbers(out, bits.view(np.float16).astype(np.float32) if name.endswith("_f16") else from_bfloat16(bits))


def test_clz(run: Run) -> None:
    data = np.concatenate([[0, 1, 2**32 - 1], 1 << np.arange(29)]).astype(np.uint32)
    want = [32 - int(x).bit_length() for x in data]
    np.testing.assert_array_equal(run("clz", data, data.nbytes).view(np.int32), want)


@pytest.mark.parametrize("name", ["bits_of", "float_of"])
def test_moves_keep_every_bit(run: Run, name: str) -> None:
    data = np.concatenate([NUMBERS.view(np.uint32), [0x7F800001] * 32]).astype(np.uint32)
    np.testing.assert_array_equal(run(name, data, data.nbytes).view(np.uint32), data)


@on_emulator
def test_every_conformance_kernel_has_its_test() -> None:
    source = Path(__file__).read_text()
    sizes = {f"{kind}_{size}" for kind in ("global", "shared") for size in (1, 2, 4, 8, 16)}
    assert [name for name in emulated.conformance_names() if name not in sizes and f'"{name}"' not in source] == []


@on_emulator
def test_conformance_refuses_wrong_names_and_sizes() -> None:
    data = torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bar_sync takes multiples of 512 bytes and gives 512"):
        emulated.conformance("bar_sync", data.data_ptr(), 512, data.data_ptr(), 1024)
    with pytest.raises(ValueError, match="no conformance kernel is called nonsense"):
        emulated.conformance("nonsense", data.data_ptr(), 512, data.data_ptr(), 512)


# ---- Bugs. What is found of each: a fault, as a pattern of its message, or a wrong result.

WRONG = "wrong"
RACE = r"race at shared address \d+: "
BUGS = {
    "product/none": None,
    "product/packed": None,
    "product/missing_wait": r"ldmatrix at shared address \d+: a cp\.async into it by .* is under way",
    "product/missing_commit": r"ldmatrix at shared address \d+: a cp\.async into it by .* is under way",
    "product/missing_barrier": RACE + r"ldmatrix by warp \d and cp\.async by thread \d+ \(warp",
    "product/missing_last_barrier": RACE + r"cp\.async by thread \d+ \(.*\) and ldmatrix by warp",
    "product/store_over_tile": RACE + r"(st\.shared by .* and ldmatrix by warp 0|ldmatrix by warp 0 and st\.shared by)",
    "product/wrong_swizzle": WRONG,
    "product/no_swizzle": None,
    "product/tile_off_by_one": r"cp\.async of 16 bytes at 0x[0-9a-f]+: it ends 16 bytes past b \(8192 bytes at 0x",
    "product/misaligned": r"misaligned cp\.async from global address 0x[0-9a-f]+8$",
    "product/divergent_barrier": r"race at|divergent barrier",
    "product/divergent_mma": r"thread 37 \(.*\): divergent warp: at ldmatrix, but lanes 0-4, 30 at mma\.f16",
    "product/divergent_warp": r"divergent warp: at (shfl\.sync\.bfly, but lane.* at mma\.f16|mma\.f16, but .* at shfl)",
    "product/lane_exit": r"thread \d+ \(warp 2, lane \d+\): (divergent|race)",
    "transpose/none": None,
    "transpose/missing_barrier": RACE + r"ld\.shared by thread \d+ \(.*\) and st\.shared by thread",
    "transpose/missing_last_barrier": RACE + r"ld\.shared by thread \d+ .* and st\.shared by thread",
    "transpose/missing_warp_sync": RACE + r"st\.shared by thread \d+ .* and ld\.shared by thread",
    "transpose/shuffle_for_barrier": RACE + r"st\.shared by thread \d+ .* and ld\.shared by warp \d",
    "transpose/barrier_of_half": RACE + r"(st\.shared .* and ld\.shared|ld\.shared .* and st)",
    "transpose/barrier_too_wide": r"deadlock; warp 0: lanes 0-31 at barrier\.sync 1 \(96 threads\); warp 1: ",
    "transpose/mixed_barriers": r"divergent barrier: .* \(128 threads\), while others wait at .* \(128 threads\)",
    "transpose/early_exit": r"divergent barrier: (exits while 96 threads wait at|waits at .* after 32 threads)",
    "transpose/divergent_barrier": RACE + r"ld\.shared by thread .* \(warp 2",
    "transpose/tile_off_by_one": r"ld\.global of 4 bytes at 0x[0-9a-f]+: it ends 4 bytes past in \(8192 bytes",
    "transpose/shared_out_of_bounds": r"st\.shared of 4 bytes at shared address 5756, outside .* \[1024, 5756\)",
    "transpose/missing_shared_base": r"st\.shared of 4 bytes at shared address \d+, outside .* \[1024, 5760\)",
    "transpose/misaligned": r"misaligned st\.shared of 4 bytes at shared address \d+$",
    "transpose/unwritten": WRONG,
    "transpose/read_only": r"st\.global of 4 bytes at 0x[0-9a-f]+: in \(8192 bytes at 0x[0-9a-f]+\) is read-only",
}


def seeded(name: str) -> tuple[Array, Array]:
    """What the kernel gave, and what it should have given; numbers small enough to be exact."""
    if name.startswith("product"):
        data = rng().integers(-4, 5, (160, 128)).astype(np.float16)
        expected = data[:128].astype(np.float32) @ data[128:].astype(np.float32).T
    else:
        data = rng().integers(-999, 999, (2, 32, 32)).astype(np.float32)
        expected = data.transpose(0, 2, 1)
        expected = expected + expected[:, :, ::-1]
    source, out = torch.from_numpy(data).clone(), torch.full(expected.shape, torch.nan)
    emulated.seeded_bug(name, source.data_ptr(), data.nbytes, out.data_ptr(), expected.nbytes)
    return out.numpy(), expected


@on_emulator
def test_every_bug_has_its_case() -> None:
    assert sorted(BUGS) == sorted(emulated.seeded_bug_names())


@on_emulator
@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_caught(name: str, completion: str) -> None:
    expectation = BUGS[name]
    if expectation is None:
        np.testing.assert_array_equal(*seeded(name))
    elif expectation == WRONG:
        actual, expected = seeded(name)
        assert not (actual == expected).all()
    else:
        with pytest.raises(emulated.Fault, match=expectation) as fault:
            seeded(name)
        thread = r", thread (\d+) \(warp (\d+), lane (\d+)\)" if "deadlock" not in expectation else ""
        place = re.match(rf"{name}: block \([01], 0, 0\){thread}: ", str(fault.value))
        assert place, str(fault.value)
        if thread:
            assert int(place[1]) == 32 * int(place[2]) + int(place[3])


@on_emulator
def test_shared_memory_starts_as_nan(completion: str) -> None:
    """Row 7 is not written, and each output is the sum of two mirrored ones."""
    for _ in range(2):
        actual, expected = seeded("transpose/unwritten")
        nan = np.zeros_like(expected, bool)
        nan[:, :, [7, 31 - 7]] = True
        np.testing.assert_array_equal(np.isnan(actual), nan)
        np.testing.assert_array_equal(actual[~nan], expected[~nan])
        seeded("product/none")  # leaves numbers behind


# Without the race check, what the machine does with them: (late, early), each a fault or a wrong result (True), or the
# right one by luck (False).
UNCHECKED = {
    "product/none": (False, False),
    "product/missing_wait": (True, False),
    "product/missing_commit": (True, False),
    "product/missing_barrier": (True, True),
    "product/missing_last_barrier": (False, True),
    "product/divergent_barrier": (True, True),
    "product/lane_exit": (True, True),
    "transpose/none": (False, False),
    "transpose/missing_barrier": (True, True),
    "transpose/missing_last_barrier": (True, True),
    "transpose/missing_warp_sync": (True, True),
    "transpose/barrier_of_half": (True, True),
    "transpose/divergent_barrier": (True, True),
}


@on_emulator
@pytest.mark.parametrize("name", UNCHECKED)
def test_late_and_early_completion_show_bugs_of_their_own(name: str, completion: str) -> None:
    emulated.set_race_check(False)
    try:
        actual, expected = seeded(name)
        wrong = not (actual == expected).all()
    except emulated.Fault:
        wrong = True
    assert wrong == UNCHECKED[name][completion == "early"]


@on_emulator
def test_warps_run_in_ascending_or_descending_order(completion: str) -> None:
    with pytest.raises(emulated.Fault, match="thread 0 " if completion == "late" else "thread 96 "):
        seeded("transpose/misaligned")


@on_emulator
def test_faults_and_results_do_not_depend_on_the_workers(emulator: None) -> None:
    faults, results = [], []
    for workers in (1, 2, 3) * 4:
        emulated.set_workers(workers)
        results.append(seeded("product/none")[0])
        # Both blocks have it: the first is named.
        with pytest.raises(emulated.Fault, match=r"block \(0, 0, 0\)") as fault:
            seeded("product/missing_wait")
        faults.append(str(fault.value))
    assert len(set(faults)) == 1
    np.testing.assert_array_equal(results, [results[0]] * 12)


@on_emulator
def test_a_fault_leaves_the_machine_usable(completion: str) -> None:
    for _ in range(3):
        for name in ("product/missing_wait", "transpose/barrier_too_wide", "product/lane_exit"):
            with pytest.raises(emulated.Fault):
                seeded(name)
        np.testing.assert_array_equal(*seeded("product/none"))


# ---- Counts


@on_emulator
def test_bytes_and_instructions_are_counted(completion: str) -> None:
    for launches in (1, 2):
        seeded("product/none")
        traffic = {name: (read, written) for name, read, written in emulated.traffic()}
        assert traffic == {
            "a": (launches * 2 * 64 * 128 * 2, 0),
            "b": (launches * 2 * 32 * 128 * 2, 0),  # by each block
            "out": (0, launches * 128 * 32 * 4),
        }
        warps, tiles = 2 * 4 * launches, 4
        assert emulated.counters() == {
            "launches": launches,
            "blocks": 2 * launches,
            "mma": warps * tiles * 2 * 4,
            "ldmatrix": warps * tiles * 2 * 3,
            "ldmatrix_conflicts": 0,
            "cp_async": 2 * launches * tiles * (64 + 32) * 4,
            "barriers": 2 * launches * tiles * 2,
        }
    emulated.reset_traffic()
    assert emulated.traffic() == [] and not any(emulated.counters().values())


@on_emulator
def test_of_overlapping_buffers_the_first_counts(emulator: None) -> None:
    seeded("product/packed")
    assert emulated.traffic() == [("out", 0, 128 * 32 * 4), ("a", 2 * (64 + 32) * 128 * 2, 0), ("b", 0, 0)]


@on_emulator
def test_partial_copies_count_what_they_read(emulator: None) -> None:
    data, out = torch.zeros(512, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    emulated.conformance("cp_async", data.data_ptr(), 512, out.data_ptr(), 512)
    assert emulated.traffic() == [("in", sum(lane % 17 for lane in range(32)), 0), ("out", 0, 512)]


@on_emulator
def test_bank_conflicts_of_ldmatrix_are_counted(emulator: None) -> None:
    """Rows of 64 bytes, unswizzled: of eight rows, four share a bank each, three wavefronts too many."""
    seeded("product/no_swizzle")
    counters = emulated.counters()
    assert counters["ldmatrix_conflicts"] == counters["ldmatrix"] * 4 * 3


@on_emulator
def test_equal_addresses_are_no_bank_conflict(emulator: None) -> None:
    data, out = np.zeros((2, 2048 + 128), np.uint8), torch.empty(1024, dtype=torch.uint8)
    data[1, 2048:] = np.array([0, 128] * 16, np.uint32).view(np.uint8)  # two rows of the same bank, by turns
    emulated.conformance("ldmatrix_x4", data.ctypes.data, data.nbytes, out.data_ptr(), 1024)
    assert emulated.counters()["ldmatrix_conflicts"] == 4


@on_emulator
def test_settings_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="late"):
        emulated.set_completion("sometimes")
    assert issubclass(emulated.Fault, RuntimeError)
