"""The command line: ``flashx-bench`` and ``python -m flashx.bench``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import cases, compare, environment, grid, machine, page, plot, report, results, suites, timing
from .cases import DIRECTIONS, Case, Direction
from .implementations import Implementation
from .measure import Row, compared, measure
from .peers import IMPLEMENTATIONS, USUAL
from .results import Run

# Exit codes; argparse exits with 2 on bad arguments.
OK, WRONG, INTERRUPTED = 0, 1, 130

# Width of the whole table, for output that goes to a file.
FULL_WIDTH = 160

# The tour is for everyone, and short: no compiler, no peer that has to be installed.
TOUR = ["flashx", "torch", "naive"]
TOUR_DIRECTIONS: list[Direction] = ["fwd", "both"]

# Commands that modules of their own add: their module and their line in the help.
EXTENSIONS = {
    "model": ("model", "predict bytes and times, and what bounds a case"),
    "cpu-report": ("cpu_report", "the figures of this machine's CPU, as the documentation has them"),
}

DESCRIPTION = """\
Measure how exact and how fast attention is: flashx, torch's attention and whatever else is installed. Every result is
compared with naive attention in float64 before it is timed. Without arguments: a tour, about a minute."""

EPILOG = """\
exit codes: 0 all well, 1 a flashx row is wrong or failed (compare: something became slower), 2 bad arguments,
130 interrupted (Ctrl-C; what was measured until then is reported). Examples:

  flashx-bench                                                    a first look
  flashx-bench run --seqlen 512,1024,2048 --causal both           a grid
  flashx-bench run --variant decode --cache 8192 --heads 32 --kv-heads 8 --page 0,16
  flashx-bench suite                                              the protocols there are
  flashx-bench suite relay --json relay.json --html relay.html    one of them, with its charts
  flashx-bench compare before.json after.json --threshold 5       what became slower
  flashx-bench plot relay.json -o relay.svg"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        SystemExit: with code 2 on bad arguments, 0 after --help.
    """
    given = routed(list(sys.argv[1:] if arguments is None else arguments))
    parser = build_parser(given[0])
    options = parser.parse_args(given)
    options.arguments = given
    handler: Callable[[argparse.Namespace], int] = options.handler
    try:
        return handler(options)
    except Complaint as complaint:
        command: argparse.ArgumentParser = options.parser
        command.error(str(complaint))


class Complaint(Exception):
    """Arguments that argparse cannot know to be bad."""


def routed(arguments: list[str]) -> list[str]:
    """The arguments with a command in front: flags alone are run's."""
    if not arguments:
        return ["run"]
    if arguments[:2] == ["suite", "cpu-report"]:
        return arguments[1:]
    return arguments if arguments[0] in ("-h", "--help") or not arguments[0].startswith("-") else ["run", *arguments]


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of ``flashx-bench``; of EXTENSIONS only the command that is going to run is loaded."""
    parser = argparse.ArgumentParser(
        "flashx-bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_help_format,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str, handler: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=_help_format
        )
        made.set_defaults(handler=handler, parser=made)
        return made

    run = add("run", "measure a grid of cases of any variant; without options the tour", _run)
    run.usage = "%(prog)s [--variant NAME] [options]"
    grid.add_arguments(run)
    _add_measuring(run)

    suite = add("suite", "measure a named protocol; without a name, list them", _suite)
    suite.usage = "%(prog)s [NAME] [options]"
    suite.add_argument("name", nargs="?", metavar="NAME", help="one of: " + ", ".join([*suites.SUITES, "cpu-report"]))
    suite.add_argument(
        "--scale",
        type=_scale,
        metavar="S",
        help="share of the published size, above 0 up to 1 (what suits the machine)",
    )
    suite.add_argument("--dtype", type=grid.dtype, metavar="DTYPE", help="dtype (CPU: fp32; GPU: the protocol's)")
    _add_measuring(suite)

    comparison = add("compare", "what became slower from one run to another; exit code 1 if anything did", _compare)
    comparison.add_argument("first", type=Path, metavar="A.json")
    comparison.add_argument("second", type=Path, metavar="B.json")
    comparison.add_argument(
        "--threshold", type=grid.number("a percentage"), default=5.0, metavar="PERCENT",
        help="differences up to this do not count (5)",
    )  # fmt: skip
    comparison.add_argument("--impl", type=_names, metavar="NAME,...", help="only these implementations (all)")

    chart = add("plot", "charts of one run or several: speed-up over torch, and a roofline", _plot)
    chart.add_argument("runs", type=Path, nargs="+", metavar="RUN.json")
    chart.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help="ends on .png, .svg or .pdf")

    about = add("env", "this machine, this build, and the implementations that can run here", _env)
    about.add_argument("--json", action="store_true", help="as JSON")

    for name, (module, text) in EXTENSIONS.items():
        made = add(name, text, _missing)
        if command == name and (loaded := _extension(module)) is not None:
            loaded.add_arguments(made)
            made.set_defaults(handler=loaded.run)
    return parser


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)


def _extension(module: str) -> ModuleType | None:
    name = f"{__package__}.{module}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def _missing(options: argparse.Namespace) -> int:
    raise Complaint("this installation does not have it")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("what to measure, and how")
    how.add_argument(
        "--direction",
        type=grid.several(grid.choice("direction", DIRECTIONS)),
        metavar="DIR,...",
        help="fwd, bwd, or both: forward and backward in one (run: fwd,both; suite: the protocol's)",
    )
    how.add_argument(
        "--impl",
        type=_names,
        metavar="NAME,...",
        help="implementations: all, or some of " + ", ".join(IMPLEMENTATIONS) + " (those that the device calls for)",
    )
    how.add_argument("--device", choices=["cpu", "cuda"], help="where to run (cuda where torch sees a GPU)")
    how.add_argument("--threads", type=grid.positive, metavar="N", help="torch's number of threads (torch's choice)")
    how.add_argument("--repeats", type=grid.positive, default=5, metavar="N", help="samples of each row, at least (5)")
    how.add_argument(
        "--min-time", type=grid.number("a number of seconds"), default=0.3, metavar="S",
        help="seconds of samples of each row, at least (0.3)",
    )  # fmt: skip
    how.add_argument("--dry-run", action="store_true", help="only list the cases")
    how.add_argument("--no-progress", action="store_true", help="no progress bar")
    out = parser.add_argument_group("what to keep")
    out.add_argument("--json", type=Path, metavar="PATH", help="everything measured, written after each case")
    out.add_argument("--csv", type=Path, metavar="PATH", help="a line for each row")
    out.add_argument("--plot", type=Path, metavar="PATH", help="charts; ends on .png, .svg or .pdf")
    out.add_argument("--html", type=Path, metavar="PATH", help="table and charts in one page")
    out.add_argument(
        "--resume", type=Path, metavar="RUN.json",
        help="do not measure again what is in there, and add to it (or to --json); the other options as before",
    )  # fmt: skip


def _names(text: str) -> list[str]:
    if text == "all":
        return list(IMPLEMENTATIONS)
    return grid.several(grid.choice("implementation", IMPLEMENTATIONS))(text)


def _scale(text: str) -> float:
    value = grid.number("a number")(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


# run and suite


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command is going to measure."""

    cases: list[Case]
    names: Sequence[str]
    title: str = ""


def _run(options: argparse.Namespace) -> int:
    device = _device(options)
    directions = options.direction or TOUR_DIRECTIONS
    if grid.is_empty(options):
        return _execute(Plan(cases.tour(directions), options.impl or TOUR), device, options)
    try:
        found = grid.cases(options, directions)
    except ValueError as error:
        raise Complaint(str(error)) from None
    return _execute(Plan(found, options.impl or USUAL[device]), device, options)


def _suite(options: argparse.Namespace) -> int:
    console = _console()
    device = _device(options)
    scale = options.scale or suites.default_scale(device)
    reason = "as asked" if options.scale else f"what suits this machine's {'GPU' if device == 'cuda' else 'CPU'}"
    if options.name is None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("suite", "cases", "protocol"):
            table.add_column(title, justify="right" if title == "cases" else "left")
        for name, suite in suites.SUITES.items():
            table.add_row(name, str(len(suite.cases(scale, None, options.direction))), suite.text)
        table.add_row("cpu-report", "", EXTENSIONS["cpu-report"][1])
        console.print(table)
        console.print(Text(f"at scale {scale:g} ({reason}); --scale 1 is as published", style="dim"))
        return OK
    if options.name not in suites.SUITES:
        raise Complaint(f"suite must be one of {', '.join([*suites.SUITES, 'cpu-report'])}, got {options.name!r}")
    suite = suites.SUITES[options.name]
    dtype = options.dtype or ("fp32" if device == "cpu" else None)
    found = suite.cases(scale, dtype, options.direction)
    if not found:
        raise Complaint(f"{options.name} has no cases in direction {','.join(options.direction)}")
    title = f"suite {options.name} at scale {scale:g} ({reason}): {suite.text}"
    return _execute(Plan(found, options.impl or USUAL[device], title), device, options)


def _device(options: argparse.Namespace) -> str:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise Complaint(f"argument --device: torch {torch.__version__} sees no GPU here")
    return options.device or ("cuda" if available else "cpu")


def _execute(plan: Plan, device: str, options: argparse.Namespace) -> int:
    console = _console()
    if options.dry_run:
        for case in plan.cases:
            console.print(Text(f"{case} {report.DIRECTIONS[case.direction]}"))
        return OK
    _check_outputs(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        stamp = environment.stamp(device)
    except ValueError as error:  # FLASHX_CPU_ISA names what this machine does not have
        raise Complaint(str(error)) from None
    run = Run(stamp, _settings(plan, device, options))
    if options.resume is not None:
        run.rows = _rows_so_far(options.resume, run)
    target: Path | None = options.json or options.resume
    run.absent, chosen = _implementations(plan, device, explicit=options.impl is not None)
    run.interrupted = not _measure(plan, chosen, device, run, options, target)
    after = environment.cpu_mhz() if device == "cpu" else None
    run.warnings = environment.warnings(stamp, after)
    if plan.title:
        console.print(Text(plan.title, style="bold"))
    report.show(console, run)
    if target is not None:
        results.write(target, run)
    if options.csv is not None:
        options.csv.write_text(results.as_csv(run.rows))
    if options.plot is not None:
        plot.save(options.plot, [(options.plot.stem, run)])
    if options.html is not None:
        options.html.write_text(page.render(run))
    if run.interrupted:
        measured = len({row.case for row in run.rows})
        console.print(f"interrupted after {measured} of {len(plan.cases)} cases", style="bold yellow")
        if target is not None:
            command = shlex.join(["flashx-bench", *_without_resume(options.arguments), "--resume", str(target)])
            console.print(Text(f"to go on: {command}"), soft_wrap=True)
        return INTERRUPTED
    bad = [row for row in run.rows if row.implementation == "flashx" and row.status in ("wrong", "failed")]
    return WRONG if bad else OK


def _settings(plan: Plan, device: str, options: argparse.Namespace) -> dict[str, object]:
    return {
        "arguments": options.arguments,
        "title": plan.title,
        "device": device,
        "impl": list(plan.names),
        "repeats": options.repeats,
        "min_time": options.min_time,
    }


def _rows_so_far(path: Path, run: Run) -> list[Row]:
    """The rows of a run to go on with; it must be this machine's and this build's."""
    try:
        before = results.read(path)
    except ValueError as error:
        raise Complaint(f"argument --resume: {error}") from None
    if differences := environment.same_machine(before.environment, run.environment):
        raise Complaint(f"argument --resume: {path} is of another machine or build: {'; '.join(differences)}")
    return before.rows


def _implementations(plan: Plan, device: str, explicit: bool) -> tuple[dict[str, str], dict[str, Implementation]]:
    """Who is left out and why, and who is not. Whoever has nothing to do with the cases is only told if asked for."""
    absent: dict[str, str] = {}
    chosen: dict[str, Implementation] = {}
    for name in plan.names:
        implementation = IMPLEMENTATIONS[name]
        if not any(isinstance(case, implementation.kinds) for case in plan.cases):
            if explicit:
                absent[name] = "has nothing to do with these cases"
        elif (reason := implementation.absent(device)) is not None:
            absent[name] = reason
        else:
            chosen[name] = implementation
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise Complaint(f"none of the implementations can run here: {reasons}")
    return absent, chosen


def _measure(
    plan: Plan,
    chosen: Mapping[str, Implementation],
    device: str,
    run: Run,
    options: argparse.Namespace,
    target: Path | None,
) -> bool:
    """Add the rows that are missing; False if Ctrl-C cut them short."""
    known = {(row.case, row.implementation) for row in run.rows}
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        disable=options.no_progress or not sys.stderr.isatty(),
    )
    try:
        clock = _clock(device)
        run.machine = machine.probe([case.dtype for case in plan.cases], device, clock)
        with progress:
            task = progress.add_task("", total=len(plan.cases))
            for case in plan.cases:
                progress.update(task, description=f"{case} {report.DIRECTIONS[case.direction]}")
                missing = {
                    name: implementation
                    for name, implementation in chosen.items()
                    if isinstance(case, implementation.kinds) and (case, name) not in known
                }
                if missing:
                    rows = measure(case, missing, options.repeats, options.min_time, device, clock)
                    before = [row for row in run.rows if row.case == case]
                    run.rows = [row for row in run.rows if row.case != case] + compared([*before, *rows])
                    if target is not None:
                        run.interrupted = True  # until the last case is done
                        results.write(target, run)
                progress.advance(task)
    except KeyboardInterrupt:
        return False
    return True


def _clock(device: str) -> Callable[[Callable[[], object]], float]:
    if device == "cpu":
        return timing.wall
    from .gpu import ColdClock

    return ColdClock()


def _without_resume(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith("--resume"):
            kept.append(argument)
        skip = argument == "--resume"
    return kept


# compare, plot, env


def _compare(options: argparse.Namespace) -> int:
    first, second = (_read(path) for path in (options.first, options.second))
    threshold = options.threshold / 100
    found, missing = compare.pairs(first, second, threshold, options.impl)
    if not found:
        raise Complaint(f"{options.first} and {options.second} have no row in common")
    compare.show(_console(), first, second, found, missing, threshold)
    return WRONG if any(pair.regressed for pair in found) else OK


def _plot(options: argparse.Namespace) -> int:
    _check_chart("-o", options.output)
    _check_writable("-o", options.output)
    labels = [path.stem for path in options.runs]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in options.runs]
    plot.save(options.output, [(label, _read(path)) for label, path in zip(labels, options.runs, strict=True)])
    _console().print(Text(f"written to {options.output}"))
    return OK


def _env(options: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        stamp = environment.stamp(device)
    except ValueError as error:
        raise Complaint(str(error)) from None
    absent = {name: implementation.absent(device) for name, implementation in IMPLEMENTATIONS.items()}
    if options.json:
        print(json.dumps({"environment": stamp, "implementations": absent}, indent=1))
        return OK
    console = _console()
    console.print(Text(report.headline(stamp), style="bold"))
    for name, value in stamp.items():
        console.print(Text(f"{name}: {value}"))
    console.print(Text("implementations", style="bold"))
    for name, reason in absent.items():
        usual = "measured by default" if name in USUAL[device] else "measured if named by --impl"
        console.print(Text(f"  {name}: {reason or usual}", style="dim" if reason else ""))
    for warning in environment.warnings(stamp):
        console.print(Text(f"warning: {warning}", style="yellow"))
    return OK


def _read(path: Path) -> Run:
    try:
        return results.read(path)
    except ValueError as error:
        raise Complaint(str(error)) from None


def _console() -> Console:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FULL_WIDTH
    return console


def _check_outputs(options: argparse.Namespace) -> None:
    """Before minutes of measuring, not after them."""
    if options.plot is not None:
        _check_chart("--plot", options.plot)
    if options.html is not None and (reason := plot.why_not()):
        raise Complaint(f"argument --html: {reason}")
    for flag in ("json", "csv", "plot", "html"):
        if (path := getattr(options, flag)) is not None:
            _check_writable(f"--{flag}", path)


def _check_chart(flag: str, path: Path) -> None:
    if path.suffix.removeprefix(".") not in plot.FORMATS:
        raise Complaint(f"argument {flag}: must end on .{', .'.join(plot.FORMATS)}, got {str(path)!r}")
    if reason := plot.why_not():
        raise Complaint(f"argument {flag}: {reason}")


def _check_writable(flag: str, path: Path) -> None:
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise Complaint(f"argument {flag}: {path} cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
