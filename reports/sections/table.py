"""All rows, sortable and filterable."""

from __future__ import annotations

from typing import Any

from ctxbench.reports.report import Report
from ctxbench.reports.tables import MORE, columns, entries


def context(report: Report) -> dict[str, Any]:
    """What ``table.j2`` prints."""
    rows = entries(report.frame, more=True)
    numeric = [any(row[i].number for row in rows) for i in range(len(rows[0]))]
    runs = list(report.frame["run"])
    return {
        "columns": list(zip(columns(report.frame, more=True).items(), numeric, strict=True)),
        "optional": set(MORE),
        "rows": list(zip(report.frame["cell"], runs, report.frame["status"], rows, strict=True)),
    }
