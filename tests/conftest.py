"""Fixtures: engines (a backend and its instruction set or device) and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tolerance
import torch
from cases import NAN, Bias, Case

import flashx
from flashx import _C
from flashx.backends import cpu

# The CUDA kernels, where this build has them: on the emulator, and on a GPU.
BUILT = flashx.build_info()["backends"]
CUDA_ENGINES = ["cuda"] if "cuda" in BUILT and torch.cuda.is_available() else []
CUDA_ENGINES += ["cuda_emulated"] if "cuda_emulated" in BUILT else []

# Every way to compute attention: a backend, and for the CPU kernels an instruction set. The best one of them first.
ENGINES = [*(f"cpu/{isa}" for isa in _C.cpu_isas()), "reference", *CUDA_ENGINES]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One of ENGINES made the one in use; its value is the backend's name.

    Tests hold their tensors on the CPU. For an engine on another device flashx.attention takes them there and brings
    the results back; float64, which the CUDA kernels lack, skips the test.
    """
    backend, _, isa = request.param.partition("/")
    monkeypatch.setenv("FLASHX_CPU_ISA", isa)
    if backend in CUDA_ENGINES:
        for name in ("attention", "sliding_window_attention", "block_sparse_attention"):
            monkeypatch.setattr(flashx, name, tolerance.without_float64(backend, getattr(flashx, name)))
    cpu.isa.cache_clear()
    yield backend
    cpu.isa.cache_clear()


@pytest.fixture
def poisoned_memory(engine: str) -> Iterator[None]:
    """Outputs and workspaces start as NaN, so that elements nobody writes show.

    torch.empty fills with NaN; the kernels' own memory, kept from call to call, holds what a call on NaN leaves there.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    if engine == "cpu":
        everything = Case(50, 130, 256, heads=2, bias=Bias("qk"), alibi="h", softcap=1.0, sinks=True, dropout_p=0.5)
        tolerance.attend(everything, everything.inputs(torch.float32).map(lambda tensor: NAN * tensor), engine)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a narrow one, which breaks lines of what the benchmark prints."""
    monkeypatch.delenv("COLUMNS", raising=False)
