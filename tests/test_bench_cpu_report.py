"""flashx-bench cpu-report: that it measures what it says, checks first, and says so when something is off."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flashx
from flashx import _C
from flashx.backends import cpu
from flashx.bench import cpu_measure, cpu_report, cpu_rows
from flashx.bench.cpu_measure import Measure, Probes, Row, Setting, Workload, measured
from flashx.bench.cpu_oracle import Accuracy, Oracle, Sample, dense_samples
from flashx.bench.timing import Timing

QUICK = ["--quick", "--repeats", "2"]
# Each kind of row once.
KINDS = [
    "forward fp32 D64 causal",
    "forward bf16 D128 full",
    "forward+backward fp32 D64 causal",
    "decode bf16 B1",
    "short fp32 N16 B8",
    "call overhead N1",
    "window fp32",
    "block-sparse bf16",
    "neighborhood fp32",
    "shared prefix bf16",
    "varlen fp32",
    "threads ragged fp32",
]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(quick=True, repeats=2, probes=Probes(quick=True))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def slightly_off(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *tensors, **options: 1.01 * attend(*tensors, **options)


# Rows


@pytest.mark.parametrize("name", KINDS)
def test_rows(name: str, setting: Setting) -> None:
    row = measured(name, cpu_rows.plan()[name], setting)
    assert row.status == "ok", row.reasons
    assert row.measures and all(math.isfinite(it.value) and it.value > 0 for it in row.measures)
    assert any(it.met is not None for it in row.measures)
    assert row.accuracy["flashx"] and all(it.ok for found in row.accuracy.values() for it in found.values())
    assert all(len(timing.samples) >= 2 for timing in row.timings.values())
    for peer, accuracy in row.accuracy.items():
        factor = 1 if peer.startswith("flashx") else cpu_measure.PEER_FACTOR
        for name, found in accuracy.items():
            assert found.budget == factor * row.accuracy["flashx"][name].budget > 0


def test_the_plan_has_every_target() -> None:
    names = cpu_rows.plan()
    assert set(KINDS) < set(names)
    for dtype, count in (("fp32", 8), ("bf16", 8), ("fp16", 4)):
        assert sum(name.startswith("forward") and f" {dtype} " in name for name in names) == count
    assert {"memory forward", "memory backward", "decode fp32 B8", "threads causal bf16", "varlen bf16"} < set(names)


def test_a_kernel_that_is_off_is_not_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashx, "attention", slightly_off(flashx.attention))
    row = measured("short", cpu_rows.plan()["short fp32 N16 B1"], setting)
    assert (row.status, row.timings, row.measures) == ("wrong", {}, [])
    assert row.reasons[0].startswith("flashx: out is off by")
    assert [it.ok for it in row.accuracy["torch"].values()] == [True]


def test_gradients_are_checked(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 1.01 * grad

    attend = flashx.attention
    monkeypatch.setattr(flashx, "attention", lambda q, k, v, **o: attend(q, OnlyBackward.apply(k), v, **o))
    row = measured("training", cpu_rows.plan()["forward+backward fp32 D64 full"], setting)
    assert row.status == "wrong"
    assert len(row.reasons) == 1 and row.reasons[0].startswith("flashx: grad_key is off by")


def test_a_peer_that_computes_something_else_is_no_peer(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rows, "sdpa", slightly_off(cpu_rows.sdpa))
    row = measured("varlen", cpu_rows.plan()["varlen fp32"], setting)
    assert row.status == "wrong"
    assert [reason.split(":")[0] for reason in row.reasons] == ["torch"]


def test_a_kernel_that_raises(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        raise RuntimeError("out of luck\nand of memory")

    monkeypatch.setattr(flashx, "attention", attend)
    row = measured("short", cpu_rows.plan()["short fp32 N16 B1"], setting)
    assert (row.status, row.reasons) == ("failed", ["RuntimeError: out of luck"])


def test_one_thread_cannot_show_scaling(setting: Setting) -> None:
    torch.set_num_threads(1)
    row = measured("threads", cpu_rows.plan()["threads full fp32"], setting)
    assert (row.status, row.reasons) == ("skipped", ["torch has a single thread here"])


def test_scaling_runs_on_one_thread_and_on_two(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    attend = flashx.attention

    def spy(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return attend(*tensors, **options)

    monkeypatch.setattr(flashx, "attention", spy)
    assert measured("threads", cpu_rows.plan()["threads full fp32"], setting).status == "ok"
    assert (seen, torch.get_num_threads()) == ({1, 2}, 2)


def test_bfloat16_without_its_units(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probes, "has", lambda self, unit: unit == "fp32")
    row = measured("forward", cpu_rows.plan()["forward bf16 D64 full"], setting)
    assert [(it.name, it.at_least) for it in row.measures] == [("× torch", 3.8), ("× fp32 kernel", 1)]


# Figures


def timings(**seconds: float) -> dict[str, Timing]:
    return {name.replace("_", " "): Timing([value, value, 9 * value]) for name, value in seconds.items()}


def test_figures_of_a_causal_forward(setting: Setting) -> None:
    work = cpu_rows.plan()["forward fp32 D64 causal"](setting)
    assert isinstance(work, Workload)
    pairs = sum(row + 1 for row in range(256))
    assert work.flops == 2 * pairs * 4 * 64
    per_call = work.probes["fp32"][1]
    times = timings(flashx=2.0, torch=5.0, fp32=1.0)
    ratio, fraction = work.measures(times)
    assert (ratio.value, ratio.met) == (2.5, True)
    assert fraction.value == pytest.approx(work.flops / 2 / per_call)


def test_figures_of_a_window(setting: Setting) -> None:
    work = cpu_rows.plan()["window fp32"](setting)
    assert isinstance(work, Workload)
    i, j = torch.arange(512)[:, None], torch.arange(512)
    visible = ((j <= i) & (j >= i - 32)).double().mean().item()
    (figure,) = work.measures(timings(flashx=1.0, dense=10.0))
    assert figure.value == pytest.approx(1 / (10 * visible))


def test_decode_is_held_against_the_faster_read(setting: Setting) -> None:
    work = cpu_rows.plan()["decode bf16 B1"](setting)
    assert isinstance(work, Workload)
    assert work.bytes == 2 * 8 * 512 * 128 * 2 == work.probes["read keys"][1]
    buffer = work.probes["read"][1]
    slow = work.measures(timings(flashx=4.0, torch=1.0, read=2 * buffer / work.bytes, read_keys=1.0))
    fast = work.measures(timings(flashx=4.0, torch=1.0, read=0.5 * buffer / work.bytes, read_keys=1.0))
    assert slow[0].value == pytest.approx(1 / 4)
    assert fast[0].value == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("measure", "met"),
    [
        (Measure("a", 2.3, at_least=2.3), True),
        (Measure("a", 2.29, at_least=2.3), False),
        (Measure("a", 1.15, at_most=1.15), True),
        (Measure("a", 1.16, at_most=1.15), False),
        (Measure("a", math.nan, at_least=1), False),
        (Measure("a", 1.0), None),
    ],
)
def test_targets(measure: Measure, met: bool | None) -> None:
    assert measure.met is met


def test_ragged_lengths_have_a_long_tail() -> None:
    lengths = cpu_rows.ragged_lengths(64, 2048)
    assert len(lengths) == 64 and max(lengths) == 2048 and min(lengths) >= 8
    assert sorted(lengths)[32] < 2048 / 4 < sorted(lengths)[-8]
    assert lengths == cpu_rows.ragged_lengths(64, 2048)


# The oracle


def test_the_oracle_is_attention() -> None:
    torch.manual_seed(0)
    query, key, value, grad_out = (torch.randn(70, 16, dtype=torch.float64) for _ in range(4))
    visible = torch.arange(70) <= torch.arange(70)[:, None]
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    logits = (query @ key.mT / 4).masked_fill(~visible, -torch.inf)
    out = logits.softmax(-1) @ value
    grads = torch.autograd.grad(out, leaves, grad_out)
    sample = Sample(query.detach(), key.detach(), value.detach(), visible, dict, grad_out)
    found = sample.computed(torch.float64)
    for name, expected in zip(("out", "grad_query", "grad_key", "grad_value"), (out, *grads), strict=True):
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_but_numbers(bad: float) -> None:
    query, key, value = (torch.randn(2, 4, 300, 16) for _ in range(3))
    out = flashx.attention(query, key, value)
    oracle = Oracle(dense_samples(query, key, value))
    assert oracle.check({"out": out})["out"].ok
    out[-1, -1, -1, -1] = bad  # the last head's last row is always among those that are checked
    assert not oracle.check({"out": out})["out"].ok


# Memory


def test_memory_sees_what_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_rows._RESET.exists():
        pytest.skip("needs Linux's /proc")
    lean, error, budget = cpu_rows.peak_growth(4096, backward=True)
    assert error <= budget
    attend = flashx.attention

    def wasteful(*tensors: torch.Tensor, **options: Any) -> Any:
        torch.ones(2**24)  # 64 MiB
        return attend(*tensors, **options)

    monkeypatch.setattr(flashx, "attention", wasteful)
    fat, _, _ = cpu_rows.peak_growth(4096, backward=True)
    # Less than the 64 MiB where results find room in memory that was freed before.
    assert lean < 2**24 and fat > 2**25


# Probes


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_multiply_adds(isa: str) -> None:
    def operations(unit: Any, rounds: int, threads: int) -> float:
        return _C.cpu_multiply_adds(isa, unit, rounds, threads)

    assert operations("fp32", 1, 1) > 0
    for unit, isas in (("bf16_pairs", {"amx", "avx512_bf16"}), ("bf16_tiles", {"amx"})):
        assert (operations(unit, 1, 1) > 0) == (isa in isas)
    for unit in ("fp32", "bf16_pairs", "bf16_tiles"):
        assert operations(unit, 50, 2) == 100 * operations(unit, 1, 1)
        assert operations(unit, 0, 1) == 0


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_every_word_is_read(isa: str) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (200_003,), dtype=torch.int32)
    for begin, count in ((0, 200_003), (1, 200_002), (3, 65_536), (5, 131_099), (2, 31), (0, 0)):
        part = words[begin : begin + count]
        for threads in (1, 2):
            assert _C.cpu_read(isa, part.data_ptr(), count, threads) == int(part.sum()) % 2**32


def test_bad_probes() -> None:
    isa = cpu.isa()
    with pytest.raises(ValueError, match="unit must be fp32, bf16_pairs or bf16_tiles, got 'fp8'"):
        _C.cpu_multiply_adds(isa, "fp8", 1, 1)  # type: ignore[arg-type]
    for call in (lambda: _C.cpu_multiply_adds(isa, "fp32", 1, 0), lambda: _C.cpu_read(isa, 0, 0, 0)):
        with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
            call()
    with pytest.raises(ValueError, match="rounds must be >= 0, got -1"):
        _C.cpu_multiply_adds(isa, "fp32", -1, 1)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        _C.cpu_read(isa, 0, -1, 1)
    with pytest.raises(ValueError, match="isa must be one that this machine runs, got 'abacus'"):
        _C.cpu_multiply_adds("abacus", "fp32", 1, 1)


def test_peaks(setting: Setting) -> None:
    peaks = setting.probes.summary(repeats=1)
    assert {"fp32_flops", "read_1_mib", "read_4_mib", "read_16_mib"} <= set(peaks)
    assert all(rate > 0 for rate in peaks.values())
    assert cpu_measure.peak(6, Timing([3.0, 2.0, 4.0])) == 3


# The command


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    only = ["--only", "short fp32 N16 B1", "--only", "memory forward"]
    assert cpu_report.main([*QUICK, *only, "--json", str(path)]) == cpu_report.OK
    output = capsys.readouterr()
    assert output.err == ""
    assert "exact and measured: 2 of 2 rows" in output.out
    assert "targets met: " in output.out and "of 2" in output.out
    assert "fp32 FMA" in output.out and "GB/s read of" in output.out
    document = json.loads(path.read_text())
    assert set(document) == {"schema", "environment", "settings", "peaks", "interrupted", "rows"}
    assert document["settings"] == {"only": only[1::2], "repeats": 2, "quick": True}
    short, memory = document["rows"]
    assert set(short) == {
        "name", "detail", "status", "reasons", "accuracy", "times", "flops", "bytes", "measures",
    }  # fmt: skip
    assert set(short["times"]) == set(short["accuracy"]) == {"flashx", "torch"}
    assert set(short["times"]["torch"]) == {"median", "p20", "p80", "samples"}
    assert len(short["times"]["flashx"]["samples"]) >= 2
    measure = short["measures"][0]
    assert set(measure) == {"name", "value", "unit", "at_least", "at_most", "met"}
    assert measure["value"] == short["times"]["torch"]["median"] / short["times"]["flashx"]["median"]
    assert (memory["name"], memory["status"], memory["measures"][0]["unit"]) == ("memory forward", "ok", "MiB")


def fixed(row: Row) -> Callable[[], dict[str, cpu_measure.Build]]:
    return lambda: {row.name: lambda setting: row}


@pytest.mark.parametrize(
    ("row", "code", "strict_code"),
    [
        (Row("a", measures=[Measure("m", 2.0, at_least=1)]), 0, 0),
        (Row("a", measures=[Measure("m", 0.5, at_least=1)]), 0, 1),
        (Row("a", measures=[Measure("m", 0.5)]), 0, 0),
        (Row("a", "skipped", reasons=["no threads"]), 0, 0),
        (Row("a", "failed", reasons=["out of luck"]), 1, 1),
        (Row("a", "wrong", reasons=["off"], accuracy={"flashx": {"out": Accuracy(math.inf, 1.0)}}), 1, 1),
    ],
    ids=["met", "missed", "no target", "skipped", "failed", "wrong"],
)
def test_exit_codes(
    row: Row,
    code: int,
    strict_code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpu_report, "plan", fixed(row))
    path = tmp_path / "a.json"
    assert cpu_report.main([*QUICK, "--json", str(path)]) == code
    assert cpu_report.main([*QUICK, "--strict"]) == strict_code
    output = capsys.readouterr().out
    assert all(reason in output for reason in row.reasons)
    assert (row.status.upper() in output) == (row.status != "ok")
    assert [(it["name"], it["status"]) for it in json.loads(path.read_text())["rows"]] == [("a", row.status)]


def test_an_interrupted_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(setting: Setting) -> Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_report, "plan", lambda: {**fixed(Row("first"))(), "second": interrupt})
    path = tmp_path / "a.json"
    assert cpu_report.main([*QUICK, "--json", str(path)]) == cpu_report.INTERRUPTED
    document = json.loads(path.read_text())
    assert document["interrupted"] and [row["name"] for row in document["rows"]] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "abacus"], "got 'abacus'"),
        (["--repeats", "0"], "argument --repeats: must be an integer of at least 1, got '0'"),
        (["--json", "no/such/folder/a.json"], "no/such/folder/a.json cannot be written"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cpu_report.main(arguments)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_as_part_of_another_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_report, "plan", fixed(Row("a")))
    parser = argparse.ArgumentParser()
    cpu_report.add_arguments(parser)
    assert cpu_report.run(parser.parse_args(QUICK)) == 0
