"""flashx-bench as a user runs it, and the promises behind its numbers."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flashx
from flashx.bench import check, cli, implementations, report, timing
from flashx.bench.cases import CAUSAL, FULL, Case, default_cases
from flashx.bench.implementations import IMPLEMENTATIONS, Naive
from flashx.bench.measure import Row, measure

TINY = ["--seqlen", "64", "--headdim", "16", "--heads", "2", "--repeats", "2", "--min-time", "0", "--no-progress"]


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashx.bench", *arguments]
    # readline, which pytest imports, sets COLUMNS behind os.environ's back.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


class Fake:
    """Naive attention, changed; it counts its calls."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor], reasons: list[str] | None = None) -> None:
        self.change, self.reasons, self.calls = change, reasons or [], 0

    def why_not(self, case: Case) -> list[str]:
        return self.reasons

    def prepare(self, case: Case, inputs: Any) -> implementations.Attend:
        attend = Naive().prepare(case, inputs)

        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.change(attend(query, key, value))

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """Registers a Fake under a name, for one test."""

    def register(name: str, change: Callable[[torch.Tensor], torch.Tensor], reasons: list[str] | None = None) -> Fake:
        made = Fake(change, reasons)
        monkeypatch.setitem(IMPLEMENTATIONS, name, made)
        return made

    return register


# The command line


def test_help_names_every_option(tmp_path: Path) -> None:
    result = bench("--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    options = "seqlen headdim heads kv-heads batch dtype causal window direction impl threads repeats min-time json"
    for option in options.split():
        assert f"--{option} " in result.stdout
    assert "exit codes" in result.stdout


def test_a_run(tmp_path: Path) -> None:
    result = bench(*TINY, "--causal", "both", "--dtype", "fp32,bfloat16", "--json", "a.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "flashx is exact in 8 of 8 rows" in result.stdout
    assert re.search(r"flashx is [\d.]+ times as fast as torch", result.stdout)
    for dtype in ("fp32", "bf16"):
        for mask in ("full", "causal"):
            assert f"B1 H2 N64 D16 {dtype} {mask}" in result.stdout
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 3  # masks, dtypes, directions, implementations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seqlen", "0"], "argument --seqlen: must be an integer of at least 1, got '0'"),
        (["--seqlen", "64,-3"], "must be an integer of at least 1, got '-3'"),
        (["--seqlen", "8x"], "must be an integer of at least 1, got ''"),
        (["--seqlen", "1x2x3"], "must be an integer of at least 1, got '2x3'"),
        (["--headdim", "a"], "argument --headdim: must be an integer of at least 1, got 'a'"),
        (["--heads", "6", "--kv-heads", "4"], "heads must be a multiple of kv-heads, got 6 and 4"),
        (["--batch", "1.5"], "argument --batch: must be an integer of at least 1, got '1.5'"),
        (["--dtype", "fp8"], "argument --dtype: dtype must be one of fp16, bf16, fp32, fp64, got 'fp8'"),
        (["--causal", "maybe"], "argument --causal"),
        (["--window", "3,x"], "argument --window: must be an integer of at least 0 or 'none', got 'x'"),
        (["--window", "1,2,3"], "got '2,3'"),
        (["--direction", "up"], "argument --direction: direction must be one of fwd, bwd, both, got 'up'"),
        (["--impl", "flashx,fa9"], "implementation must be one of flashx, torch, naive, got 'fa9'"),
        (["--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["--repeats", "0"], "argument --repeats: must be an integer of at least 1, got '0'"),
        (["--min-time", "nan"], "argument --min-time: must be a number of seconds, at least 0, got 'nan'"),
        (["--min-time", "soon"], "must be a number of seconds, at least 0, got 'soon'"),
        (["--json", "no/such/folder/a.json"], "argument --json: no/such/folder/a.json cannot be written"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLASHX_CPU_ISA", "abacus")
    flashx.backends.cpu.isa.cache_clear()
    with pytest.raises(SystemExit) as error:
        cli.main(TINY)
    flashx.backends.cpu.isa.cache_clear()
    assert error.value.code == 2
    assert "FLASHX_CPU_ISA must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seqlen", "1x77", "--heads", "8", "--kv-heads", "2", "--batch", "3", "--dtype", "bf16", "--causal", "both"],
        ["--seqlen", "65x33,33x65", "--headdim", "24x40", "--causal", "both", "--direction", "fwd,bwd,both"],
        ["--seqlen", "130", "--window", "20", "--window", "7,7", "--window", "none,3", "--dtype", "fp16,fp64"],
    ],
)
def test_every_row_of_a_grid_is_exact(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert cli.main([*TINY[2:], *arguments, "--json", str(path)]) == cli.OK
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["implementation"] for row in rows} == {"flashx", "torch", "naive"}


def test_threads(threads: None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    cli.main([*TINY, "--threads", "1", "--direction", "fwd", "--json", str(path)])
    assert torch.get_num_threads() == 1
    assert json.loads(path.read_text())["environment"]["threads"] == 1


def test_json_schema(fake: Callable[..., Fake], tmp_path: Path) -> None:
    fake("absent", lambda out: out, ["not installed"])
    fake("wrong", lambda out: out * float("nan"))
    path = tmp_path / "a.json"
    assert cli.main([*TINY, "--impl", "flashx,torch,absent,wrong", "--direction", "both", "--json", str(path)]) == 0

    document = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert document.keys() == {"schema", "environment", "settings", "interrupted", "rows"}
    assert document["schema"] == report.SCHEMA == 1
    assert document["interrupted"] is False
    assert document["settings"] == {"impl": ["flashx", "torch", "absent", "wrong"], "repeats": 2, "min_time": 0.0}
    environment = document["environment"]
    assert environment.keys() == {"cpu", "cpus", "threads", "flashx", "commit", "torch", "python", "system"}
    assert environment["flashx"] == flashx.build_info()
    assert environment["torch"] == torch.__version__

    flash, torch_, absent, wrong = document["rows"]
    for row in document["rows"]:
        assert row.keys() == {
            "case", "implementation", "status", "reasons", "accuracy", "flops", "bytes", "median", "p20", "p80",
            "samples", "gflops", "gbytes", "ratio_to_torch",
        }  # fmt: skip
        assert Case(**{**row["case"], "window": tuple(row["case"]["window"])}) == Case(
            64, 64, 16, 16, q_heads=2, kv_heads=2, direction="both"
        )
    for row in (flash, torch_):
        assert row["status"] == "ok" and row["reasons"] == []
        assert row["accuracy"].keys() == {"out", "grad_query", "grad_key", "grad_value"}
        assert all(0 <= accuracy["error"] <= accuracy["budget"] for accuracy in row["accuracy"].values())
        assert len(row["samples"]) >= 2
        assert min(row["samples"]) <= row["p20"] <= row["median"] <= row["p80"] <= max(row["samples"])
        assert row["gflops"] == pytest.approx(row["flops"] / row["median"] / 1e9)
        assert row["gbytes"] == pytest.approx(row["bytes"] / row["median"] / 1e9)
        assert row["ratio_to_torch"] == pytest.approx(torch_["median"] / row["median"])
    assert absent["status"] == "refused" and absent["reasons"] == ["not installed"] and absent["accuracy"] == {}
    assert wrong["status"] == "wrong" and wrong["accuracy"]["out"]["error"] is None
    for row in (absent, wrong):
        assert all(row[name] is None for name in ("median", "p20", "p80", "samples", "gflops", "ratio_to_torch"))


# Wrong, failing and refusing implementations


def nudge(out: torch.Tensor) -> torch.Tensor:
    """One element of the last head, by ten units of float32's precision where the values are about 1."""
    nudged = out.clone()
    nudged[-1, -1, -1, -1] += 1e-5
    return nudged


def poison(out: torch.Tensor) -> torch.Tensor:
    poisoned = out.clone()
    poisoned[-1, -1, 0, 0] = float("nan")
    return poisoned


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.0001


@pytest.mark.parametrize("change", [nudge, poison, torch.neg, WrongGradient.apply])
def test_what_is_wrong_is_not_timed(
    change: Callable[[torch.Tensor], torch.Tensor], fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, right = fake("wrong", change), fake("right", torch.clone)
    assert cli.main([*TINY, "--impl", "wrong,right", "--direction", "both"]) == cli.OK  # flashx is not to blame
    assert wrong.calls == 1
    assert right.calls > 2
    output = capsys.readouterr().out
    assert re.search(r"fwd\+bwd +wrong +WRONG", output)
    assert re.search(r"right +[\d.]+ ", output)
    assert re.search(r"wrong: wrong, .* is off by \S+, budget \S+", output)


@pytest.mark.parametrize(
    "case",
    [
        Case(97, 97, 16, 16, batch=3, q_heads=4, kv_heads=4),
        Case(97, 97, 16, 16, batch=2, q_heads=6, kv_heads=2, window=CAUSAL),
        Case(30, 97, 16, 16, batch=2, q_heads=2, kv_heads=1, window=(20, 5)),
    ],
)
def test_a_large_case_is_checked_on_some_heads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one among them; taken in chunks of rows, the oracle says the same."""
    case, inputs = replace(case, direction="both"), case.inputs()
    whole = check.Oracle(case, inputs)
    assert len(whole.heads) == case.batch * case.kv_heads
    monkeypatch.setattr(check, "CHECKED_PAIRS", 2 * case.q_heads // case.kv_heads * case.q_len * case.k_len)
    monkeypatch.setattr(check, "CHUNK_PAIRS", 15000)
    some = check.Oracle(case, inputs)
    assert len(some.heads) == 2
    assert some.heads[0] == case.batch * case.kv_heads - 1
    for name, expected in some.expected.items():
        every = whole.expected[name][[whole.heads.index(head) for head in some.heads]]
        torch.testing.assert_close(expected, every, atol=1e-12, rtol=0)

    results = check.run(case, IMPLEMENTATIONS["flashx"].prepare(case, inputs), inputs)()
    assert all(accuracy.ok for accuracy in some.check(results).values())
    for name in results:
        broken = {**results, name: nudge(results[name]) + 1e-4}
        assert [key for key, accuracy in some.check(broken).items() if not accuracy.ok] == [name]


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_flashx_at_fault(status: str, fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]) -> None:
    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no luck today\nat all")

    fake("flashx", nudge if status == "wrong" else fail)
    assert cli.main([*TINY, "--direction", "fwd"]) == cli.WRONG
    output = capsys.readouterr().out
    assert re.search(rf"flashx +{status.upper()}", output)
    assert re.search(r"torch +[\d.]+ ", output)
    assert "flashx is exact in 0 of 1 rows" in output and "geometric mean" not in output
    if status == "failed":
        assert "failed: flashx, B1 H2 N64 D16 fp32 full fwd: RuntimeError: no luck today\n" in output


def test_refusals_show_their_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "NAIVE_LIMIT", 2**10)
    assert cli.main([*TINY, "--headdim", "257", "--direction", "fwd"]) == cli.OK
    output = capsys.readouterr().out
    assert re.search(r"flashx +REFUSED", output)
    assert re.search(r"naive +REFUSED", output)
    assert "refused: flashx, B1 H2 N64 D257 fp32 full fwd: cpu: head dim 257 is over 256" in output
    assert "refused: naive, B1 H2 N64 D257 fp32 full fwd: a score matrix takes" in output
    assert "flashx is exact" not in output


def test_interruption_keeps_what_was_measured(
    fake: Callable[..., Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(out: torch.Tensor) -> torch.Tensor:
        if out.shape[2] == 65:
            raise KeyboardInterrupt
        return out

    fake("tired", interrupt)
    path = tmp_path / "a.json"
    arguments = [*TINY, "--seqlen", "64,65,66", "--direction", "fwd", "--impl", "flashx,tired", "--json", str(path)]
    assert cli.main(arguments) == cli.INTERRUPTED
    output = capsys.readouterr().out
    assert "N64" in output and "N66" not in output
    assert "interrupted after 1 of 3 cases" in output
    document = json.loads(path.read_text())
    assert document["interrupted"] is True
    assert [row["case"]["q_len"] for row in document["rows"]] == [64, 64]


# What the numbers count


SHAPES = [(1, 1), (1, 9), (9, 1), (7, 7), (5, 8), (8, 5), (16, 16), (3, 17)]
WINDOWS = [FULL, CAUSAL, (0, 0), (2, 0), (0, 2), (3, 1), (None, 2), (2, None), (100, 100), (100, 0)]


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
def test_visible_pairs(q_len: int, k_len: int) -> None:
    for window in WINDOWS:
        case = Case(q_len, k_len, window=window)
        assert case.visible_pairs() == int(case.mask.dense(q_len, k_len).sum()), window


def test_flops_and_bytes() -> None:
    case = Case(1024, 1024, batch=2, q_heads=8, kv_heads=2, dtype="bf16")
    assert case.flops() == 4 * 2 * 8 * 1024 * 1024 * 64
    assert replace(case, direction="bwd").flops() == 2.5 * case.flops()
    assert replace(case, direction="both").flops() == 3.5 * case.flops()
    assert replace(case, window=CAUSAL).flops() == 4 * 2 * 8 * (1024 * 1025 // 2) * 64
    assert replace(case, value_dim=32).flops() == 0.75 * case.flops()
    query, key = 2 * 8 * 1024 * 64 * 2, 2 * 2 * 1024 * 64 * 2
    assert case.bytes() == 2 * query + 2 * key
    assert replace(case, direction="bwd").bytes() == 4 * query + 4 * key
    assert replace(case, direction="both").bytes() == 6 * query + 6 * key


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_torch_computes_the_same_attention(
    q_len: int, k_len: int, window: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is told is_causal, which it has fast kernels for, wherever that says the whole mask."""
    case = Case(q_len, k_len, 8, 8, q_heads=4, kv_heads=2, window=window)
    inputs, options = case.inputs(), []

    def spy(*tensors: torch.Tensor, **keywords: Any) -> torch.Tensor:
        options.append(keywords)
        return torch.nn.functional.scaled_dot_product_attention(*tensors, **keywords)

    monkeypatch.setattr(implementations, "sdpa", spy)
    actual, expected = (IMPLEMENTATIONS[name].prepare(case, inputs)(*inputs[:3]) for name in ("torch", "naive"))
    torch.testing.assert_close(actual, expected)
    dense, triangle = case.mask.dense(q_len, k_len), torch.ones(q_len, k_len, dtype=torch.bool).tril()
    assert options[0]["enable_gqa"]
    if dense.all():
        assert "attn_mask" not in options[0] and "is_causal" not in options[0]
    else:
        assert options[0].get("is_causal", False) == torch.equal(dense, triangle)


def test_flashx_is_not_compared_with_itself() -> None:
    with flashx.patch():
        assert implementations.sdpa is not torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
def test_inputs_are_the_same_every_time(dtype: str) -> None:
    case = Case(5, 7, 8, 4, batch=2, q_heads=4, kv_heads=2, dtype=dtype)
    inputs = case.inputs()
    assert [tuple(tensor.shape) for tensor in inputs] == [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4), (2, 4, 5, 4)]
    assert all(torch.equal(one, other) for one, other in zip(inputs, case.inputs(), strict=True))
    assert not torch.equal(inputs.query, case.inputs(seed=1).query)


def test_the_default_tour_is_for_everyone() -> None:
    """Both precisions, head dims, masks, a window and a decode row; nobody refuses any of it."""
    cases = default_cases(["fwd", "both"])
    assert len(set(cases)) == len(cases)
    assert {case.dtype for case in cases} == {"fp32", "bf16"}
    assert {case.head_dim for case in cases} == {64, 128}
    assert {case.window for case in cases} == {FULL, CAUSAL, (256, 0)}
    assert [case.direction for case in cases if case.q_len == 1] == ["fwd"]
    assert any(case.q_heads != case.kv_heads for case in cases)
    assert {case.k_len for case in cases} == {1024, 2048, 4096}
    assert all(not implementation.why_not(case) for implementation in IMPLEMENTATIONS.values() for case in cases)


# Timing


def test_rounds_take_everybody_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of which "slow" takes 3 seconds, "fast" 1: enough repeats, then enough time, never one without."""
    now, log = 0.0, []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds
            log.append(name)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    calls = {"fast": call("fast", 1.0), "slow": call("slow", 3.0)}
    for repeats, min_time, rounds in [(3, 0.0, 3), (1, 10.0, 5), (7, 10.0, 7)]:
        log.clear()
        timings = timing.interleaved(calls, repeats, min_time)
        assert list(timings["fast"].samples) == [1.0] * rounds
        assert list(timings["slow"].samples) == [3.0] * rounds
        # The first round does not count.
        assert len(log) == 2 * (rounds + 1)
        assert all(set(log[start : start + 2]) == {"fast", "slow"} for start in range(0, len(log), 2))
    orders = {tuple(log[start : start + 2]) for start in range(2, len(log), 2)}
    assert len(orders) == 2
    assert timing.interleaved({}, 3, 1.0) == {}


def test_percentiles() -> None:
    samples = timing.Timing([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert samples.median == 3.5
    assert (samples.percentile(0), samples.percentile(20), samples.percentile(80)) == (1.0, 2.0, 5.0)
    assert samples.percentile(100) == 6.0
    assert timing.Timing([2.0]).percentile(80) == 2.0


# The table


def rendered(rows: list[Row], width: int) -> str:
    environment = {"cpu": "CPU", "threads": 2, "torch": "2", "flashx": {"version": "1", "cpu_isa": "x"}, "commit": "c0"}
    output = io.StringIO()
    report.show(Console(file=output, width=width), environment, rows)
    return output.getvalue()


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    case = Case(33, 33, 8, 8, batch=10, q_heads=8, kv_heads=2, dtype="bf16", window=(10, 10), direction="both")
    yield measure(case, IMPLEMENTATIONS, repeats=2, min_time=0)


@pytest.mark.parametrize("width", [80, 90, 100, 120, 200])
def test_numbers_never_break(rows: list[Row], width: int) -> None:
    output = rendered(rows, width)
    assert "…" not in output
    assert all(len(line) <= width for line in output.splitlines())
    table = output[output.index("─") :].splitlines()
    for row in rows:
        assert row.timing is not None and row.gflops is not None
        line = next(line for line in table if f" {row.implementation} " in line)
        assert report.number(1e3 * row.timing.median) in line.split()
        assert report.number(row.gflops) in line.split()
    assert ("p80" in output) == (width >= 110)


def test_a_failure_is_never_dressed_up(rows: list[Row]) -> None:
    bad = {"out": check.Accuracy(math.nan, 1e-3), "grad_key": check.Accuracy(1e-4, 1e-3)}
    wrong = Row(rows[0].case, "flashx", "wrong", accuracy=bad)
    output = rendered([wrong, *rows[1:]], 120)
    assert re.search(r"flashx +WRONG +nan +1\.0e-03", output)
    assert "out is off by nan, budget 0.001" in output
    assert "grad_key is off" not in output


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (1.2345, "1.23"),
        (98.76, "98.8"),
        (12345.6, "12346"),
        (999.9, "1000"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("error", "budget", "ok"),
    [
        (0.0, 0.0, True),
        (1e-9, 0.0, False),
        (1.0, 1.0, True),
        (1.1, 1.0, False),
        (math.nan, 1.0, False),
        (math.inf, 1.0, False),
    ],
)
def test_budget(error: float, budget: float, ok: bool) -> None:
    assert check.Accuracy(error, budget).ok is ok
