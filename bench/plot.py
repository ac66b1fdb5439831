"""Charts of a run: speed-up over torch along an axis of the cases, and a roofline. matplotlib is imported here only."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Case
from .measure import Row, is_torch
from .report import DIRECTIONS, headline, number
from .results import Run

# Wong, "Points of view: Color blindness" (Nature Methods 2011): colours that everybody can tell apart.
_COLORS = {
    "flashx": "#D55E00",
    "flashx-concat": "#E69F00",
    "triton": "#CC79A7",
    "torch": "#0072B2",
    "torch-cascade": "#56B4E9",
    "naive": "#8C8C8C",
}
_OTHERS = ("#009E73", "#56B4E9", "#F0E442", "#000000")
_INK, _FAINT = "#333333", "#B8B8B8"

# The most panels of a figure, and the most lines of a list of cases.
PANELS, LISTED = 18, 40

FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True, slots=True)
class Point:
    """A row in a chart; ``name`` also tells runs apart."""

    name: str
    row: Row

    @property
    def speedup(self) -> float:
        ratio = self.row.ratio_to_torch
        assert ratio is not None
        return ratio


@dataclass(frozen=True, slots=True)
class Panel:
    """Points along an axis, all else equal: their places on it."""

    title: str
    axis: str
    points: list[tuple[float, Point]]


def why_not() -> str | None:
    """Why there are no charts; None if there are."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "charts need matplotlib: pip install 'flashx[plot]'"
    return None


def save(path: Path, runs: Sequence[tuple[str, Run]]) -> None:
    """Both charts in one picture, in the format that the path ends on."""
    figure = _figure(runs, ("speedup", "roofline"))
    figure.savefig(path, dpi=160)


def as_svg(runs: Sequence[tuple[str, Run]]) -> list[str]:
    """Each chart by itself, to be put into a page."""
    pictures = []
    for chart in ("speedup", "roofline"):
        text = io.StringIO()
        _figure(runs, (chart,)).savefig(text, format="svg", metadata={"Date": None})
        pictures.append(text.getvalue()[text.getvalue().index("<svg") :])
    return pictures


def points(runs: Sequence[tuple[str, Run]]) -> list[Point]:
    """The rows that were timed; names are told apart by the run's where two runs have the same row."""
    timed = [(label, row) for label, run in runs for row in run.rows if row.timing is not None]
    seen = Counter((row.case, row.implementation) for _, row in timed)
    twice = any(count > 1 for count in seen.values())
    return [Point(f"{row.implementation} ({label})" if twice else row.implementation, row) for label, row in timed]


def panels(found: Sequence[Point]) -> tuple[list[Panel], list[Point]]:
    """The axes along which cases differ in nothing else, and the points that are on none."""
    made: list[Panel] = []
    placed: set[Case] = set()
    kinds = list(dict.fromkeys(type(point.row.case) for point in found))
    for kind in kinds:
        mine = [point for point in found if type(point.row.case) is kind]
        for axis, title in kind.AXES.items():
            for group in _groups(mine, axis):
                cases = {point.row.case for _, point in group}
                if len({place for place, _ in group}) < 3 or cases <= placed:
                    continue
                placed |= cases
                made.append(Panel(_common(cases), title, group))
    return made, [point for point in found if point.row.case not in placed]


def _groups(found: Sequence[Point], axis: str) -> list[list[tuple[float, Point]]]:
    """Points whose cases differ along the axis alone; batches may shrink along with lengths that grow."""
    groups: dict[Any, list[tuple[float, Point]]] = {}
    for point in found:
        case = point.row.case
        place = case.place(axis)
        if place is not None:
            groups.setdefault(_key(case, axis, "batch"), []).append((place, point))
    split: list[list[tuple[float, Point]]] = []
    for group in groups.values():
        seen = [(place, point.name) for place, point in group]
        if len(set(seen)) == len(seen):
            split.append(group)
            continue
        parts: dict[Any, list[tuple[float, Point]]] = {}
        for place, point in group:
            parts.setdefault(_key(point.row.case, axis), []).append((place, point))
        split += parts.values()
    return [sorted(group, key=lambda it: it[0]) for group in split]


def _key(case: Case, axis: str, *left_out: str) -> Any:
    """All fields but the axis. Two lengths are one axis, as far as they are equal; of lens their number stays."""
    fields = case.as_dict()
    fields.pop(axis)
    for name in left_out:
        fields.pop(name, None)
    if axis == "k_len" and fields["q_len"] == case.as_dict()["k_len"]:
        fields["q_len"] = "k_len"
    if axis == "lens":
        fields["lens"] = case.sequences
    return tuple(fields.items())


def _common(cases: set[Case]) -> str:
    """The words that all labels share, and the direction if they share that."""
    labels = [f"{case} {DIRECTIONS[case.direction]}".split() for case in sorted(cases, key=str)]
    return " ".join(word for word in labels[0] if all(word in label for label in labels))


def _base(name: str) -> str:
    """The implementation of a point's name."""
    return name.partition(" ")[0]


def _color(name: str, names: Sequence[str]) -> str:
    bases = list(dict.fromkeys(map(_base, names)))
    unknown = [base for base in bases if base not in _COLORS]
    return _COLORS[_base(name)] if _base(name) in _COLORS else _OTHERS[unknown.index(_base(name)) % len(_OTHERS)]


def _style(name: str, names: Sequence[str]) -> str:
    """Solid for the first run of an implementation, and another one for each further."""
    own = [other for other in names if _base(other) == _base(name)]
    return ("-", "--", ":", "-.")[own.index(name) % 4]


def _figure(runs: Sequence[tuple[str, Run]], charts: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    found = points(runs)
    compared = [point for point in found if point.row.ratio_to_torch is not None]
    along, single = panels(compared)
    left_out = max(len(along) - PANELS, 0)
    along = along[:PANELS]
    cases = list(dict.fromkeys(point.row.case for point in single))
    names = list(dict.fromkeys(point.name for point in found))
    columns = 2 if len(along) == 4 else min(max(len(along), 1), 3)
    lines = -(-len(along) // columns)
    parts: list[tuple[float, Callable[[Any], None]]] = []
    if "speedup" in charts and along:
        parts.append((0.3 + 2.9 * lines, lambda part: _draw_panels(part, along, lines, columns, names)))
    if "speedup" in charts and cases:
        height = 0.9 + 0.24 * min(len(cases), LISTED)
        parts.append((height, lambda part: _draw_list(part.add_subplot(), cases, single, names)))
    if "roofline" in charts and found:
        parts.append((4.2, lambda part: _draw_roofline(part.add_subplot(), runs, found, names)))
    titles = _titles(runs)
    heights = [height for height, _ in parts]
    head = 0.2 * len(titles) + 0.1
    figure = Figure(figsize=(max(4.0 * columns, 9.0), sum(heights, head) or 2.0), layout="constrained")
    figure.suptitle("\n".join(titles), x=0.01, ha="left", fontsize=9, color=_INK)
    if parts:
        subfigures = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
        for subfigure, (_, draw) in zip(subfigures[:, 0], parts, strict=True):
            draw(subfigure)
    if left_out and "speedup" in charts:
        figure.supxlabel(f"{left_out} more groups of cases are not shown", fontsize=8, color=_INK)
    if not found:
        figure.text(0.5, 0.5, "no row was timed", ha="center", color=_INK)
    return figure


def _titles(runs: Sequence[tuple[str, Run]]) -> list[str]:
    """A line for each machine."""
    lines: dict[str, list[str]] = {}
    for label, run in runs:
        lines.setdefault(headline(run.environment), []).append(label)
    return [f"{', '.join(labels)}: {line}" if len(runs) > 1 else line for line, labels in lines.items()]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Of a logarithmic axis, with 1 inside."""
    low, high = min([*values, 1.0]), max([*values, 1.0])
    return low / 1.25, high * 1.25


def _bare(axes: Any) -> None:
    """Only the ink that says something."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=8, length=3, color=_FAINT)
    axes.minorticks_off()


def _times(value: float, _: Any = None) -> str:
    return f"{value:g}×"


def _log_ticks(low: float, high: float) -> list[float]:
    """A few round numbers inside."""
    factors = (1, 2, 5) if high / low < 100 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) >= 2 else sorted({1.0, round(low, 2), round(high, 2)})


def _apart(places: Sequence[float], logarithmic: bool) -> list[float]:
    """Those of the places, the last one first, whose labels do not overlap."""
    scaled = {place: math.log(place) if logarithmic else place for place in places}
    room = (scaled[places[-1]] - scaled[places[0]]) / 8
    shown: list[float] = []
    for place in reversed(places):
        if not shown or scaled[shown[-1]] - scaled[place] >= room:
            shown.append(place)
    return shown[::-1]


def _count(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 512 == 0 else f"{value:g}"


def _draw_panels(part: Any, along: Sequence[Panel], lines: int, columns: int, names: Sequence[str]) -> None:
    limits = _limits([point.speedup for panel in along for _, point in panel.points])
    for index, panel in enumerate(along):
        axes = part.add_subplot(lines, columns, index + 1)
        _draw_panel(axes, panel, names, limits, first=index % columns == 0)


def _draw_panel(axes: Any, panel: Panel, names: Sequence[str], limits: tuple[float, float], first: bool) -> None:
    places = sorted({place for place, _ in panel.points})
    logarithmic = places[0] > 0 and places[-1] / places[0] >= 4
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axhline(1, color=_FAINT, linewidth=1, zorder=0)
    ends: list[tuple[float, str, str]] = []
    reference = "torch's best"
    for name in names:
        line = [(place, point.speedup) for place, point in panel.points if point.name == name]
        if not line:
            continue
        # The fastest of torch's is the line at 1.
        if is_torch(_base(name)) and all(value == 1 for _, value in line):
            reference = "torch"
            continue
        own = _base(name) == "flashx"
        color = _color(name, names)
        axes.plot(
            *zip(*line, strict=True),
            color=color,
            linewidth=2.4 if own else 1.3,
            marker="o",
            linestyle=_style(name, names),
            markersize=4 if own else 3,
        )
        ends.append((line[-1][1], name, color))
    ends.append((1.0, reference, _INK))
    _label_ends(axes, ends, limits)
    shown = _apart(places, logarithmic)
    axes.set_xticks(shown, [_count(place) for place in shown])
    axes.set_ylim(*limits)
    axes.set_yticks(_log_ticks(*limits), [_times(tick) for tick in _log_ticks(*limits)])
    _bare(axes)
    axes.set_title(panel.title, fontsize=9, loc="left", color=_INK)
    axes.set_xlabel(panel.axis, fontsize=8, color=_INK)
    if first:
        axes.set_ylabel("times as fast as torch", fontsize=8, color=_INK)


def _label_ends(axes: Any, ends: list[tuple[float, str, str]], limits: tuple[float, float]) -> None:
    """Each line's name at its right end, pushed apart where they would overlap."""
    low = math.log(limits[0])
    spots = _spread([value for value, _, _ in sorted(ends)], limits)
    for (_, name, color), spot in zip(sorted(ends), spots, strict=True):
        place = (spot - low) / math.log(limits[1] / limits[0])
        axes.annotate(
            name, (1.02, place), xycoords="axes fraction", fontsize=8, color=color, va="center",
            fontweight="bold" if _base(name) == "flashx" else "normal",
        )  # fmt: skip


def _spread(values: Sequence[float], limits: tuple[float, float], share: float = 0.085) -> list[float]:
    """Logarithms of growing values, pushed apart by a label's share of the height, none beyond the upper limit."""
    height = math.log(limits[1] / limits[0]) * share
    spots: list[float] = []
    for value in values:
        spots.append(math.log(value) if not spots else max(math.log(value), spots[-1] + height))
    over = max(spots[-1] - math.log(limits[1]), 0)
    return [spot - over for spot in spots]


def _draw_list(axes: Any, cases: Sequence[Case], found: Sequence[Point], names: Sequence[str]) -> None:
    """A line for each case, a dot for each implementation."""
    shown = cases[:LISTED]
    values = [point.speedup for point in found if point.row.case in shown]
    limits = _limits(values)
    axes.set_xscale("log")
    axes.axvline(1, color=_FAINT, linewidth=1, zorder=0)
    present: list[str] = []
    for name in names:
        dots = [
            (point.speedup, shown.index(point.row.case))
            for point in found
            if point.name == name and point.row.case in shown
        ]
        if not dots:
            continue
        present.append(name)
        own = _base(name) == "flashx"
        axes.scatter(*zip(*dots, strict=True), s=42 if own else 22, color=_color(name, names), zorder=3 if own else 2)
        if own:
            for value, place in dots if name == present[0] else []:
                axes.annotate(
                    f"{value:.2f}×",
                    (1.01, place),
                    xycoords=("axes fraction", "data"),
                    fontsize=8,
                    fontweight="bold",
                    va="center",
                    color=_color(name, names),
                )
    axes.set_yticks(range(len(shown)), [f"{case} {DIRECTIONS[case.direction]}" for case in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(*limits)
    axes.set_xticks(_log_ticks(*limits), [_times(tick) for tick in _log_ticks(*limits)])
    _bare(axes)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("times as fast as torch", fontsize=8, color=_INK)
    _name_colors(axes, present, names)
    if len(cases) > len(shown):
        axes.annotate(
            f"{len(cases) - len(shown)} more cases are not shown", (0, -0.02), xycoords="axes fraction", fontsize=7,
            va="top", ha="right", color=_INK,
        )  # fmt: skip


def _name_colors(axes: Any, present: Sequence[str], names: Sequence[str]) -> None:
    """The implementations in their own colours, in a line above the chart."""
    axes.set_title(" ", fontsize=9)  # room for them in the layout
    place = 0.0
    for name in dict.fromkeys(map(_base, present)):
        label = axes.annotate(
            f"● {name}", (0, 1), xytext=(place, 6), xycoords="axes fraction", textcoords="offset points",
            fontsize=8, color=_color(name, names), va="bottom",
        )  # fmt: skip
        label.set_in_layout(False)
        place += 5.0 * (len(name) + 4)


def _draw_roofline(axes: Any, runs: Sequence[tuple[str, Run]], found: Sequence[Point], names: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities = [point.row.case.flops() / point.row.case.bytes() for point in found]
    speeds = [point.row.gflops or 1.0 for point in found]
    if not found:
        _bare(axes)
        return
    low, high = min(intensities) / 2, max(intensities) * 2
    top = max(speeds)
    machine = runs[0][1].machine
    if machine is not None:
        top = max(top, *machine.gflops.values())
        limits = (min(speeds) / 2, top * 2)
        roofs = {dtype: min(peak, machine.gbytes * high) for dtype, peak in machine.gflops.items()}
        order = sorted(roofs, key=lambda dtype: roofs[dtype])
        for dtype, spot in zip(order, _spread([roofs[dtype] for dtype in order], limits, 0.05), strict=True):
            peak = machine.gflops[dtype]
            xs = sorted({low, high, min(max(peak / machine.gbytes, low), high)})
            axes.plot(xs, [min(peak, machine.gbytes * x) for x in xs], color=_INK, linewidth=1.2, zorder=1)
            axes.annotate(
                f"{dtype} {number(peak)} GFLOP/s", (high, math.exp(spot)), xytext=(4, 0), textcoords="offset points",
                fontsize=8, color=_INK, va="center", annotation_clip=False,
            )  # fmt: skip
        slope = math.sqrt(low * max(min(max(machine.gflops.values()) / machine.gbytes, high), low))
        axes.annotate(
            f"memory {machine.gbytes:.3g} GB/s",
            (slope, machine.gbytes * slope),
            xytext=(8, -6),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
            va="top",
        )
    present = []
    for name in names:
        dots = [(x, y) for x, y, point in zip(intensities, speeds, found, strict=True) if point.name == name]
        if dots:
            present.append(name)
            own = _base(name) == "flashx"
            axes.scatter(
                *zip(*dots, strict=True), s=30 if own else 14, color=_color(name, names), zorder=3 if own else 2
            )
    _name_colors(axes, present, names)
    axes.set_xlim(low, high)
    axes.set_ylim(min(speeds) / 2, top * 2)
    _bare(axes)
    axes.set_xlabel("operations per compulsory byte", fontsize=8, color=_INK)
    axes.set_ylabel("GFLOP/s", fontsize=8, color=_INK)
