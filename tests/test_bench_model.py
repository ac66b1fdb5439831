"""``flashx-bench model`` as a user runs it: exit codes, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CUDA_ENGINES

from flashx import io
from flashx.bench import model
from flashx.io import examples

emulated = pytest.mark.skipif("cuda_emulated" not in CUDA_ENGINES, reason="this build has no emulator")


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of a run that goes well."""
    assert model.main([*arguments, "--json", "-"]) == model.OK
    return json.loads(capsys.readouterr().out)


def test_as_a_command(tmp_path: Path) -> None:
    """From anywhere, into a pipe: the whole table, and nothing on stderr."""
    command = [sys.executable, "-m", "flashx.bench.model", "--seqlen", "512", "--machine", "H200,A100"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert result.returncode == 0 and not result.stderr.strip()
    for word in (*model.ALGORITHMS, "H200", "A100", "bound by", "GFLOP"):
        assert word in result.stdout


def test_help_says_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        model.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "exit codes" in shown
    commands = [line.strip().split("   ")[0] for line in shown.splitlines() if line.startswith("  flashx-bench model")]
    assert len(commands) > 8
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    for command in commands:
        parser.parse_args(command.split()[2:])


def test_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--seqlen", "1024", "--headdim", "64", "--heads", "4", "--causal", "--machine", "H100")
    assert found["schema"] == model.SCHEMA and found["machines"][0]["source"]
    rows = {row["algorithm"]: row for row in found["rows"]}
    assert set(rows) == set(model.ALGORITHMS)
    call = io.problem(1024, heads=4, causal=True)
    cost = io.kernels.forward(call)
    assert rows["flashx"]["flops"] == cost.flops and rows["flashx"]["read"] == cost.read
    assert rows["flashx"]["seconds"] == io.predict(cost, io.machine("H100"), call.dtype).seconds
    moved = [rows[name]["read"] + rows[name]["written"] for name in ("compulsory", "flashx", "standard")]
    assert moved == sorted(moved)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--algorithm", "standard,compulsory"], ["standard", "compulsory"]),
        (["--seqlen", "1x64", "--prefix", "4096", "--batch", "8"], ["shared prefix", "concatenated"]),
        (
            ["--density", "0.2", "--seqlen", "1024"],
            ["flashx", "block-sparse", "compulsory", "dense, flash-attention-2"],
        ),
        (["--direction", "both", "--window", "256,0", "--dtype", "float32", "--kv-heads", "4"], list(model.ALGORITHMS)),
    ],
    ids=str,
)
def test_cases(capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]) -> None:
    rows = document(capsys, *arguments)["rows"]
    assert [row["algorithm"] for row in rows] == names
    assert all(row["seconds"] > 0 and row["bound_by"] in io.Parts._fields for row in rows)
    assert model.main(arguments) == model.OK and names[0] in capsys.readouterr().out


def test_efficiency_and_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--seqlen", "8192", "--algorithm", "flashx"]
    peak, half, serial = (
        document(capsys, *case, *more)["rows"][0]["seconds"]
        for more in ([], ["--efficiency", "0.5,0.9"], ["--overlap", "0"])
    )
    assert half == pytest.approx(2 * peak, rel=0.01) and peak < serial < 4 * peak


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    rows = document(capsys, "--example", "gpt2-medium")["example"]
    assert [round(row["bytes"] / 1e9, 1) for row in rows if row["published"]] == [40.3, 4.7]
    assert [row["published"]["gigabytes"] for row in rows if row["published"]] == [40.3, 4.4]
    assert model.main(["--example", "gpt2-medium"]) == model.OK
    shown = capsys.readouterr().out
    assert "-0.1 %" in shown and "+5.9 %" in shown
    assert all(note.split(".")[0][:60] in shown for note in examples.NOTES)


def test_a_ring(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--seqlen", "1048576", "--heads", "32", "--causal", "--ring", "1,8,512,4096", "--machine", "H200,B200"]
    rows = document(capsys, *case)["ring"]
    assert [row["ranks"] for row in rows] == [1, 8, 512, 4096] * 2
    assert rows[0]["efficiency"] == 1 and rows[3]["bound_by"] == "link"
    assert model.main(case) == model.OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "it stops paying at 512 ranks" in shown and "over the slow ones (50.0 GB/s)" in shown


def test_a_sweep_of_fast_memories(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--seqlen", "4096", "--headdim", "64", "--sram", "64,1K,8K,64K"]
    rows = document(capsys, *case)["sram"]
    assert [row["elements"] for row in rows] == [32, 512, 4096, 32768]
    assert [row["small_regime"] for row in rows] == [True, True, False, False]
    assert rows[0]["flash"] is None and rows[1]["small"] < rows[1]["flash"] and rows[3]["flash"] < rows[3]["small"]
    assert model.main(case) == model.OK and "does not fit" in capsys.readouterr().out


def test_json_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    assert model.main(["--seqlen", "256", "--json", str(path)]) == model.OK
    assert json.loads(path.read_text())["rows"] and "flashx" in capsys.readouterr().out


@emulated
@pytest.mark.parametrize("direction", ["fwd", "bwd", "both"])
def test_check(capsys: pytest.CaptureFixture[str], direction: str) -> None:
    case = ["--seqlen", "130x200", "--headdim", "32", "--heads", "2", "--kv-heads", "1", "--causal", "--check"]
    found = document(capsys, *case, "--direction", direction)["check"]
    assert found["error"] == 0 and set(found["tensors"].values()) == {0}
    assert model.main([*case, "--direction", direction]) == model.OK
    assert "counted by the emulator" in capsys.readouterr().out


def test_measure(capsys: pytest.CaptureFixture[str]) -> None:
    """The error is stated; how large it is, is the machine's."""
    case = ["--seqlen", "256", "--headdim", "32", "--heads", "2", "--dtype", "fp32", "--machine", "cpu", "--measure"]
    found = document(capsys, *case)["measured"]
    assert found["seconds"] > 0 and found["error"] == pytest.approx(found["predicted"] / found["seconds"] - 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--machine", "H300"], "machine must be one of A100, .*, cpu, got 'H300'"),
        (["--seqlen", "12x"], "argument --seqlen: must be an integer of at least 1, got ''"),
        (["--dtype", "fp64"], "dtype must be one of fp16, bf16, fp32, got 'fp64'"),
        (["--algorithm", "magic"], "algorithm must be one of flashx, .*got 'magic'"),
        (["--window", "-1"], "must be an integer of at least 0 or 'none', got '-1'"),
        (["--efficiency", "0"], "must be over 0, got '0'"),
        (["--overlap", "2"], r"must be a number in \[0, 1\], got '2'"),
        (["--sram", "K"], "must be an integer of at least 1, got ''"),
        (["--example", "gpt5"], "invalid choice: 'gpt5'"),
        (["--heads", "5", "--kv-heads", "2"], "heads must be a multiple of kv_heads, got 5 and 2"),
        (["--headdim", "300"], "at most 256 for the CUDA kernels, got 300"),
        (["--seqlen", "100000", "--check"], "the emulator is slow, got about"),
        (["--seqlen", "64", "--prefix", "8", "--direction", "bwd"], "--prefix must have --direction fwd, got bwd"),
        (["--density", "0.5", "--causal"], "--density must be without --causal and --window"),
        (["--sram", "1K", "--headdim", "64x32"], "--sram must have one length and one head dim"),
        (["--ring", "2", "--seqlen", "8x9"], "q_len must be k_len for a ring, got 8 and 9"),
        (["--measure"], "--measure must have --machine cpu"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json cannot be written: No such file"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    try:
        code: Any = model.main(arguments)
    except SystemExit as end:  # argparse's own
        code = end.code
    shown = capsys.readouterr()
    assert code == model.BAD_ARGUMENTS and not shown.out
    assert re.search(message, shown.err), shown.err
