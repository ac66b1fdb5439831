"""flashx.dispatch and flashx.explain: the first backend without a reason against a problem runs it, and says so."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, Case
from conftest import BUILT

import flashx
from flashx import _C, dispatch
from flashx.backends import cpu, cuda, native, reference
from flashx.masks import IntervalMask
from flashx.problem import Problem

WIDE = torch.randn(1, 1, 3, 300)


def test_order() -> None:
    """Fast ones first, then the reference, which takes everything; what must be named comes last."""
    assert list(dispatch.BACKENDS) == ["cuda", "cpu", "triton", "reference", "cuda_emulated"]
    assert [name for name, backend in dispatch.BACKENDS.items() if not backend.AUTOMATIC] == ["cuda_emulated"]
    assert dispatch.BACKENDS["cpu"] is cpu and dispatch.BACKENDS["reference"] is reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_kernels_take_every_case(case: Case) -> None:
    explanation = flashx.explain(case.attention(), **case.inputs(torch.float32).arguments(), **case.options())
    assert explanation.backend == "cpu" and explanation.refusals["cpu"] == explanation.refusals["reference"] == []
    assert explanation.refusals["cuda"][-1] == "tensors are on cpu, not on cuda"


@pytest.mark.skipif("cuda_emulated" not in BUILT, reason="this build has no emulator")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cuda_kernels_take_every_case(case: Case) -> None:
    arguments = case.inputs(torch.bfloat16).arguments()
    explanation = flashx.explain(case.attention(), **arguments, **case.options(), backend="cuda_emulated")
    assert explanation.backend == "cuda_emulated"


def test_explanation(engine: str) -> None:
    query = torch.randn(1, 2, 3, 4, device="cuda" if engine == "cuda" else "cpu")
    explanation = flashx.explain(query, query, query, backend=engine)
    assert explanation.backend == engine
    kernel = {"cpu": f"cpu/{cpu.isa()}", "reference": "reference/naive"}.get(engine, f"{engine}/sm80")
    assert explanation.kernel == kernel
    lines = str(explanation).splitlines()
    assert lines[:2] == [f"problem: {explanation.problem}", f"runs on: {kernel}"]
    other = "cpu" if engine == "reference" and query.device.type == "cpu" else "reference"
    assert f"  {engine}: chosen" in lines and (engine == other or f"  {other}: could run" in lines)


def test_explanation_of_a_refusal() -> None:
    alone = flashx.explain(WIDE, WIDE, WIDE, backend="cpu")
    assert alone.backend is None and alone.kernel is None and "runs on: nothing" in str(alone)
    assert alone.refusals["cpu"] == ["head dim 300 is over 256", "value dim 300 is over 256"]
    assert "  cpu: head dim 300 is over 256; value dim 300 is over 256" in str(alone)


def test_explain_runs_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    query = torch.full((1, 2, 3, 4), float("nan"))
    flashx.explain(query, query, query, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reference_is_never_chosen_silently() -> None:
    with pytest.warns(UserWarning, match="head dim 300 is over 256") as warned:
        out = flashx.attention(WIDE, WIDE, WIDE)
    assert "cuda" not in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = flashx.attention(WIDE, WIDE, WIDE, backend="reference")
    assert torch.equal(out, asked)


def test_the_emulator_runs_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = flashx.explain(*[torch.randn(1, 2, 3, 4)] * 3).problem
    for module in (cpu, reference):
        monkeypatch.setattr(module, "why_not", lambda problem: ["not today"])
    monkeypatch.setattr(cuda.Cuda, "why_not", lambda self, problem: [] if self.NAME == "cuda_emulated" else ["neither"])
    assert dispatch.choose(problem, "cuda_emulated").NAME == "cuda_emulated"
    with pytest.raises(flashx.UnsupportedError) as raised:
        dispatch.choose(problem)
    assert "neither" in str(raised.value) and "cuda_emulated" not in str(raised.value)


# The CUDA backends, with a machine that writes down what it is told.


class Recorder:
    """In place of _C.cuda."""

    def __init__(self, workspace: int = 0) -> None:
        self.workspace, self.calls = workspace, []

    def forward_workspace(self, problem: _C.Problem) -> int:
        return self.workspace

    def forward(self, *arguments: object) -> None:
        self.calls.append(arguments)

    def backward(self, *arguments: object) -> None:
        self.calls.append(arguments)


PROBLEM = Problem(
    batch=1, q_heads=2, kv_heads=2, q_len=3, k_len=5, head_dim=8, value_dim=8,
    dtype=torch.float32, device="cuda", mask=IntervalMask(), scale=1.0,
)  # fmt: skip


def test_refusals_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(PROBLEM, device="cpu")
    for name, setting in (("cuda", "FLASHX_CUDA=1"), ("cuda_emulated", "FLASHX_EMULATOR=1")):
        absent = cuda.Cuda(name, "cpu", False, None, setting)
        assert absent.why_not(here) == [f"this build has no {name} kernels: set {setting} and build again"]
    built = cuda.Cuda("cuda", "cuda", True, Recorder(), "")
    assert built.why_not(here) == ["tensors are on cpu, not on cuda"]
    emulated = cuda.Cuda("cuda_emulated", "cpu", False, Recorder(), "")
    assert emulated.why_not(here) == []
    assert emulated.why_not(PROBLEM) == ["tensors are on cuda, not on cpu"]
    assert emulated.why_not(replace(here, dtype=torch.float64)) == ["the CUDA kernels have no float64"]
    assert emulated.why_not(replace(here, head_dim=257)) == ["head dim 257 is over 256"]
    assert emulated.why_not(replace(here, value_dim=300)) == ["value dim 300 is over 256"]


@pytest.mark.parametrize(
    "capability, reasons",
    [
        ((9, 0), []),
        ((8, 9), []),
        ((12, 1), []),
        ((13, 0), []),
        ((7, 5), ["the GPU has compute capability 7.5, this build is for 80, 90, 120+PTX"]),
        ((11, 0), ["the GPU has compute capability 11.0, this build is for 80, 90, 120+PTX"]),
    ],
)
def test_a_gpu_that_the_build_does_not_cover(
    capability: tuple[int, int], reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {3: capability}.__getitem__)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_archs": ["80", "90", "120+PTX"]})
    cuda._uncovered.cache_clear()
    try:
        assert cuda.Cuda("cuda", "cuda", True, Recorder(), "").why_not(PROBLEM) == reasons
    finally:
        cuda._uncovered.cache_clear()


def test_machine_code_runs_on_its_major_version_and_ptx_on_everything_newer() -> None:
    assert cuda.covers(["86"], (8, 6)) and cuda.covers(["86"], (8, 9)) and not cuda.covers(["86"], (8, 0))
    assert not cuda.covers(["80"], (9, 0)) and cuda.covers(["80+PTX"], (9, 0)) and not cuda.covers(["90+PTX"], (8, 9))
    assert cuda.covers(["100"], (10, 3)) and not cuda.covers([], (8, 0))


@pytest.mark.parametrize("size", [0, 96])
@pytest.mark.parametrize("tf32", [False, True])
def test_what_the_cuda_kernels_are_told(size: int, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Recorder(size)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda_emulated", cuda.Cuda("cuda_emulated", "cpu", False, machine, ""))
    monkeypatch.setattr(native, "tf32", lambda: tf32)
    query, key, value = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, requires_grad=True)
    out = flashx.attention(query, key, value, sinks=sinks, backend="cuda_emulated")
    out.sum().backward()
    (problem, *forward), (_, *backward) = machine.calls
    assert (problem.q_len, problem.k_len, problem.head_dim) == (3, 3, 8)
    assert [view[0] for view in forward[:4]] == [tensor.data_ptr() for tensor in (query, key, value, out)]
    assert forward[:4] == backward[:4] and forward[4] == backward[4]
    carry, device, stream, workspace, asked = forward[5:]
    assert carry is None and backward[-4] is False
    assert (device, stream, asked) == (0, 0, tf32) and bool(workspace) == bool(size) and workspace % 16 == 0
    assert backward[-3:] == [0, 0, tf32]
    assert len(forward) == 10 and len(backward) == 16


def test_tf32_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    assert native.tf32()
    for precision, tf32 in (("tf32", True), ("ieee", False), ("none", False)):
        # Reading allow_tf32 would raise where fp32_precision was set: it is absent here.
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        assert native.tf32() is tf32


def test_forced_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for isa in _C.cpu_isas():
            monkeypatch.setenv("FLASHX_CPU_ISA", isa)
            cpu.isa.cache_clear()
            assert cpu.isa() == isa
        for unset in ("", None):
            if unset is None:
                monkeypatch.delenv("FLASHX_CPU_ISA")
            else:
                monkeypatch.setenv("FLASHX_CPU_ISA", unset)
            cpu.isa.cache_clear()
            assert cpu.isa() == _C.cpu_isas()[0]
        monkeypatch.setenv("FLASHX_CPU_ISA", "mmx")
        cpu.isa.cache_clear()
        with pytest.raises(ValueError, match=r"FLASHX_CPU_ISA must be one of .*plain.* got 'mmx'"):
            flashx.attention(WIDE[..., :8], WIDE[..., :8], WIDE[..., :8])
    finally:
        monkeypatch.undo()
        cpu.isa.cache_clear()


def test_plain_is_everywhere() -> None:
    assert _C.cpu_isas()[-1] == "plain"


def test_problems_of_one_call_run_on_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """States go from level to level in a backend's own units: the first backend that takes them all runs them all."""
    prefix, suffix = torch.randn(2, 4000, 16), torch.randn(4, 2, 8, 16)
    arguments = suffix, prefix, prefix, suffix, suffix
    expected = flashx.shared_prefix_attention(*arguments, backend="reference")
    takes = cpu.why_not
    monkeypatch.setattr(cpu, "why_not", lambda problem: ["no groups today"] if problem.groups else takes(problem))
    with pytest.warns(UserWarning, match="naive attention.*no groups today"):
        out = flashx.shared_prefix_attention(*arguments)
    torch.testing.assert_close(out, expected)
    with pytest.raises(flashx.UnsupportedError, match="cpu: no groups today"):
        flashx.shared_prefix_attention(*arguments, backend="cpu")
