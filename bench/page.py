"""A run as one page of HTML that needs nothing else: the table, the notes, and the charts inlined."""

from __future__ import annotations

from html import escape
from itertools import groupby

from . import plot
from .report import LEGEND, ROOF, columns, conclusions, headline, notes
from .results import Run

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #333; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
th { border-bottom: 1px solid #999; } tbody tr:first-child td { border-top: 1px solid #e4e4e4; }
.flashx { font-weight: 600; } .refused { color: #8a6d00; } .wrong, .failed, .bad { color: #b00020; font-weight: 600; }
svg { max-width: 100%; height: auto; } pre { white-space: pre-wrap; }
"""


def render(run: Run) -> str:
    """The page."""
    shown = columns(run.machine)
    head = "".join(f"<th>{escape(column.title)}</th>" for column in shown)
    bodies = []
    for _, rows in groupby(run.rows, key=lambda row: row.case):
        lines = []
        for index, row in enumerate(rows):
            cells = ["" if index and place < 2 else column.cell(row) for place, column in enumerate(shown)]
            kind = row.status if row.status != "ok" else row.implementation
            lines.append(
                f'<tr class="{escape(kind)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            )
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    sentences = "".join(
        f'<p class="{"good" if well else "bad"}">{escape(line)}</p>' for line, well in conclusions(run.rows)
    )
    remarks = [*(f"warning: {warning}" for warning in run.warnings), *notes(run)]
    if run.interrupted:
        remarks.insert(0, "This run was interrupted: not all of its cases are here.")
    charts = "".join(f"<figure>{picture}</figure>" for picture in plot.as_svg([("run", run)]))
    legend = "\n".join([LEGEND, *([ROOF] if run.machine else [])])
    facts = "\n".join(f"{name}: {value}" for name, value in run.environment.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>flashx-bench</title><style>{_STYLE}</style></head><body>
<h1>flashx-bench</h1><p>{escape(headline(run.environment))}</p>
{sentences}
<h2>Charts</h2>{charts}
<h2>Rows</h2><table><thead><tr>{head}</tr></thead>
{"".join(bodies)}</table>
<pre>{escape(legend)}</pre>
<pre>{escape(chr(10).join(remarks))}</pre>
<h2>Environment</h2><pre>{escape(facts)}</pre>
</body></html>
"""
