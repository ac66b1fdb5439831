"""Every Triton kernel, compiled without a GPU for the architectures that flashx is for; test_triton.py runs this file.

What a compiler alone can tell: the kernels fit shared memory, they use tensor cores, and their loops hold in registers
what they work on.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from flashx.masks import IntervalMask  # noqa: E402
from flashx.problem import Carry, Gradients, Inputs, Problem  # noqa: E402
from flashx.triton_impl import launch, tuning  # noqa: E402


@dataclass(frozen=True)
class Arch:
    shared: int  # bytes of shared memory that a program can have
    products: str  # the tensor cores' instruction in PTX


ARCHS = {
    80: Arch(163 * 1024, "mma.sync"),
    90: Arch(227 * 1024, "wgmma.mma_async"),
    100: Arch(227 * 1024, "tcgen05.mma"),
    120: Arch(99 * 1024, "mma.sync"),
}
# Instructions for each access to local memory that is let pass in a loop: ptxas parks a few seldom used values.
INSTRUCTIONS_PER_LOCAL = 64

EVERYTHING = {"bias": torch.float32, "alibi": True, "softcap": 30.0, "sinks": True}
WINDOW = IntervalMask(left=200, right=0, first=4)
# What Problem's fields are; "state" has a call go on from one, or leave one, too, "window2" makes it 2-simplicial.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "general": EVERYTHING,
    "dropout": {"dropout_p": 0.1},
    "sink tokens": {"mask": WINDOW},
    "blocks": {"block": (64, 64)},
    "small blocks": {"block": (16, 48), "mask": WINDOW},
    "packed": {"ragged": True, "packed": True},
    "members": {"ragged": True, "groups": 3, "mask": WINDOW, "state": "suspended"},
    "suffixes": {"ragged": True, "block": (32, 32), "sinks": True, "state": "finished"},
    "decoding": {"ragged": True, "q_len": 1, "k_len": 5000, "unified_max": 3.0},
    "prefill": {"ragged": True, "k_len": 5000, "page": 16, "unified_max": 3.0},
    "pages": {"ragged": True, "q_len": 1, "k_len": 5000, "page": 16},
    "pairs": {"mask": IntervalMask(left=200, right=0), "window2": 32},
}


@dataclass(frozen=True)
class Compiled:
    name: str
    rows: int  # M
    shared: int
    ptx: str
    cubin: bytes


class _Machine:
    """Stands in for a GPU: as much of a driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """compiled(arch, problem, state, window2): the kernels that the problem's forward and backward would start there;
    with window2 those of 2-simplicial attention."""
    before = driver._active

    def compile_for(
        arch: int, problem: Problem, state: str | None = None, window2: int | None = None
    ) -> list[Compiled]:
        kernels = []

        def run(kernel: Any, grid: tuple[int, int], tile: Any, *arguments: Any) -> None:
            options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
            code = kernel.run(*arguments, grid=grid, warmup=True, **options)
            kernels.append(
                Compiled(kernel.__name__, tile.rows, code.metadata.shared, code.asm["ptx"], code.asm["cubin"])
            )

        def tiles(capability: tuple[int, int], *of: Any) -> Any:
            return tuning.tiles((arch // 10, arch % 10), *of)

        def simplicial_tiles(capability: tuple[int, int] | None, *of: Any) -> Any:
            return tuning.simplicial_tiles((arch // 10, arch % 10), *of)

        driver.set_active(_Machine(arch))
        monkeypatch.setattr(launch, "run", run)
        monkeypatch.setattr(launch, "tiles", tiles)
        monkeypatch.setattr(launch, "simplicial_tiles", simplicial_tiles)
        inputs = tensors(problem)
        query, key, value = inputs[:3]
        out, lse = query.new_empty(*query.shape[:3], problem.value_dim), torch.empty(query.shape[:3])
        if window2 is not None:
            second = launch.Second(key, value, window2)
            launch.simplicial_forward(problem, inputs, second, out, lse, False)
            gradients = (query, key, value, key, value)
            launch.simplicial_backward(problem, inputs, second, out, lse, out, lse, lse, gradients, False)
            return kernels
        carry = None if state is None else Carry(lse, lse, torch.empty(out.shape), state == "suspended")
        launch.forward(problem, inputs, out, lse, carry, False)
        if problem.page is None and problem.q_len > 1:
            grad_bias = inputs.bias if inputs.bias is not None and inputs.bias.is_floating_point() else None
            grad_query = torch.empty(query.shape) if carry is not None else query
            sums = Gradients(grad_query, key, value, grad_bias, None, carry is not None)
            launch.backward(problem, inputs, out, lse, out, lse, lse, sums, False)
        return kernels

    yield compile_for
    driver._active = before


def problem(dim: int, dtype: torch.dtype, **features: Any) -> Problem:
    """A causal problem with grouped heads and lengths that are no tile's."""
    sizes: dict[str, Any] = {"q_len": 500, "k_len": 500, "value_dim": dim, "mask": IntervalMask(right=0)} | features
    rows = {} if "ragged" not in sizes else {"q_rows": sizes["q_len"], "k_rows": sizes["k_len"]}
    return Problem(2, 4, 2, head_dim=dim, dtype=dtype, device="cpu", scale=dim**-0.5, **sizes, **rows)


def tensors(problem: Problem) -> Inputs:
    """Tensors of the problem's sizes, whatever they hold."""
    keys = (problem.batch if problem.groups is None else problem.groups, problem.kv_heads, problem.k_len)
    if problem.page is not None:
        keys = (problem.k_len // problem.page, problem.kv_heads, problem.page)
    entries = 1 if problem.packed else problem.batch
    per_head = torch.empty(problem.q_heads)
    bias = block_map = block_bits = None
    if problem.bias is not None:
        bias = torch.empty(problem.q_len, problem.k_len, dtype=problem.bias)
    if problem.block is not None:
        rows, columns = problem.block
        block_map = torch.empty(1, problem.q_heads, -(-problem.q_len // rows), -(-problem.k_len // columns))
        block_map, block_bits = block_map.int(), torch.empty(5, rows, -(-columns // 32), dtype=torch.int32)

    def table(*sizes: int, given: bool = True) -> torch.Tensor | None:
        return torch.empty(sizes, dtype=torch.int32) if given else None

    shared = problem.groups is not None
    return Inputs(
        torch.empty(entries, problem.q_heads, problem.q_len, problem.head_dim, dtype=problem.dtype),
        torch.empty(*keys, problem.head_dim, dtype=problem.dtype),
        torch.empty(*keys, problem.value_dim, dtype=problem.dtype),
        bias, per_head if problem.alibi else None, per_head if problem.sinks else None,
        torch.tensor(5) if problem.dropout_p else None, block_map, block_bits,
        table(problem.batch, 6, given=problem.ragged), table(problem.batch, given=shared),
        table((problem.groups or 0) + 1, given=shared), table(problem.batch, 9, given=problem.page is not None),
    )  # fmt: skip


def compile_features(compiled: Any, arch: int, dim: int, dtype: torch.dtype, features: dict[str, Any]) -> Any:
    features = dict(features)
    state, window2 = features.pop("state", None), features.pop("window2", None)
    return compiled(arch, problem(dim, dtype, **features), state, window2)


def local_accesses(cubin: bytes, folder: Path, depth: int, pieces: bool = False) -> list[tuple[int, int]]:
    """Accesses to local memory and instructions of each of the loops around tensor-core instructions.

    Those that lie in more than ``depth`` others are left out: the loop over passes is one more, and they follow only
    where NaN or inf were met. With ``pieces`` a loop over tiles has loops over pieces of the head dim in it.
    """
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([str(cuobjdump), "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    products = [at for at, line in code if re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)", line)]
    local = [at for at, line in code if re.search(r"\b(LDL|STL)\b", line)]
    branches = [(at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)) for at, line in code]
    loops = {(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) <= at}
    loops = {(begin, end) for begin, end in loops if any(begin <= at <= end for at in products)}

    def around(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] <= other[0] and other[1] <= one[1]

    innermost = [loop for loop in loops if not any(around(loop, other) for other in loops)]
    if pieces:
        nests = [[other for other in loops if around(other, loop)] for loop in innermost]
        # Where a loop over pieces is unrolled, none is left.
        innermost = list(
            {min(nest or [loop], key=lambda one: one[1] - one[0]) for loop, nest in zip(innermost, nests, strict=True)}
        )
    innermost = [loop for loop in innermost if sum(around(other, loop) for other in loops) <= depth]
    assert innermost
    every = [at for at, _ in code]
    return [tuple(sum(begin <= at <= end for at in of) for of in (local, every)) for begin, end in innermost]


def _in_ci(features: str, dim: int, arch: int) -> bool:
    """Plain and 2-simplicial kernels on every architecture; of each other feature one, the next one's on the next."""
    everywhere = features in ("plain", "pairs")
    return dim == 64 and (everywhere or list(ARCHS).index(arch) == list(FEATURES).index(features) % len(ARCHS))


CASES = [
    pytest.param(arch, dim, features, marks=[] if _in_ci(features, dim, arch) else pytest.mark.slow)
    for features in FEATURES
    for dim in (64, 128)
    for arch in ARCHS
]
# A dot of fewer rows than this is no wgmma and no tcgen05.
FEWEST_ROWS = 64
OF_FEW_ROWS = ("forward_kernel", "simplicial_grad_second_kernel")


def check_loops(kernel: Compiled, features: dict[str, Any], folder: Path, pieces: bool = False) -> None:
    """The loops over tiles hold in registers what they work on."""
    depth = 3 if kernel.name == "grad_bias_kernel" else int("block" in features)
    if "window2" in features:  # around those of the rows that own their pairs is one over their second keys
        depth = int(kernel.name != "simplicial_grad_key_value_kernel")
    for local, instructions in local_accesses(kernel.cubin, folder, depth, pieces):
        assert local <= instructions // INSTRUCTIONS_PER_LOCAL, f"{kernel.name}: {local} of {instructions}"


@pytest.mark.parametrize("arch, dim, features", CASES)
def test_default_dims(arch: int, dim: int, features: str, compiled: Any, tmp_path: Path) -> None:
    for kernel in compile_features(compiled, arch, dim, torch.float16, FEATURES[features]):
        assert kernel.shared <= ARCHS[arch].shared, kernel.name
        if kernel.name in ("delta_kernel", "combine_kernel"):
            continue
        few = kernel.name in OF_FEW_ROWS and kernel.rows < FEWEST_ROWS
        assert ("mma.sync" if few else ARCHS[arch].products) in kernel.ptx, kernel.name
        check_loops(kernel, FEATURES[features], tmp_path)


OTHERS: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    "bfloat16": (80, 64, torch.bfloat16, {}),
    "float32": (80, 64, torch.float32, {}),
    "odd dims": (80, 40, torch.bfloat16, {"value_dim": 17, "bias": torch.bool}),
    **{
        f"{dtype} {dim} {features} {arch}".removeprefix("torch."): (arch, dim, dtype, FEATURES[features])
        for dtype in (torch.float32, torch.bfloat16)
        for dim in (16, 128, 256)
        for features in FEATURES
        for arch in ARCHS
        if (dtype, dim, features) != (torch.float32, 256, "pairs")  # which no fused kernel takes
    },
}


@pytest.mark.parametrize(
    "name", [name if index < 3 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(OTHERS)]
)
def test_other_kernels_fit(name: str, compiled: Any, tmp_path: Path) -> None:
    arch, dim, dtype, features = OTHERS[name]
    for kernel in compile_features(compiled, arch, dim, dtype, features):
        assert kernel.shared <= ARCHS[arch].shared, kernel.name
        if dtype == torch.float32 and kernel.name not in ("delta_kernel", "combine_kernel"):
            check_loops(kernel, features, tmp_path, pieces=dim > 128)
