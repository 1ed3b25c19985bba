"""`Watchdog`: notices that nothing gets on while somebody waits for it.

    main thread    ---[ waits ....... progress ... progress ........................
    watchdog       ...............................................[ stall_seconds ] -> on_stall, once

A thread of its own, since the one that waits may be stuck itself: inside a pipe that a stopped process no longer reads.
Never here: what progress is, what is done about a stall (`process.py`).
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
        """Something has got on. Inside `watch` only."""
        self._quiet_since = time.monotonic()

    def stop(self) -> None:
        """Idempotent; from any thread."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(min(1.0, self._stall_seconds / 4)):
            quiet_since = self._quiet_since
            if quiet_since is not None and time.monotonic() - quiet_since > self._stall_seconds:
                self._on_stall()
                return
