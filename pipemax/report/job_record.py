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
from typing import Any, Protocol, TypeVar

from pipemax.observer import EngineObserver
from pipemax.plan import Capacity
from pipemax.report.chrome_trace import write_chrome_trace
from pipemax.report.html_report import JobOutcome, write_html_report
from pipemax.report.manifest import run_manifest
from pipemax.report.metrics import MetricsAddress, MetricsServer, RowCounts, serve_metrics
from pipemax.report.recorder import LiveView, StepRecorder
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


class WatchedEngine(Protocol):
    """What a record needs of an engine."""

    @property
    def capacity(self) -> Capacity: ...

    def observe(self, observer: EngineObserver) -> None: ...


_Engine = TypeVar("_Engine", bound=WatchedEngine)


class JobRecord:
    """Records one job; `rows` is to be told by the job."""

    def __init__(self, wishes: RecordWishes) -> None:
        self._wishes = wishes
        self._recorder: StepRecorder | None = None
        self._manifest: dict[str, Any] = {}
        self.rows = RowLog()

    def watch(self, engine: _Engine) -> _Engine:
        """Looks on at this engine from now on; it is the job's first, or takes the place of one that failed."""
        if self._recorder is None:
            self._recorder = StepRecorder(capacity=engine.capacity)
            if self._wishes.trace is not None or self._wishes.report is not None:
                self._manifest = run_manifest(
                    command=self._wishes.command,
                    settings=self._wishes.settings or {},
                    capacity=asdict(engine.capacity),
                )
        else:
            self._recorder.engine_replaced()
        engine.observe(self._recorder)
        return engine

    def live(self) -> LiveView:
        """What is going on now. An engine is being watched."""
        assert self._recorder is not None
        return self._recorder.live()

    def serve_metrics(self, counts: RowCounts) -> contextlib.AbstractContextManager[MetricsServer | None]:
        """Serves metrics, if they are wished for. An engine is being watched.

        Raises ConfigError when the port cannot be had.
        """
        assert self._recorder is not None
        return serve_metrics(self._wishes.metrics, recorder=self._recorder, counts=counts)

    def write(self, outcome: JobOutcome) -> list[Path]:
        """Writes the files that are wished for; gives them. Nothing if there never was an engine. Raises OSError."""
        wishes, written = self._wishes, []
        if self._recorder is None:
            return []
        run = self._recorder.snapshot()
        if wishes.trace is not None:
            write_chrome_trace(wishes.trace, run, manifest=self._manifest)
            written.append(wishes.trace)
        if wishes.report is not None:
            write_html_report(wishes.report, run, outcome=outcome, manifest=self._manifest, rows=self.rows)
            written.append(wishes.report)
        return written
