"""Findings for a person: one paragraph each on a terminal, or one JSON document. Never here: what is found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipemax.doctor.finding import Finding, Severity

_MARKS = {
    Severity.GOOD: ("ok", "green"),
    Severity.NOTE: ("note", "cyan"),
    Severity.COSTS: ("costs", "yellow"),
    Severity.BLOCKS: ("BLOCKS", "bold red"),
}


def show_findings(findings: Iterable[Finding], stream: TextIO) -> list[Finding]:
    """Prints each as it comes, and a closing line; gives them all."""
    console = Console(file=stream, highlight=False)
    shown = []
    for finding in findings:
        shown.append(finding)
        mark, style = _MARKS[finding.severity]
        table = Table.grid(padding=(0, 1))
        table.add_column(width=6)
        table.add_column(overflow="fold")
        table.add_row(Text(mark, style), Text.assemble((finding.subject, "bold"), ": ", finding.found))
        table.add_row("", Text(finding.meaning, "dim"))
        if finding.action:
            table.add_row("", Text.assemble(("do: ", "bold"), finding.action))
        console.print(table)
    console.print(_closing_line(shown))
    return shown


def _closing_line(findings: Sequence[Finding]) -> str:
    counts = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    if counts[Severity.BLOCKS]:
        return f"{counts[Severity.BLOCKS]} of {len(findings)} findings block a job"
    if counts[Severity.COSTS]:
        return f"nothing blocks a job; {counts[Severity.COSTS]} of {len(findings)} findings cost throughput"
    return "nothing blocks a job"


def findings_json(findings: Sequence[Finding]) -> str:
    """A JSON list of objects with the fields of `Finding`."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)
