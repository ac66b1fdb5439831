"""What a run leaves behind: table, JSON, CSV, charts, page; and the comparison of two runs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flashx
from flashx.bench import check, cli, compare, page, plot, report, results
from flashx.bench.cases import CAUSAL, FULL, Case, Dense
from flashx.bench.machine import Machine
from flashx.bench.measure import Row, Status, compared, measure
from flashx.bench.peers import IMPLEMENTATIONS
from flashx.bench.prefixes import SharedPrefix, Tree
from flashx.bench.ragged import Decode, Varlen
from flashx.bench.results import Run
from flashx.bench.sparse import BlockSparse, Neighborhood
from flashx.bench.timing import Timing
from flashx.bench.variants import from_dict

STAMP = {
    "device": "cpu", "cpu": "CPU & Co", "threads": 2, "torch": "2", "commit": "c0", "load": 0.0, "mhz": None,
    "flashx": {"version": "1", "cpu_isa": "x"},
}  # fmt: skip
GOOD = {"out": check.Accuracy(1e-7, 1e-6)}


def row(case: Case, name: str, milliseconds: float | None, status: Status = "ok", spread: float = 0.01) -> Row:
    """A row whose samples lie evenly around a time."""
    samples = [milliseconds / 1e3 * (1 + spread * (i - 5) / 5) for i in range(11)] if milliseconds else None
    return Row(case, name, status, [], GOOD, samples and Timing(samples))


def run_of(times: dict[Case, dict[str, float | None]], **fields: Any) -> Run:
    """A run with the medians given, in milliseconds; None is a row that was wrong."""
    rows = []
    for case, names in times.items():
        rows += compared([row(case, name, ms, "ok" if ms else "wrong") for name, ms in names.items()])
    return Run(STAMP, {}, rows, machine=Machine({"fp32": 100.0, "bf16": 400.0}, 20.0), **fields)


def grid_run() -> Run:
    """Lengths at two head dims, and a case that is like no other."""
    times: dict[Case, dict[str, float | None]] = {}
    for dim in (64, 128):
        for length in (512, 1024, 2048, 4096):
            case = Dense(length, length, 4096 // length, head_dim=dim, value_dim=dim, window=CAUSAL)
            times[case] = {
                "flashx": length / 512,
                "torch": length / 300,
                "torch-math": length / 100,
                "naive": length / 90,
            }
    times[Tree((1, 8), (100, 10))] = {"flashx": 1.0, "torch": 3.0, "naive": 4.0}
    return run_of(times)


# JSON


def test_json_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        kinds = (Case,)

        def absent(self, device: str) -> None:
            return None

        def prepare(self, case: Case, inputs: Any) -> Any:
            return lambda *leaves: sum(leaves) * math.nan

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Wrong())
    path = tmp_path / "a.json"
    arguments = [
        "run", "--seqlen", "64", "--headdim", "16", "--heads", "2", "--repeats", "2", "--min-time", "0",
        "--device", "cpu", "--no-progress", "--impl", "flashx,torch,triton,wrong", "--direction", "both",
        "--json", str(path),
    ]  # fmt: skip
    assert cli.main(arguments) == 0

    document = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert list(tmp_path.iterdir()) == [path]
    assert document.keys() == {
        "schema", "environment", "machine", "settings", "absent", "warnings", "interrupted", "rows",
    }  # fmt: skip
    assert document["schema"] == results.SCHEMA == 2
    assert document["interrupted"] is False
    assert document["absent"] == {"triton": "needs a GPU, this run is on the cpu"}
    assert document["machine"].keys() == {"gflops", "gbytes"} and document["machine"]["gflops"].keys() == {"fp32"}
    assert document["machine"]["gbytes"] > 0 and document["machine"]["gflops"]["fp32"] > 0
    assert document["settings"] == {
        "arguments": arguments, "title": "", "device": "cpu", "impl": ["flashx", "torch", "triton", "wrong"],
        "repeats": 2, "min_time": 0.0,
    }  # fmt: skip
    environment = document["environment"]
    assert environment.keys() == {
        "device", "cpu", "cpus", "threads", "mhz", "governor", "load", "flashx", "commit", "torch", "python", "system",
    }  # fmt: skip
    assert environment["flashx"] == flashx.build_info()
    assert environment["torch"] == torch.__version__

    flash, torch_, wrong = document["rows"]
    case = Dense(64, 64, head_dim=16, value_dim=16, q_heads=2, kv_heads=2, direction="both")
    for it in document["rows"]:
        assert it.keys() == {
            "case", "label", "implementation", "status", "reasons", "accuracy", "flops", "bytes", "median", "p20",
            "p80", "samples", "gflops", "gbytes", "ratio_to_torch", "ratios",
        }  # fmt: skip
        assert from_dict(it["case"]) == case and it["label"] == str(case)
    for it in (flash, torch_):
        assert it["status"] == "ok" and it["reasons"] == []
        assert it["accuracy"].keys() == {"out", "grad_query", "grad_key", "grad_value"}
        assert all(0 <= accuracy["error"] <= accuracy["budget"] for accuracy in it["accuracy"].values())
        assert len(it["samples"]) >= 2
        assert min(it["samples"]) <= it["p20"] <= it["median"] <= it["p80"] <= max(it["samples"])
        assert it["gflops"] == pytest.approx(it["flops"] / it["median"] / 1e9)
        assert it["gbytes"] == pytest.approx(it["bytes"] / it["median"] / 1e9)
        assert it["ratio_to_torch"] == pytest.approx(torch_["median"] / it["median"])
    assert flash["ratios"] == {"torch": pytest.approx(torch_["median"] / flash["median"])}
    assert wrong["status"] == "wrong" and wrong["accuracy"]["out"]["error"] is None
    assert all(wrong[name] is None for name in ("median", "p20", "p80", "samples", "gflops", "ratio_to_torch"))

    # And back.
    again = results.read(path)
    assert [(it.case, it.implementation, it.status) for it in again.rows] == [
        (case, name, status) for name, status in (("flashx", "ok"), ("torch", "ok"), ("wrong", "wrong"))
    ]
    assert json.loads(results.as_json(again)) == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("[]", "must have schema 2, got None"),
        ('{"schema": 1}', "must have schema 2, got 1"),
        ('{"schema": 2}', "is no run of flashx-bench: KeyError"),
    ],
)
def test_what_is_no_run(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        results.read(path)


def test_ratios_are_to_the_fastest_of_torchs() -> None:
    case = Dense(64, 64)
    rows = compared([row(case, "flashx", 2.0), row(case, "torch-flash", 3.0), row(case, "torch-math", 20.0)])
    assert [it.ratio_to_torch for it in rows] == [pytest.approx(1.5), 1.0, pytest.approx(0.15)]
    assert rows[0].ratios == {"torch-flash": pytest.approx(1.5), "torch-math": pytest.approx(10)}
    assert compared([row(case, "flashx", 2.0), row(case, "torch", None, "failed")])[0].ratio_to_torch is None
    assert compared([row(case, "flashx", 2.0), row(case, "torchish", 1.0)])[0].ratio_to_torch is None


def test_csv(tmp_path: Path) -> None:
    text = results.as_csv(grid_run().rows)
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 8 * 4 + 3 and tuple(lines[0]) == results.CSV_COLUMNS
    assert lines[0]["label"] == "B8 H4 N512 D64 fp32 causal" and lines[0]["implementation"] == "flashx"
    assert float(lines[0]["median"]) == pytest.approx(1e-3) and lines[0]["status"] == "ok"
    assert float(lines[0]["ratio_to_torch"]) == pytest.approx(512 / 300)
    assert float(lines[0]["max_error"]) == 1e-7


# The table


def rendered(run: Run, width: int) -> str:
    output = io.StringIO()
    report.show(Console(file=output, width=width), run)
    return output.getvalue()


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    case = Dense(
        33, 33, 10, (10, 10), head_dim=8, value_dim=8, q_heads=8, kv_heads=2, dtype="bf16", direction="both"
    )  # fmt: skip
    chosen = {name: IMPLEMENTATIONS[name] for name in ("flashx", "torch", "naive")}
    return measure(case, chosen, repeats=2, min_time=0)


@pytest.mark.parametrize("width", [80, 90, 100, 120, 200])
def test_numbers_never_break(measured: list[Row], width: int) -> None:
    output = rendered(Run(STAMP, {}, measured, machine=Machine({"bf16": 100.0}, 10.0)), width)
    assert "…" not in output
    assert all(len(line) <= width for line in output.splitlines())
    table = output[output.index("─") :].splitlines()
    for it in measured:
        assert it.timing is not None and it.gflops is not None
        line = next(line for line in table if f" {it.implementation} " in line)
        assert report.number(1e3 * it.timing.median) in line.split()
        assert report.number(it.gflops) in line.split()
    assert ("p80" in output) == (width >= 110)
    assert ("% roof  " in output or "% roof " in table[0]) or width < 120


def test_a_failure_is_never_dressed_up(measured: list[Row]) -> None:
    bad = {"out": check.Accuracy(math.nan, 1e-3), "grad_key": check.Accuracy(1e-4, 1e-3)}
    wrong = Row(measured[0].case, "flashx", "wrong", accuracy=bad)
    output = rendered(Run(STAMP, {}, [wrong, *measured[1:]], warnings=["so busy"]), 120)
    assert re.search(r"flashx +WRONG +nan +1\.0e-03", output)
    assert "out is off by nan, budget 0.001" in output
    assert "grad_key is off" not in output
    assert "warning: so busy" in output


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


# Comparison


def saved(path: Path, run: Run) -> str:
    results.write(path, run)
    return str(path)


CASE, OTHER = Dense(64, 64), Dense(128, 128)


@pytest.mark.parametrize(
    ("before", "after", "code", "words"),
    [
        ({"flashx": 1.0, "torch": 2.0}, {"flashx": 1.02, "torch": 2.0}, 0, "2 rows compared (threshold 5 %): 2 same"),
        ({"flashx": 1.0, "torch": 2.0}, {"flashx": 1.2, "torch": 1.0}, 1, "1 slower, 1 faster"),
        ({"flashx": 1.0}, {"flashx": 0.5}, 0, "1 faster"),
        ({"flashx": 1.0}, {"flashx": None}, 1, "1 broken"),
        ({"flashx": None}, {"flashx": None}, 0, "1 same"),
        ({"flashx": 1.0, "naive": 1.0}, {"flashx": 1.0, "torch": 1.0}, 0, "only in the first run: naive, B1 H4 N64"),
    ],
)
def test_compare(
    before: dict[str, float | None], after: dict[str, float | None], code: int, words: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = [saved(tmp_path / f"{i}.json", run_of({CASE: times})) for i, times in enumerate((before, after))]
    assert cli.main(["compare", *paths]) == code
    output = capsys.readouterr().out
    assert words in output
    if "torch" in after and "torch" not in before:
        assert "only in the second run: torch, B1 H4 N64" in output


def test_compare_takes_a_threshold_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = saved(tmp_path / "a.json", run_of({CASE: {"flashx": 1.0, "torch": 1.0}}))
    second = saved(tmp_path / "b.json", run_of({CASE: {"flashx": 1.2, "torch": 9.0}}))
    assert cli.main(["compare", first, second, "--impl", "flashx", "--threshold", "30"]) == 0
    assert cli.main(["compare", first, second, "--impl", "flashx", "--threshold", "10"]) == 1
    assert "torch" not in capsys.readouterr().out
    assert cli.main(["compare", first, second, "--threshold", "30"]) == 1


def test_compare_of_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [saved(tmp_path / f"{i}.json", run_of({case: {"flashx": 1.0}})) for i, case in enumerate((CASE, OTHER))]
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", *paths])
    assert error.value.code == 2
    assert "have no row in common" in capsys.readouterr().err


def test_other_machines_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of({CASE: {"flashx": 1.0}})
    first = saved(tmp_path / "a.json", run)
    run.environment = STAMP | {"cpu": "another"}
    assert cli.main(["compare", first, saved(tmp_path / "b.json", run)]) == 0
    assert "note: cpu is 'CPU & Co' and 'another'" in capsys.readouterr().out


def test_noise_is_no_regression() -> None:
    """Medians that differ by 10 %, under samples that scatter by half; and the same medians without the scatter."""
    noisy = compare.pair(row(CASE, "flashx", 1.0, spread=0.5), row(CASE, "flashx", 1.1, spread=0.5), 0.05)
    clear = compare.pair(row(CASE, "flashx", 1.0), row(CASE, "flashx", 1.1), 0.05)
    assert noisy.ratio == pytest.approx(clear.ratio) == pytest.approx(1.1)
    assert noisy.verdict == "same" and clear.verdict == "slower"
    assert noisy.low is not None and noisy.high is not None and noisy.low < 1.0 < 1.2 < noisy.high
    assert clear.low is not None and clear.high is not None and 1.08 < clear.low < 1.1 < clear.high < 1.12


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Samples of 21 from one distribution twice: the true ratio, 1, is inside about 95 times of 100."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(100):
        first, second = (1 + 0.1 * torch.randn(2, 21, generator=generator)).tolist()
        low, high = compare.interval(first, second)
        inside += low <= 1 <= high
    assert 88 <= inside <= 100
    assert compare.interval([1.0], [2.0]) == (2.0, 2.0)


# Charts


def ink(path: Path) -> dict[tuple[int, ...], int]:
    """How many pixels a picture has of each colour, white aside."""
    image = pytest.importorskip("matplotlib.image").imread(path)
    pixels = torch.from_numpy((image[..., :3] * 255).round()).long() @ torch.tensor([65536, 256, 1])
    colors, counts = pixels.unique(return_counts=True)
    found = {
        (color >> 16, color >> 8 & 255, color & 255): count
        for color, count in zip(colors.tolist(), counts.tolist(), strict=True)
    }
    found.pop((255, 255, 255), None)
    return found


@pytest.fixture
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("matplotlib")
def test_a_chart_is_not_blank(tmp_path: Path) -> None:
    """Pixels of flashx's colour, of torch's, of naive's, and of the ink of words and axes."""
    data, picture = saved(tmp_path / "a.json", grid_run()), tmp_path / "a.png"
    assert cli.main(["plot", data, "-o", str(picture)]) == 0
    found = ink(picture)
    for color in ((213, 94, 0), (0, 114, 178), (140, 140, 140), (51, 51, 51)):
        assert found.get(color, 0) > 100, color
    vector = tmp_path / "a.svg"
    assert cli.main(["plot", data, "-o", str(vector)]) == 0
    assert vector.read_text().count("<path") > 50


@pytest.mark.usefixtures("matplotlib")
def test_a_chart_of_nothing(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.json", run_of({CASE: {"flashx": None}}))
    assert cli.main(["plot", data, "-o", str(tmp_path / "a.png")]) == 0
    assert (
        cli.main(["plot", saved(tmp_path / "b.json", run_of({CASE: {"naive": 1.0}})), "-o", str(tmp_path / "b.svg")])
        == 0
    )


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("count", [1, 2, 4, 7, 20])
def test_any_number_of_panels(count: int, tmp_path: Path) -> None:
    times: dict[Case, dict[str, float | None]] = {
        Dense(length, length, head_dim=8 * (dim + 1), value_dim=8): {"flashx": 1.0, "torch": 2.0}
        for dim in range(count)
        for length in (64, 128, 256)
    }
    plot.save(tmp_path / "a.svg", [("a", run_of(times))])


def test_panels_go_along_what_differs() -> None:
    """Lengths with as many tokens each are one line; single cases are on no line."""
    panels, single = plot.panels(plot.points([("a", grid_run())]))
    assert [(panel.title, panel.axis) for panel in panels] == [
        ("H4 D64 fp32 causal fwd", "keys"), ("H4 D128 fp32 causal fwd", "keys")
    ]  # fmt: skip
    assert [place for place, point in panels[0].points if point.name == "flashx"] == [512, 1024, 2048, 4096]
    assert {type(point.row.case) for point in single} == {Tree}


@pytest.mark.parametrize(
    ("cases", "axis", "places"),
    [
        ([BlockSparse(256, sparsity=share) for share in (0.9, 0.0, 0.5)], "% of blocks hidden", [0, 50, 90]),
        ([SharedPrefix(8, length, 4) for length in (64, 128, 256)], "keys of the prefix", [64, 128, 256]),
        ([SharedPrefix(8, 64, length) for length in (4, 8, 16)], "own keys", [4, 8, 16]),
        ([Decode((length,) * 2) for length in (64, 128, 256)], "keys in the cache", [64, 128, 256]),
        ([Varlen((length, 1)) for length in (7, 8, 9)], "tokens", [8, 9, 10]),
        ([Dense(64, 64, window=(width, 0)) for width in (1, 2, 3)], "window", [1, 2, 3]),
        ([Neighborhood((9,), (5,), (stride,), (1,)) for stride in (1, 2, 5)], "stride", [1, 2, 5]),
        ([Dense(1, length, window=CAUSAL) for length in (64, 128, 256)], "keys", [64, 128, 256]),
    ],
)
def test_every_variant_has_an_axis(cases: list[Case], axis: str, places: list[float]) -> None:
    run = run_of({case: {"flashx": 1.0, "torch": 2.0} for case in cases})
    (panel,), single = plot.panels(plot.points([("a", run)]))
    assert panel.axis == axis and single == []
    assert [place for place, point in panel.points if point.name == "flashx"] == places


def test_batches_that_differ_by_themselves_are_lines_of_their_own() -> None:
    cases = [Dense(length, length, batch) for batch in (1, 8) for length in (64, 128, 256)]
    panels, _ = plot.panels(plot.points([("a", run_of({case: {"flashx": 1.0, "torch": 2.0} for case in cases}))]))
    assert [panel.title for panel in panels] == ["B1 H4 D64 fp32 full fwd", "B8 H4 D64 fp32 full fwd"]


def test_runs_are_told_apart_where_they_share_rows() -> None:
    one, other = run_of({CASE: {"flashx": 1.0}}), run_of({OTHER: {"flashx": 1.0}})
    assert {point.name for point in plot.points([("a", one), ("b", other)])} == {"flashx"}
    assert {point.name for point in plot.points([("a", one), ("b", one)])} == {"flashx (a)", "flashx (b)"}


def test_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    for flag in ("--plot", "--html"):
        with pytest.raises(SystemExit) as error:
            cli.main(["run", "--seqlen", "8", flag, str(tmp_path / "a.png")])
        assert error.value.code == 2
        assert "charts need matplotlib: pip install 'flashx[plot]'" in capsys.readouterr().err


# The page


@pytest.mark.usefixtures("matplotlib")
def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    run = grid_run()
    run.rows.append(Row(CASE, "naive", "refused", ["too <large>"]))
    run.absent, run.warnings, run.interrupted = {"flash_attn": "is not installed"}, ["so busy"], True
    text = page.render(run)
    assert text.count("<svg") == text.count("</svg>") == 2
    assert text.count("<tr") == 1 + len(run.rows)
    assert not re.search(r"(src|href)=\"(?!#)", text), "a link to something else"
    for words in (
        "CPU &amp; Co, 2 threads", "flashx is exact in 9 of 9 rows", "B8 H4 N512 D64 fp32 causal", "REFUSED",
        "too &lt;large&gt;", "flash_attn: is not installed", "warning: so busy", "was interrupted",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.usefixtures("matplotlib")
def test_a_run_writes_everything_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"--json": "a.json", "--csv": "a.csv", "--plot": "a.png", "--html": "a.html"}
    outputs = [part for flag, name in names.items() for part in (flag, str(tmp_path / name))]
    arguments = ["--variant", "shared-prefix", "--prefix", "8,16,32", "--suffix", "4", "--headdim", "8", "--heads", "2"]
    quick = ["--repeats", "2", "--min-time", "0", "--device", "cpu", "--direction", "fwd"]
    assert cli.main(["run", *arguments, *quick, *outputs]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())
    assert sum(ink(tmp_path / "a.png").values()) > 1000
    assert "<svg" in (tmp_path / "a.html").read_text()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(rows) == 1 + 3 * 5


def test_tables_of_mixed_rows_keep_a_case_together() -> None:
    case = Dense(64, 64, window=FULL)
    run = Run(STAMP, {}, [row(case, "flashx", 1.0), row(OTHER, "flashx", 1.0), row(case, "torch", 2.0)])
    assert [[it.implementation for it in rows] for rows in run.by_case()] == [["flashx", "torch"], ["flashx"]]
    assert replace(case) == case
