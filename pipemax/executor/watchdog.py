"""`Watchdog`: notices that nothing gets on while somebody waits for it.

    main thread    ---[ waits ....... progress ... progress ........................
    watchdog       ...............................................[ stall_seconds ] -> on_stall, once

A thread of its own, since the one that waits may be stuck itself: inside a pipe that a stopped process no longer reads.
Time in which this process was stopped (Ctrl-Z) is not time in which nothing got on.
Never here: what progress is, what is done about a stall (`stage_group.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Calls `on_stall` from its thread when `stall_seconds` pass inside `watch` without `progress`. To be stopped."""

    def __init__(self, *, stall_seconds: float, on_stall: Callable[[], None]) -> None:
        self._stall_seconds = stall_seconds
        self._on_stall = on_stall
        self._quiet_since: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, the caller waits for others."""
        self._quiet_since = time.monotonic()
        try:
            yield
        finally:
            self._quiet_since = None

    def progress(self) -> None:
        """Something has got on. Outside `watch`, and in a pause, it changes nothing."""
        if self._quiet_since is not None:
            self._quiet_since = time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Inside `watch`: what happens in here does not count. Outside it changes nothing."""
        watching = self._quiet_since is not None
        self._quiet_since = None
        try:
            yield
        finally:
            self._quiet_since = time.monotonic() if watching else None

    def stop(self) -> None:
        """Idempotent; from any thread."""
        self._stopping.set()

    def _run(self) -> None:
        interval_seconds = min(1.0, self._stall_seconds / 4)
        seen, quiet_seconds, looked_seconds = self._quiet_since, 0.0, time.monotonic()
        while not self._stopping.wait(interval_seconds):
            now_seconds = time.monotonic()
            # Of a longer time between two looks this thread knows nothing: the process may have been stopped.
            passed_seconds = min(now_seconds - looked_seconds, 2 * interval_seconds)
            looked_seconds = now_seconds
            if self._quiet_since is None or self._quiet_since != seen:
                seen = self._quiet_since
                quiet_seconds = 0.0 if seen is None else min(now_seconds - seen, passed_seconds)
                continue
            quiet_seconds += passed_seconds
            if quiet_seconds > self._stall_seconds:
                self._on_stall()
                return
