"""`JobWatch`: notices that the control plane itself no longer gets on, and ends the job so that it can be taken up.

    main thread   -[ read rows | plan ]-[ executor: submit, wait ]-[ write results | read rows ]-[ stuck .............
    watch          counts                rests: stages have their    counts                       stall_seconds -> end
                                         own (executor/watchdog.py)

A loop that never ends, a write to a file server that does not answer: no exception comes of these, and nobody can be
told but the person who reads the log. So the stacks of all threads are printed and the process ends at once with exit
code 3. Results that were written are in their files; the same command goes on. Stages end with their control plane.

Not seen: native code that never gives the interpreter's lock back; this thread does not run then either. Never here: a
pipeline that hangs (`executor/watchdog.py`), what the job does (`run_batch.py`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipemax.engine import Engine
from pipemax.executor.base import Executor
from pipemax.executor.stacks import own_stacks
from pipemax.executor.watchdog import Watchdog
from pipemax.plan import Capacity, StepPlan, StepResult

_EXIT_CODE = 3
# Standard error may be what hangs: a pipe into a pager that nobody scrolls.
_TELLING_SECONDS = 5.0


class JobWatch:
    """Watches the main thread of one job. Without an engine to look after it does nothing."""

    def __init__(self, *, stall_seconds: float, end: Callable[[str], None] | None = None) -> None:
        """`end` gets one line for the user, and does not come back; None: `end_at_once`."""
        self._stall_seconds = stall_seconds
        self._end = end or end_at_once
        self._watchdog: Watchdog | None = None

    def look_after(self, engine: Engine) -> None:
        """Time inside this engine's executor does not count from now on."""
        if self._watchdog is None:
            self._watchdog = Watchdog(stall_seconds=self._stall_seconds, on_stall=self._tell_and_end)
        engine.executor = _WatchedExecutor(engine.executor, self)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, rows are under way: within `stall_seconds` something has to be read, planned or written. Once."""
        if self._watchdog is None:
            yield
            return
        try:
            with self._watchdog.watch():
                yield
        finally:
            self._watchdog.stop()

    def progress(self) -> None:
        """Something has been read or written."""
        if self._watchdog is not None:
            self._watchdog.progress()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, somebody else sees to it that things get on, or it may take any time."""
        if self._watchdog is None:
            yield
            return
        with self._watchdog.pause():
            yield

    def _tell_and_end(self) -> None:
        self._end(
            f"the job hangs: its main thread got nothing done for {self._stall_seconds:g} s; what is done is in the "
            "files, the same command goes on"
        )


def end_at_once(message: str) -> None:
    """Prints the stacks of all threads and `message`, kills this process's children, and ends it with exit code 3."""
    teller = threading.Thread(target=_tell, args=(message,), name="teller", daemon=True)
    teller.start()
    teller.join(_TELLING_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(_EXIT_CODE)


def _tell(message: str) -> None:
    """Past `sys.stderr`, whose lock the thread that hangs may hold."""
    with contextlib.suppress(OSError):
        show_cursor = "\x1b[?25h" if os.isatty(2) else ""
        text = f"\n{show_cursor}{own_stacks()}\npipemax: error: {message}\n"
        os.write(2, text.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class _WatchedExecutor:
    """The same executor; the watch rests while it is at work."""

    inner: Executor
    job_watch: JobWatch

    @property
    def capacity(self) -> Capacity:
        return self.inner.capacity

    def submit(self, plan: StepPlan) -> None:
        with self.job_watch.pause():
            self.inner.submit(plan)

    def wait(self) -> Sequence[StepResult]:
        with self.job_watch.pause():
            return self.inner.wait()

    def now(self) -> float:
        return self.inner.now()

    def shutdown(self) -> None:
        self.inner.shutdown()
