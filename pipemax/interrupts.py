"""`Interrupts`: how a job ends when it is asked to: Ctrl-C, or SIGTERM as a batch system or `kill` sends it.

    first     no new rows; what is in flight may finish, for a bounded time
    second    (or the bound is reached) KeyboardInterrupt, wherever the job is

Before rows are in flight the first one ends the job at once; once all is done it changes nothing, and a second one ends
what is still being closed. Never here: what ends, and how (`run_batch.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_ASKING = (signal.SIGINT, signal.SIGTERM)


class JobInterrupted(KeyboardInterrupt):
    """The job was asked to end, and has. `signal_number`: by which signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Interrupts:
    """Context manager. Outside the main thread, which alone may have handlers, it changes nothing.

    drain_seconds   how long what is in flight may take after the first signal
    on_first        called from the handler when rows are in flight: must be quick and must not print
    message         written to standard error then; "" for nothing
    """

    def __init__(self, *, drain_seconds: float, on_first: Callable[[], None], message: str) -> None:
        self._drain_seconds = drain_seconds
        self._on_first = on_first
        self._message = message
        self._signal_number: int | None = None
        self._in_flight = False
        self._all_done = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the job has been asked to end."""
        return self._signal_number is not None

    def rows_are_in_flight(self) -> None:
        """From now on the first signal lets them finish."""
        self._in_flight = True

    def all_is_done(self) -> None:
        """From now on a first signal changes nothing, and one that came before no longer counts."""
        self._all_done = True
        self._end_the_wait()

    def raise_if_requested(self) -> None:
        """Raises JobInterrupted if the job has been asked to end before all was done."""
        if self._signal_number is not None and not self._all_done:
            raise JobInterrupted(self._signal_number)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_the_wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end_the_wait(self) -> None:
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self._signal_number is None
        if first:
            self._signal_number = number
        assert self._signal_number is not None
        if not first or not self._in_flight:
            raise JobInterrupted(self._signal_number)
        if self._all_done:
            return
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._handle)
        signal.setitimer(signal.ITIMER_REAL, self._drain_seconds)
        if self._message:
            with contextlib.suppress(OSError):
                os.write(2, self._message.encode())  # the stream may be in use at this very moment
        self._on_first()
