"""`Pulse`: how a stage lets its executor know that it is alive, and whether it gets on.

    main thread     connecting | loading | ... | step 17: layer, layer, layer ... | step 18 ...      moves the count on
    beat thread     .........beat.........beat.........beat.........beat                             sends the count

A beat with a new count is progress; beats with the same count come from a stage that waits or hangs; no beats at all
come from a process that is stopped. While a stage loads there are no steps to count: there, using the processor or
reading a disk is progress.

On SIGUSR1 the process writes the stacks of all its threads into a pipe of its executor, whatever its threads do.
Never here: what a stage's silence means (`executor/watchdog.py`).
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from pipemax.worker.attention_hook import LayerFences

# Of one core, while loading: more than the beat thread itself needs, less than anything that gets on.
_ACTIVE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class StageBeat:
    """Progress so far, as a number that only grows, and what the stage is doing, in words."""

    count: int
    doing: str


class Pulse:
    """The count; moved on by the main thread, read by the beat thread."""

    def __init__(self) -> None:
        self._count = 0
        self._doing = "starting"
        self._loading = True

    def loads(self, what: str) -> None:
        """Another part of loading begins."""
        self._count += 1
        self._doing = what

    def begin_step(self, step_id: int) -> None:
        self._count += 1
        self._doing = f"at step {step_id}"
        self._loading = False

    def layer(self) -> None:
        self._count += 1

    def wait(self) -> None:
        """There is nothing to do."""
        self._doing = "waiting for a plan"
        self._loading = False

    def start_beating(self, send: Callable[[StageBeat], None], *, interval_seconds: float) -> None:
        """Sends a beat every so often, on a thread of its own, until the process ends."""
        threading.Thread(target=self._beat, args=(send, interval_seconds), name="pulse", daemon=True).start()

    def _beat(self, send: Callable[[StageBeat], None], interval_seconds: float) -> None:
        cpu_seconds, reads = _activity()
        while True:
            time.sleep(interval_seconds)
            last_cpu_seconds, last_reads = cpu_seconds, reads
            cpu_seconds, reads = _activity()
            active = cpu_seconds - last_cpu_seconds > _ACTIVE_SHARE * interval_seconds or reads > last_reads
            if self._loading and active:
                self._count += 1
            try:
                send(StageBeat(self._count, self._doing))
            except OSError:  # the executor is gone; the control thread ends this process
                return


@dataclass(frozen=True, slots=True)
class PulsingFences:
    """Fences that count layers on their way."""

    inner: LayerFences
    pulse: Pulse

    def enter(self, layer: int) -> None:
        self.inner.enter(layer)

    def leave(self, layer: int) -> None:
        self.inner.leave(layer)
        self.pulse.layer()


def dump_stacks_on_signal(stacks: Connection) -> None:
    """From now on SIGUSR1 writes the stacks of all threads into `stacks`, which must stay open.

    Without blocking: what does not fit into the pipe is lost, so a signal that somebody else sent harms nothing.
    """
    os.set_blocking(stacks.fileno(), False)
    faulthandler.register(signal.SIGUSR1, file=stacks.fileno(), all_threads=True)


def _activity() -> tuple[float, int]:
    """Processor seconds of this process and its ended children; a number that grows when a disk is read."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return cpu_seconds, own.ru_inblock + own.ru_majflt
