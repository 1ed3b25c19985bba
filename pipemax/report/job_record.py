"""`JobRecord`: all that looks on at one batch job, and the files that are made of it at the end.

    engine ──► StepRecorder ─┬─► trace file, report, metrics, progress
    rows   ──► RowLog ───────┘

The composition root of `report/`. Never here: what the parts do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipemax.plan import Capacity
from pipemax.report.chrome_trace import write_chrome_trace
from pipemax.report.html_report import JobOutcome, write_html_report
from pipemax.report.manifest import run_manifest
from pipemax.report.metrics import MetricsAddress, MetricsServer, RowCounts, serve_metrics
from pipemax.report.recorder import StepRecorder
from pipemax.report.row_log import RowLog


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordWishes:
    """What is to be made of a job besides its answers; None: not that.

    command, settings   for the manifest: the command line, the engine's settings as given
    """

    trace: Path | None = None
    report: Path | None = None
    metrics: MetricsAddress | None = None
    command: Sequence[str] = ()
    settings: Mapping[str, Any] | None = None


class JobRecord:
    """Records one job; `recorder` is to be told by the engine, `rows` by the job."""

    def __init__(self, wishes: RecordWishes, *, capacity: Capacity) -> None:
        self._wishes = wishes
        self.recorder = StepRecorder(capacity=capacity)
        self.rows = RowLog()
        self._manifest: dict[str, Any] = {}
        if wishes.trace is not None or wishes.report is not None:
            self._manifest = run_manifest(
                command=wishes.command, settings=wishes.settings or {}, capacity=asdict(capacity)
            )

    def serve_metrics(self, counts: RowCounts) -> contextlib.AbstractContextManager[MetricsServer | None]:
        """Serves metrics, if they are wished for. Raises ConfigError when the port cannot be had."""
        return serve_metrics(self._wishes.metrics, recorder=self.recorder, counts=counts)

    def write(self, outcome: JobOutcome) -> list[Path]:
        """Writes the files that are wished for; gives them. Raises OSError."""
        wishes, written = self._wishes, []
        run = self.recorder.snapshot()
        if wishes.trace is not None:
            write_chrome_trace(wishes.trace, run, manifest=self._manifest)
            written.append(wishes.trace)
        if wishes.report is not None:
            write_html_report(wishes.report, run, outcome=outcome, manifest=self._manifest, rows=self.rows)
            written.append(wishes.report)
        return written
