"""A run as a file: JSON to read again, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case
from .check import Accuracy
from .machine import Machine
from .measure import Row
from .timing import Timing
from .variants import from_dict

# Version of the JSON's schema (docs/benchmarks.md): raised by any change that a reader could trip over.
SCHEMA = 2


@dataclass(slots=True)
class Run:
    """What was measured, where and how.

    ``absent``: implementations that could not run at all, and why. ``warnings``: what makes the timings doubtful.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    machine: Machine | None = None
    interrupted: bool = False

    def by_case(self) -> list[list[Row]]:
        """The rows, those of a case together, in the order of the cases."""
        groups: dict[Case, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.case, []).append(row)
        return list(groups.values())


def as_json(run: Run) -> str:
    """The run as JSON; times in seconds, numbers that are not finite are null."""
    document = {
        "schema": SCHEMA,
        "environment": run.environment,
        "machine": run.machine and run.machine.as_dict(),
        "settings": run.settings,
        "absent": run.absent,
        "warnings": run.warnings,
        "interrupted": run.interrupted,
        "rows": [_row_as_dict(row) for row in run.rows],
    }
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def write(path: Path, run: Run) -> None:
    """All of it or nothing: a run that is killed meanwhile leaves the file as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(as_json(run))
    os.replace(partial, path)


def read(path: Path) -> Run:
    """The inverse of write.

    Raises:
        ValueError: naming the file, for one that is not there or is no run of this schema.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {schema!r}")
    try:
        machine = document["machine"] and Machine(**document["machine"])
        rows = [_row_from_dict(row) for row in document["rows"]]
        names = ("environment", "settings", "absent", "warnings", "interrupted")
        return Run(rows=rows, machine=machine, **{name: document[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no run of flashx-bench: {error!r}") from None


def _row_as_dict(row: Row) -> dict[str, Any]:
    return {
        "case": row.case.as_dict(),
        "label": str(row.case),
        "implementation": row.implementation,
        "status": row.status,
        "reasons": row.reasons,
        "accuracy": {name: asdict(accuracy) for name, accuracy in row.accuracy.items()},
        "flops": row.case.flops(),
        "bytes": row.case.bytes(),
        "median": row.timing and row.timing.percentile(50),
        "p20": row.timing and row.timing.percentile(20),
        "p80": row.timing and row.timing.percentile(80),
        "samples": row.timing and list(row.timing.samples),
        "gflops": row.gflops,
        "gbytes": row.gbytes,
        "ratio_to_torch": row.ratio_to_torch,
        "ratios": row.ratios,
    }


def _row_from_dict(fields: dict[str, Any]) -> Row:
    return Row(
        from_dict(fields["case"]),
        fields["implementation"],
        fields["status"],
        fields["reasons"],
        {
            name: Accuracy(*(math.nan if it[part] is None else it[part] for part in ("error", "budget")))
            for name, it in fields["accuracy"].items()
        },
        fields["samples"] and Timing(fields["samples"]),
        fields["ratios"],
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


CSV_COLUMNS = (
    "label", "direction", "implementation", "status", "median", "p20", "p80", "gflops", "gbytes", "ratio_to_torch",
    "max_error", "budget", "reasons",
)  # fmt: skip


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row; times in seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        worst = row.worst
        writer.writerow(
            _row_as_dict(row)
            | {
                "direction": row.case.direction,
                "max_error": worst and worst.error,
                "budget": worst and worst.budget,
                "reasons": "; ".join(row.reasons),
            }
        )
    return text.getvalue()
