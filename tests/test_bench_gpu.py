"""The GPU benchmark, as far as a machine without a GPU can test it: plan, clock, comparison, report, refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tolerance
import torch
from torch.nn.attention import SDPBackend

from flashx.bench import gpu
from flashx.bench.cases import CAUSAL, FULL, Dense
from flashx.bench.check import Accuracy
from flashx.bench.implementations import Refused, Torch
from flashx.bench.measure import Row, compared
from flashx.bench.timing import Timing

CASE = Dense(512, 512, window=CAUSAL, dtype="bf16")


def _bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashx.bench.gpu", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_help(tmp_path: Path) -> None:
    done = _bench("--help", cwd=tmp_path)
    assert done.returncode == 0 and "--quick" in done.stdout, done.stderr


def test_refusal_without_a_gpu(tmp_path: Path) -> None:
    done = _bench(cwd=tmp_path)
    assert done.returncode == 2 and "sees no GPU" in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_plan() -> None:
    """Every combination once, each of as many tokens and as wide a model."""
    cases = gpu.plan()
    assert len(cases) == len(set(cases)) == 2 * 3 * 2 * 6 * 2
    for case in cases:
        assert isinstance(case, Dense)
        assert case.batch * case.q_len == 16384 and case.q_heads * case.head_dim == 2048 and case.q_len == case.k_len
    assert {case.window for case in cases} == {FULL, CAUSAL} and {case.direction for case in cases} == {"fwd", "both"}
    assert {case.q_len for case in cases} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {case.dtype for case in cases} == {"fp16", "bf16"}
    quick = gpu.plan(("bf16",), (1024, 8192))
    assert set(quick) < set(cases) and len(quick) == 3 * 2 * 2 * 2


def test_flashx_is_the_cuda_kernels_or_nothing() -> None:
    """On the CPU's tensors: they refuse, and nobody takes over."""
    with pytest.raises(Refused, match="cuda: "):
        gpu.IMPLEMENTATIONS["flashx"].prepare(CASE, CASE.inputs())


def test_torch_is_held_to_one_backend() -> None:
    inputs = CASE.inputs()
    tensors = inputs.leaves.values()
    out = Torch(SDPBackend.MATH).prepare(CASE, inputs)(*tensors)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors), is_causal=True)
    tolerance.compare("math", out, expected, 0.05)
    with pytest.raises(Refused, match=r"No (available|viable)"):
        Torch(SDPBackend.CUDNN_ATTENTION).prepare(CASE, inputs)
    assert {name for name in gpu.IMPLEMENTATIONS if name != "flashx"} == {
        "torch-flash",
        "torch-cudnn",
        "torch-efficient",
        "torch-math",
    }


class FakeCuda:
    """A GPU whose every call takes 2 ms, and a CPU that needs so many cycles of the GPU's to hand it over."""

    def __init__(self, handover: int) -> None:
        self.handover, self.spun, self.log = handover, 0, []

    def _sleep(self, cycles: int) -> None:
        self.spun = cycles
        self.log.append("spin")

    def Event(self, enable_timing: bool) -> FakeCuda.Moment:
        assert enable_timing
        return FakeCuda.Moment(self)

    class Moment:
        def __init__(self, cuda: FakeCuda) -> None:
            self.cuda = cuda

        def record(self) -> None:
            self.cuda.log.append("event")

        def query(self) -> bool:
            return self.cuda.spun < self.cuda.handover

        def synchronize(self) -> None:
            self.cuda.log.append("wait")

        def elapsed_time(self, end: FakeCuda.Moment) -> float:
            return 2.0


@pytest.mark.parametrize("handover, samples", [(0, 1), (gpu.SPIN + 1, 2), (3 * gpu.SPIN, 3), (2**40, 7)])
def test_clock(handover: int, samples: int) -> None:
    """Spin, event, call, event, wait; again with a longer spin if the GPU had to wait for the CPU."""
    cuda = FakeCuda(handover)
    clock = gpu.ColdClock(cuda)
    assert clock(lambda: cuda.log.append("call")) == 0.002
    assert cuda.log == ["spin", "event", "call", "event", "wait"] * samples
    clock(lambda: cuda.log.append("call"))
    assert len(cuda.log) == 5 * (samples + 1), "the spin that was long enough stays"


def _row(name: str, milliseconds: float | None, status: Any = "ok") -> Row:
    timed = None if milliseconds is None else Timing([milliseconds / 1e3] * 3)
    return Row(CASE, name, status, accuracy={"out": Accuracy(1e-3, 2e-3)}, timing=timed)


ROWS = [_row("flashx", 2.0), _row("torch-flash", 3.0), _row("torch-math", 20.0), _row("torch-cudnn", None, "failed")]


def test_results_path() -> None:
    path = gpu.results_path(Path("bench/results"), "NVIDIA H100 80GB HBM3", "abc1234-dirty", date(2025, 3, 7))
    assert path == Path("bench/results/nvidia-h100-80gb-hbm3/2025-03-07-abc1234-dirty.json")
    assert gpu.results_path(Path("x"), "A", None, date(2025, 3, 7)).name == "2025-03-07-unknown.json"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Row], bool], None]:
    """Makes main believe in a GPU that gives the rows."""

    def prepare(rows: list[Row], interrupted: bool) -> None:
        def measured(*_: object) -> Any:
            yield from compared(rows)
            if interrupted:
                raise KeyboardInterrupt

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu, "why_not", lambda: [])
        monkeypatch.setattr(gpu.environment, "gpu_stamp", lambda: {"name": "Some GPU", "driver": "1.2"})
        monkeypatch.setattr(gpu, "_measure", measured)

    return prepare


@pytest.mark.parametrize(
    "rows, interrupted, code",
    [(ROWS, False, 0), (ROWS, True, 130), ([_row("flashx", None, "wrong")], False, 1), (ROWS[1:], False, 0)],
)
def test_a_run(
    rows: list[Row], interrupted: bool, code: int, on_a_gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu(rows, interrupted)
    assert gpu.main(["--out", str(tmp_path), "--commit", "abc", "--repeats", "3"]) == code
    (file,) = tmp_path.glob("some-gpu/*-abc.json")
    document = json.loads(file.read_text())
    assert document["schema"] == 2 and document["interrupted"] is interrupted
    assert document["environment"]["gpu"]["name"] == "Some GPU" and document["environment"]["commit"] == "abc"
    assert document["environment"]["torch"] == torch.__version__ and document["settings"]["repeats"] == 3
    assert [row["implementation"] for row in document["rows"]] == [row.implementation for row in rows]
    for row, written in zip(compared(rows), document["rows"], strict=True):
        assert written["status"] == row.status and written["ratio_to_torch"] == row.ratio_to_torch
        assert written["median"] == (row.timing and row.timing.median)
    printed = capsys.readouterr().out
    assert "Some GPU" in printed and str(file.name) in printed.replace("\n", "")


def test_a_build_without_the_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "why_not", lambda: ["this build has no cuda kernels"])
    assert gpu.main([]) == 2
    assert "this build has no cuda kernels" in capsys.readouterr().err
