"""flashx-bench as a user runs it: commands, bad arguments, exit codes, what is left out, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flashx
from flashx.bench import cases, cli, environment, implementations, machine, suites
from flashx.bench.cases import Case, Inputs
from flashx.bench.implementations import Attend, Naive, Refused
from flashx.bench.peers import IMPLEMENTATIONS, USUAL
from flashx.bench.variants import VARIANTS

QUICK = ["--repeats", "2", "--min-time", "0", "--no-progress", "--device", "cpu"]
TINY = ["run", "--seqlen", "64", "--headdim", "16", "--heads", "2", "--impl", "flashx,torch,naive", *QUICK]

# A tiny grid of each variant.
GRIDS = {
    "dense": ["--seqlen", "40x50", "--softcap", "0,3", "--causal", "both"],
    "block-sparse": ["--seqlen", "200", "--block", "32", "--sparsity", "0,75", "--causal", "both"],
    "shared-prefix": ["--batch", "4", "--groups", "1,2", "--queries", "1,3", "--prefix", "20", "--suffix", "7"],
    "tree": ["--tree", "1,2,6/20,7,5", "--tree", "2,4/9,6"],
    "varlen": ["--lens", "3+40+1", "--causal", "both"],
    "decode": ["--cache", "50", "--page", "0,8", "--queries", "1,3"],
    "neighborhood": ["--grid", "8x10", "--kernel", "3", "--stride", "1,2", "--causal", "both"],
}


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose peaks are known beforehand, and which has nothing else to do."""
    monkeypatch.setattr(
        machine, "probe", lambda dtypes, device, clock: machine.Machine(dict.fromkeys(dtypes, 100.0), 10.0)
    )
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashx.bench", *arguments]
    # readline, which pytest imports, sets COLUMNS behind os.environ's back.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


class Fake:
    """Naive attention, changed; it counts its calls."""

    kinds = (Case,)

    def __init__(
        self, change: Callable[[torch.Tensor], torch.Tensor], missing: str | None = None, reasons: tuple[str, ...] = ()
    ) -> None:
        self.change, self.missing, self.reasons, self.calls = change, missing, reasons, 0

    def absent(self, device: str) -> str | None:
        return self.missing

    def prepare(self, case: Case, inputs: Inputs) -> Attend:
        if self.reasons:
            raise Refused(*self.reasons)
        attend = Naive().prepare(case, inputs)

        def call(*leaves: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.change(attend(*leaves))

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """Registers a Fake under a name, for one test."""

    def register(name: str, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone, **options: Any) -> Fake:
        made = Fake(change, **options)
        monkeypatch.setitem(IMPLEMENTATIONS, name, made)
        return made

    return register


# The command line


def test_help_is_enough(tmp_path: Path) -> None:
    """It names every command, the exit codes and examples; none of its commands loads what it does not need."""
    result = bench("--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for command in ("run", "suite", "compare", "plot", "env", "model", "cpu-report"):
        assert re.search(rf"^    {command}\s", result.stdout, re.MULTILINE), command
    assert "exit codes" in result.stdout


def test_help_of_run_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["run", "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    options = """variant seqlen headdim heads kv-heads batch dtype causal window sink-tokens softcap sparsity block
        prefix suffix groups queries tree lens cache page grid kernel stride dilation sinks bias direction impl device
        threads repeats min-time dry-run no-progress json csv plot html resume"""
    for option in options.split():
        assert f"--{option}" in text


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
    ("arguments", "routed"),
    [
        ([], ["run"]),
        (["--seqlen", "64"], ["run", "--seqlen", "64"]),
        (["suite", "beam"], ["suite", "beam"]),
        (["suite", "cpu-report", "--x"], ["cpu-report", "--x"]),
        (["--help"], ["--help"]),
    ],
)
def test_flags_alone_are_run(arguments: list[str], routed: list[str]) -> None:
    assert cli.routed(arguments) == routed


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
        (["--causal", "maybe"], "argument --causal: causal must be one of no, yes, both, got 'maybe'"),
        (["--window", "3,x"], "argument --window: must be an integer of at least 0 or 'none', got 'x'"),
        (["--window", "1,2,3"], "got '2,3'"),
        (["--softcap", "-1"], "argument --softcap: must be a number, at least 0, got '-1'"),
        (["--direction", "up"], "argument --direction: direction must be one of fwd, bwd, both, got 'up'"),
        (["--impl", "flashx,fa9"], "implementation must be one of flashx, flashx-concat, triton, torch,"),
        (["--impl", "triton"], "none of the implementations can run here: triton: needs a GPU"),
        (["--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["--repeats", "0"], "argument --repeats: must be an integer of at least 1, got '0'"),
        (["--min-time", "nan"], "argument --min-time: must be a number of seconds, at least 0, got 'nan'"),
        (["--min-time", "soon"], "must be a number of seconds, at least 0, got 'soon'"),
        (["--variant", "linear"], "argument --variant: invalid choice: 'linear'"),
        (["--prefix", "64"], "--prefix does not apply to dense"),
        (["--variant", "varlen", "--bias"], "--bias does not apply to varlen"),
        (["--variant", "varlen", "--window", "3"], "--window does not apply to varlen"),
        (["--variant", "block-sparse", "--sparsity", "100"], "must be a percentage below 100, got '100'"),
        (["--variant", "block-sparse", "--block", "24"], "block must be a multiple of 16 from 16 to 256, got 24"),
        (["--variant", "block-sparse", "--seqlen", "64x32"], "seqlen must be one number for block-sparse, got 64x32"),
        (["--variant", "shared-prefix", "--batch", "4", "--groups", "3"], "multiple of groups, got 4 and 3"),
        (["--variant", "tree", "--tree", "1,2"], "must be nodes per level / tokens of each, such as 1,16/256,32"),
        (["--variant", "tree", "--tree", "2,3/4,4"], "must be a multiple of those above, got '2,3/4,4'"),
        (["--variant", "tree", "--tree", "1,2/4"], "as many nodes as tokens, two levels or more, got '1,2/4'"),
        (["--variant", "decode", "--lens", "5", "--batch", "2"], "--lens already says how many caches there are"),
        (["--variant", "decode", "--cache", "2", "--queries", "3"], "hold its queries, got 2 keys and 3 queries"),
        (["--variant", "neighborhood", "--grid", "4x4", "--kernel", "5"], "kernel_size must be from 1 to the length 4"),
        (["--json", "no/such/folder/a.json"], "argument --json: no/such/folder/a.json cannot be written"),
        (["--csv", "no/such/folder/a.csv"], "argument --csv: no/such/folder/a.csv cannot be written"),
        (["--plot", "chart.gif"], "argument --plot: must end on .png, .svg, .pdf, got 'chart.gif'"),
        (["--resume", "no.json"], "argument --resume: no.json cannot be read: No such file"),
        (["--frobnicate"], "--frobnicate"),
        (["suite", "fa9"], "suite must be one of fa2-grid, hydragen,"),
        (["suite", "beam", "--scale", "0"], "argument --scale: must be above 0 and at most 1, got '0'"),
        (["suite", "decode", "--direction", "bwd"], "decode has no cases in direction bwd"),
        (["compare", "a.json"], "the following arguments are required: B.json"),
        (["compare", "a.json", "b.json"], "a.json cannot be read: No such file or directory"),
        (["plot", "a.json"], "the following arguments are required: -o/--output"),
        (["plot", "a.json", "-o", "a.txt"], "argument -o: must end on .png, .svg, .pdf, got 'a.txt'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main([*arguments, "--device", "cpu"] if arguments[0].startswith("--") else arguments)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["run", "--device", "cuda"])
    assert "argument --device: torch" in capsys.readouterr().err


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLASHX_CPU_ISA", "abacus")
    flashx.backends.cpu.isa.cache_clear()
    with pytest.raises(SystemExit) as error:
        cli.main(TINY)
    flashx.backends.cpu.isa.cache_clear()
    assert error.value.code == 2
    assert "FLASHX_CPU_ISA must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("variant", GRIDS)
def test_every_row_of_a_grid_is_exact(variant: str, tmp_path: Path) -> None:
    """Of every variant, forward and backward if it has one, whoever is here."""
    path = tmp_path / "a.json"
    grid = ["--variant", variant, *GRIDS[variant], "--headdim", "16", "--heads", "4", "--kv-heads", "2"]
    assert cli.main([*grid, *QUICK, "--dtype", "bf16", "--direction", "fwd,both", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows if row["implementation"] in ("flashx", "naive")} == {"ok"}
    assert {row["status"] for row in rows} <= {"ok", "refused"}
    directions = {"fwd"} if VARIANTS[variant].FORWARD_ONLY else {"fwd", "both"}
    assert {row["case"]["direction"] for row in rows} == directions
    assert {row["case"]["variant"] for row in rows} == {variant}
    timed = {row["implementation"] for row in rows if row["status"] == "ok"}
    shared = {"flashx-concat", "torch-cascade"} if variant in ("shared-prefix", "tree") else set()
    assert timed == {"flashx", "torch", "naive"} | shared


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seqlen", "1x77", "--heads", "8", "--kv-heads", "2", "--batch", "3", "--dtype", "bf16", "--causal", "both"],
        ["--seqlen", "65x33,33x65", "--headdim", "24x40", "--direction", "fwd,bwd,both"],
        ["--seqlen", "70", "--window", "20", "--window", "7,7", "--window", "none,3", "--dtype", "fp16,fp64"],
        ["--seqlen", "90", "--window", "20", "--sink-tokens", "0,5", "--sinks", "--bias", "--causal", "both"],
    ],
)
def test_every_row_of_a_dense_grid_is_exact(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    impl = ["--impl", "flashx,torch,torch-math,naive", "--headdim", "16", "--heads", "2"]
    assert cli.main([*impl, *arguments, *QUICK, "--json", str(path)]) == cli.OK
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["implementation"] for row in rows} == {"flashx", "torch", "torch-math", "naive"}


def test_threads(threads: None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    cli.main([*TINY, "--threads", "1", "--direction", "fwd", "--json", str(path)])
    assert torch.get_num_threads() == 1
    assert json.loads(path.read_text())["environment"]["threads"] == 1


def test_a_dry_run_only_lists(capsys: pytest.CaptureFixture[str], fake: Callable[..., Fake]) -> None:
    never = fake("flashx")
    assert cli.main(["run", "--seqlen", "64,128", "--causal", "both", "--dry-run"]) == cli.OK
    assert capsys.readouterr().out.split("\n")[0].rstrip() == "B1 H8 N64 D64 fp32 full fwd"
    assert never.calls == 0


def test_the_default_tour_is_for_everyone() -> None:
    """Both precisions, head dims, masks, a window and a decode row."""
    tour = [case for case in cases.tour(["fwd", "both"]) if isinstance(case, cases.Dense)]
    assert len(set(tour)) == len(tour) == 15
    assert {case.dtype for case in tour} == {"fp32", "bf16"}
    assert {case.head_dim for case in tour} == {64, 128}
    assert {case.window for case in tour} == {cases.FULL, cases.CAUSAL, (256, 0)}
    assert [case.direction for case in tour if case.q_len == 1] == ["fwd"]
    assert any(case.q_heads != case.kv_heads for case in tour)
    assert {case.k_len for case in tour} == {1024, 2048, 4096}


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == cli.OK
    document = json.loads(capsys.readouterr().out)
    assert document["environment"]["torch"] == torch.__version__
    assert document["implementations"].keys() == IMPLEMENTATIONS.keys()
    assert document["implementations"]["flashx"] is None
    assert cli.main(["env"]) == cli.OK
    text = capsys.readouterr().out
    assert "torch-math: measured if named by --impl" in text or "sees" in text or torch.cuda.is_available()
    assert "flash_attn: " in text


@pytest.mark.parametrize("command", ["model", "cpu-report"])
def test_commands_of_other_modules(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their own help if the module is there, a clear message if it is not."""
    with pytest.raises(SystemExit) as error:
        cli.main([command, "--help"])
    assert error.value.code == 0
    assert f"flashx-bench {command}" in capsys.readouterr().out


def test_a_command_whose_module_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.EXTENSIONS, "model", ("no_such_module", "text"))
    with pytest.raises(SystemExit) as error:
        cli.main(["model"])
    assert error.value.code == 2
    assert "flashx-bench model: error: this installation does not have it" in capsys.readouterr().err


# Suites


@pytest.mark.parametrize("name", suites.SUITES)
@pytest.mark.parametrize("scale", [1 / 64, 1 / 8, 1.0])
def test_suites(name: str, scale: float) -> None:
    """Each case once; a smaller machine gets less of it to do, never nothing."""
    suite = suites.SUITES[name]
    found = suite.cases(scale)
    assert 0 < len(set(found)) == len(found)
    assert {case.direction for case in found} <= set(suite.directions)
    if scale < 1:
        whole = suite.cases(1.0)
        assert sum(map(_size, found)) < sum(map(_size, whole))


def _size(case: Case) -> int:
    return case.sequences * case.q_heads * case.lengths(0)[0] * case.lengths(0)[1]


def test_fa2_grid_has_as_many_tokens_and_as_wide_a_model_everywhere() -> None:
    for scale, tokens, hidden in ((1.0, 16384, 2048), (0.25, 4096, 512)):
        found = suites.SUITES["fa2-grid"].cases(scale)
        for case in found:
            assert isinstance(case, cases.Dense) and case.q_len == case.k_len
            assert case.batch * case.q_len == tokens and case.q_heads * case.head_dim == hidden
    assert {case.direction for case in found} == {"fwd", "bwd", "both"}


def test_the_list_of_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["suite", "--scale", "0.125", "--device", "cpu"]) == cli.OK
    output = capsys.readouterr().out
    for name, suite in suites.SUITES.items():
        assert re.search(rf"^{name} +{len(suite.cases(0.125))} +\w", output, re.MULTILINE), name
    assert "cpu-report" in output and "at scale 0.125 (as asked)" in output


def test_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says its scale, runs in float32 on a CPU, and its peers are told once."""
    path = tmp_path / "a.json"
    assert cli.main(["suite", "relay", "--scale", "0.005", *QUICK, "--json", str(path)]) == cli.OK
    output = capsys.readouterr().out
    assert "suite relay at scale 0.005 (as asked): RelayAttention's" in output
    assert output.count("triton: needs a GPU") == 1
    document = json.loads(path.read_text())
    assert {row["case"]["dtype"] for row in document["rows"]} == {"fp32"}
    assert {row["status"] for row in document["rows"]} == {"ok"}
    assert document["settings"]["title"].startswith("suite relay at scale 0.005")


# Wrong, failing, refusing and absent implementations


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
    wrong, right = fake("wrong", change), fake("right")
    assert cli.main([*TINY, "--impl", "wrong,right", "--direction", "both"]) == cli.OK  # flashx is not to blame
    assert wrong.calls == 1
    assert right.calls > 2
    output = capsys.readouterr().out
    assert re.search(r"fwd\+bwd +wrong +WRONG", output)
    assert re.search(r"right +[\d.]+ ", output)
    assert re.search(r"wrong: wrong, .* is off by \S+, budget \S+", output)


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


def test_a_later_call_that_goes_wrong_is_not_timed(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is wrong the second time, and one that raises only while it is timed: the run goes on."""
    wrong = fake("wrong", lambda out: out if wrong.calls == 1 else -out)
    assert cli.main([*TINY, "--impl", "wrong,naive", "--direction", "fwd"]) == cli.OK
    assert wrong.calls == 2
    assert re.search(r"wrong +WRONG", capsys.readouterr().out)
    late = fake("late", lambda out: out if late.calls < 4 else out.reshape(0))
    assert cli.main([*TINY, "--impl", "late,naive", "--direction", "fwd"]) == cli.OK
    output = capsys.readouterr().out
    assert "failed: late, B1 H2 N64 D16 fp32 full fwd: one of the timed calls: RuntimeError: shape" in output


def test_refusals_show_their_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "NAIVE_LIMIT", 2**10)
    assert cli.main([*TINY, "--headdim", "257", "--direction", "fwd"]) == cli.OK
    output = capsys.readouterr().out
    assert re.search(r"flashx +REFUSED", output)
    assert re.search(r"naive +REFUSED", output)
    assert "refused: flashx, B1 H2 N64 D257 fp32 full fwd: cpu: head dim 257 is over 256" in output
    assert "refused: naive, B1 H2 N64 D257 fp32 full fwd: a score matrix takes" in output
    assert "flashx is exact" not in output


def test_reasons_are_told_once(fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]) -> None:
    fake("choosy", reasons=("not today",))
    fake("missing", missing="missing is not installed")
    impl = ["--impl", "flashx,choosy,missing,natten", "--direction", "fwd", "--causal", "both"]
    assert cli.main([*TINY, *impl]) == cli.OK
    output = capsys.readouterr().out
    assert "left out: missing: missing is not installed; natten: has nothing to do with these cases\n" in output
    assert "refused: choosy, B1 H2 N64 D16 fp32 full fwd and 1 more: not today\n" in output
    assert output.count("missing") == 2 and output.count("natten") == 1


def test_whoever_is_usual_exists() -> None:
    for names in USUAL.values():
        assert set(names) <= IMPLEMENTATIONS.keys() and "flashx" in names


# Ctrl-C, and going on


@pytest.fixture
def tired(fake: Callable[..., Fake]) -> Fake:
    """Interrupts at length 65, once."""

    def interrupt(out: torch.Tensor) -> torch.Tensor:
        if out.shape[2] == 65 and made.change is interrupt:
            made.change = torch.clone
            raise KeyboardInterrupt
        return out

    made = fake("tired", interrupt)
    return made


def test_interruption_keeps_what_was_measured_and_resume_goes_on(
    tired: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    arguments = [*TINY, "--seqlen", "64,65,66", "--direction", "fwd", "--impl", "flashx,tired", "--json", str(path)]
    assert cli.main(arguments) == cli.INTERRUPTED
    output = capsys.readouterr().out
    assert "N64" in output and "N66" not in output
    assert "interrupted after 1 of 3 cases" in output
    assert f"to go on: flashx-bench {' '.join(arguments)} --resume {path}" in output
    before = json.loads(path.read_text())
    assert before["interrupted"] is True
    assert [row["case"]["q_len"] for row in before["rows"]] == [64, 64]

    calls = tired.calls
    assert cli.main([*arguments, "--resume", str(path), "--impl", "flashx,tired,naive"]) == cli.OK
    after = json.loads(path.read_text())
    assert after["interrupted"] is False
    assert [(row["case"]["q_len"], row["implementation"]) for row in after["rows"]] == [
        (length, name) for length in (64, 65, 66) for name in ("flashx", "tired", "naive")
    ]
    # The same samples: what was there was not measured again, but the newcomer is compared with it.
    assert [row["samples"] for row in after["rows"][:2]] == [row["samples"] for row in before["rows"]]
    assert after["rows"][0]["ratios"].keys() == {"tired", "naive"}
    assert tired.calls == calls + 2 * (2 + 1 + 2)  # two cases: two checks, a round that does not count, two that do
    assert "flashx is exact in 3 of 3 rows" in capsys.readouterr().out


def test_resume_is_for_the_same_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    arguments = [*TINY, "--direction", "fwd", "--impl", "naive"]
    assert cli.main([*arguments, "--json", str(path)]) == cli.OK
    text = path.read_text()
    path.write_text(text.replace(f'"torch": "{torch.__version__}"', '"torch": "0.1"'))
    with pytest.raises(SystemExit) as error:
        cli.main([*arguments, "--resume", str(path)])
    assert error.value.code == 2
    assert f"is of another machine or build: torch is '0.1' and '{torch.__version__}'" in capsys.readouterr().err
    path.write_text(text.replace('"schema": 2', '"schema": 1'))
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--resume", str(path)])
    assert "must have schema 2, got 1" in capsys.readouterr().err


def test_a_busy_or_throttled_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.7, 0.0, 0.0))
    clocks = iter([3000.0, 2000.0])
    monkeypatch.setattr(environment, "cpu_mhz", lambda: next(clocks))
    assert cli.main([*TINY, "--direction", "fwd", "--impl", "naive"]) == cli.OK
    output = capsys.readouterr().out
    assert "warning: load average 1.70 before the start (over 0.5)" in output
    assert "warning: CPU clock fell from 3000 to 2000 MHz" in output


def test_the_probe_finds_a_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of which every call takes half a millisecond: the largest product that is short enough counts."""
    monkeypatch.undo()
    found = machine.probe(["fp32"], "cpu", lambda call: (call(), 5e-4)[1])
    assert found.gflops == {"fp32": pytest.approx(2 * 1024**3 / 5e5)}
    assert found.gbytes == pytest.approx(2**28 / 5e5)
    case = cases.Dense(64, 64)
    assert found.roof(case) == pytest.approx(min(found.gflops["fp32"], found.gbytes * case.flops() / case.bytes()))
    assert found.roof(cases.Dense(64, 64, dtype="bf16")) is None
