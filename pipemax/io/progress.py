"""`ProgressDisplay`: how far a batch job has come, for a person at a terminal or for a log file.

A thread of its own looks at the job's counts now and then, so that the job never waits for a terminal, and so that a
log gets its line also while every row is still at work. What never lives here: what counts as failed.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_BAR_INTERVAL_SECONDS = 0.25
_LINE_INTERVAL_SECONDS = 10.0
_RATE_WINDOW_SECONDS = 30.0


class ProgressStyle(enum.StrEnum):
    """BAR redraws one line of a terminal; LINES writes a line every ten seconds; NONE says nothing."""

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


class ProgressDisplay:
    """Shows `counts` on `stream` while the context is open. `output_tokens` gives the tokens generated so far.

    Tokens per second are those of the last 30 seconds.
    """

    def __init__(
        self, counts: JobCounts, *, output_tokens: Callable[[], int], style: ProgressStyle, stream: TextIO
    ) -> None:
        self._counts = counts
        self._output_tokens = output_tokens
        self._style = style
        self._stream = stream
        self._samples: deque[tuple[float, int]] = deque()
        self._start_seconds = 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ProgressDisplay:
        self._start_seconds = time.monotonic()
        self._samples.append((self._start_seconds, self._output_tokens()))
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

    def _tokens_per_second(self) -> float:
        now_seconds, tokens = time.monotonic(), self._output_tokens()
        self._samples.append((now_seconds, tokens))
        while len(self._samples) > 2 and self._samples[1][0] < now_seconds - _RATE_WINDOW_SECONDS:
            self._samples.popleft()
        first_seconds, first_tokens = self._samples[0]
        return (tokens - first_tokens) / max(now_seconds - first_seconds, 1e-9)

    def _run_bar(self) -> None:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows  {task.fields[failed]} failed  {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=self._stream), auto_refresh=False) as progress:
            counts = self._counts
            task = progress.add_task("rows", total=counts.total_rows, completed=counts.earlier_rows, failed=0, rate=0.0)
            closing = False
            while not closing:
                closing = self._closing.wait(_BAR_INTERVAL_SECONDS)
                progress.update(
                    task,
                    completed=self._counts.done_rows,
                    failed=self._counts.failed_rows,
                    rate=self._tokens_per_second(),
                    refresh=True,
                )

    def _run_lines(self) -> None:
        while not self._closing.wait(_LINE_INTERVAL_SECONDS):
            counts = self._counts
            elapsed_seconds = time.monotonic() - self._start_seconds
            percent = 100 * counts.done_rows / max(counts.total_rows, 1)
            line = (
                f"pipemax: {counts.done_rows:,} of {counts.total_rows:,} rows ({percent:.0f} %), "
                f"{counts.failed_rows:,} failed, {self._tokens_per_second():,.1f} output tokens/s, "
                f"{elapsed_seconds:,.0f} s"
            )
            print(line, file=self._stream, flush=True)
