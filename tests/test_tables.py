"""Nothing that a table holds makes the CPU kernels read or write outside of the tensors.

Tensors end, or begin, where a page of memory does that nobody may touch: a stray access ends the process that tries
them, a child of the test's. (The CUDA kernels' accesses are checked one by one: test_cuda_variants.py.)
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = mmap.PAGESIZE
EXTREMES = (-(2**31), -(2**30), -129, -17, -2, -1, 0, 1, 2, 3, 15, 16, 17, 64, 65, 1000, 2**30, 2**31 - 1)

_mapped: list[mmap.mmap] = []


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy between two pages of memory that may not be touched, at the end of what may or at the beginning."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    _mapped.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (start, start + PAGE + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), PAGE, 0) == 0
    offset = PAGE + (room - size if at_end else 0)
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset) if size else tensor
    return view.view(tensor.shape).copy_(tensor)


def table(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Half extremes, half small numbers."""
    extremes = torch.tensor(EXTREMES, dtype=torch.int32)
    wild = extremes[torch.randint(len(EXTREMES), shape, generator=generator)]
    tame = torch.randint(0, 40, shape, generator=generator).int()
    return torch.where(torch.rand(shape, generator=generator) < 0.5, wild, tame)


def run(seed: int) -> None:
    """One call of a random kind, forward and, but for pages, backward."""
    from flashx import ops  # noqa: F401

    generator = torch.Generator().manual_seed(seed)
    kind = ("packed", "batched", "members", "pages", "blocks")[seed % 5]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed // 5 % 3]
    at_end = seed // 15 % 2 == 0
    batch, heads, kv_heads, dim, block = 3, 4, 2, (16, 32, 20)[seed % 3], 16

    def draw(*shape: int) -> torch.Tensor:
        return guarded(torch.randn(shape, generator=generator).to(dtype), at_end).requires_grad_(kind != "pages")

    def put(tensor: torch.Tensor) -> torch.Tensor:
        return guarded(tensor, at_end)

    tables: list[torch.Tensor | None] = [None] * 6
    options: list[int] = [int(torch.randint(0, 5, (), generator=generator)), 0, 0, -1, -1]
    rows = 1 if kind == "packed" else batch
    query = draw(rows, heads, 40, dim)
    key_rows, length = rows, 50
    if kind == "members":
        key_rows = 2
        tables[3], tables[4] = put(table(generator, batch)), put(table(generator, key_rows + 1))
    if kind == "pages":
        key_rows, length = 5, 8
        tables[5] = put(table(generator, batch, 6))
    if kind == "blocks":
        tables[0] = put(table(generator, 1, heads, -(-40 // block), -(-length // block)))
        tables[1] = put(table(generator, 3, block, 1))
        options[1:3] = [block, block]
    else:
        tables[2] = put(table(generator, batch, 6))
    key, value = draw(key_rows, kv_heads, length, dim), draw(key_rows, kv_heads, length, dim)
    window = [None if torch.rand((), generator=generator) < 0.5 else 7 for _ in range(2)]
    out, lse = torch.ops.flashx.attention(
        query, key, value, None, None, None, None, *window, 0, 0.3, 0.0, 0.0, "cpu", *tables, *options
    )
    if kind != "pages":
        torch.autograd.grad((out.float().sum(), lse[lse.isfinite()].sum()), (query, key, value))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
@pytest.mark.parametrize("first", [0, 150])
def test_wild_tables(first: int) -> None:
    code = (
        f"import test_tables\nfor seed in range({first}, {first + 150}):\n"
        "    print(seed, flush=True)\n    test_tables.run(seed)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, f"died of {done.returncode} in seed {done.stdout.split()[-1:]}\n{done.stderr[-2000:]}"


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_the_guards_guard() -> None:
    for place in ("guarded(torch.zeros(5), True)[-1:].data_ptr() + 4", "guarded(torch.zeros(5), False).data_ptr() - 4"):
        code = f"import ctypes, torch\nfrom test_tables import guarded\nctypes.c_int.from_address({place}).value"
        assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode < 0
