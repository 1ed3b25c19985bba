"""`ProgressDisplay`: how far a batch job has come, for a person at a terminal or for a log file.

    terminal    bar of rows
                phase, output tokens/s now and on average, time gone and left       redrawn in place
                stages' utilisation, link, KV
    log file    the same as one line, every ten seconds, later every minute

A thread of its own looks at the job's counts now and then, so that the job never waits for a terminal, and so that a
log gets its line also while every row is still at work. What never lives here: what counts as failed, measuring
(`report/recorder.py`).
"""

from __future__ import annotations

import datetime
import enum
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pipemax.report.recorder import LiveView

_BAR_INTERVAL_SECONDS = 0.25
_LINE_INTERVAL_SECONDS = 10.0
_LATER_LINE_INTERVAL_SECONDS = 60.0
_LATER_AFTER_SECONDS = 300.0
# Before so many rows are done, their lengths say little of the others.
_MIN_ROWS_TO_FORESEE = 8
_MAX_STAGES_SHOWN = 8


class ProgressStyle(enum.StrEnum):
    """BAR redraws some lines of a terminal; LINES writes a line every now and then; NONE says nothing."""

    BAR = "bar"
    LINES = "lines"
    NONE = "none"

    @classmethod
    def for_stream(cls, stream: TextIO) -> ProgressStyle:
        return cls.BAR if stream.isatty() else cls.LINES


@dataclass(slots=True)
class JobCounts:
    """What has come of a job's rows so far. Tokens are those of rows that this run answered.

    `earlier_rows` of the answered and failed ones were done when this run began.
    """

    total_rows: int
    answered_rows: int = 0
    failed_rows: int = 0
    earlier_rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def done_rows(self) -> int:
        return self.answered_rows + self.failed_rows


def remaining_seconds(counts: JobCounts, live: LiveView) -> float | None:
    """Time until the last row, by tokens. None while too few rows are done to tell.

    A row that is left, begun or not, is expected to need as many tokens as this run has generated so far for each row
    that it finished. The mean length of finished rows would be too low: short ones finish first.
    """
    rate = live.average_output_tokens_per_second
    finished_rows = counts.done_rows - counts.earlier_rows
    if finished_rows < min(_MIN_ROWS_TO_FORESEE, counts.total_rows - counts.earlier_rows) or rate <= 0:
        return None
    rows_left = counts.total_rows - counts.done_rows
    return rows_left * live.output_tokens / max(finished_rows, 1) / rate


class ProgressDisplay:
    """Shows `counts`, and what `live` gives of the engine, on `stream` while the context is open."""

    def __init__(
        self, counts: JobCounts, *, live: Callable[[], LiveView], style: ProgressStyle, stream: TextIO
    ) -> None:
        self._counts = counts
        self._live = live
        self._style = style
        self._stream = stream
        self._start_seconds = 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ProgressDisplay:
        self._start_seconds = time.monotonic()
        run = {ProgressStyle.BAR: self._run_bar, ProgressStyle.LINES: self._run_lines, ProgressStyle.NONE: None}
        if (target := run[self._style]) is not None:
            self._thread = threading.Thread(target=target, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _elapsed_seconds(self) -> float:
        return time.monotonic() - self._start_seconds

    def _run_bar(self) -> None:
        console = Console(file=self._stream)
        # What else this process writes to the terminal goes above the display.
        with Live(self._picture(), console=console, auto_refresh=False) as display:
            closing = False
            while not closing:
                closing = self._closing.wait(_BAR_INTERVAL_SECONDS)
                display.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        counts, live = self._counts, self._live()
        rows = Table.grid(padding=(0, 1))
        rows.add_row(
            ProgressBar(total=max(counts.total_rows, 1), completed=counts.done_rows, width=30),
            Text(f"{counts.done_rows:,}/{counts.total_rows:,} rows"),
            Text(f"{counts.failed_rows:,} failed", "red" if counts.failed_rows else "dim"),
        )
        facts = ("  ".join(parts) for parts in self._facts(counts, live))
        return Group(rows, *(Text(line, "dim", no_wrap=True, overflow="ellipsis") for line in facts))

    def _run_lines(self) -> None:
        while not self._closing.wait(self._line_interval_seconds()):
            counts, live = self._counts, self._live()
            percent = 100 * counts.done_rows / max(counts.total_rows, 1)
            start = (
                f"{counts.done_rows:,} of {counts.total_rows:,} rows ({percent:.0f} %), {counts.failed_rows:,} failed"
            )
            facts = (fact for parts in self._facts(counts, live) for fact in parts)
            print(f"pipemax: {', '.join([start, *facts])}", file=self._stream, flush=True)

    def _line_interval_seconds(self) -> float:
        return (
            _LINE_INTERVAL_SECONDS if self._elapsed_seconds() < _LATER_AFTER_SECONDS else _LATER_LINE_INTERVAL_SECONDS
        )

    def _facts(self, counts: JobCounts, live: LiveView) -> Iterator[list[str]]:
        """Three lines of facts: pace; stages and link; memory."""
        left_seconds = remaining_seconds(counts, live)
        now, average = live.output_tokens_per_second, live.average_output_tokens_per_second
        yield [
            *([] if live.phase is None else [str(live.phase)]),
            f"{now:,.1f} output tokens/s, {average:,.1f} average",
            f"{_clock(self._elapsed_seconds())} gone",
            *([] if left_seconds is None else [f"{_clock(left_seconds)} left"]),
        ]
        if live.gauges is None or not live.recent_seconds:
            return
        busy = [live.utilisation(stage) for stage in range(len(live.recent))]
        shown = "/".join(f"{share:.0%}" for share in busy[:_MAX_STAGES_SHOWN])
        yield [
            f"stages busy {shown}" + ("/..." if len(busy) > _MAX_STAGES_SHOWN else ""),
            f"link {_mean_rate(live, 'refill_bytes'):,.2f} GB/s up {_mean_rate(live, 'home_bytes'):,.2f} down",
        ]
        gauges = live.gauges
        yield [
            f"KV blocks {gauges.resident_blocks:,} resident {gauges.travelling_blocks:,} travelling "
            f"{gauges.window_blocks:,} window"
        ]


def _mean_rate(live: LiveView, name: str) -> float:
    """GB a second over the last seconds, mean of the stages."""
    total = sum(getattr(use, name) for use in live.recent)
    return float(total) / len(live.recent) / live.recent_seconds / 1e9


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
