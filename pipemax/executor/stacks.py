"""`gather_stacks`: what every process of a pipeline is doing at this moment, for a person who asks why it hangs.

Stages are asked by signal, which works whatever their threads do, unless the process is stopped. Never here: when to
ask, how stages answer (`worker/pulse.py`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

_PATIENCE_SECONDS = 2.0
_QUIET_SECONDS = 0.2
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in uninterruptible sleep: it waits for a disk or a driver",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
}


@dataclass(frozen=True, slots=True)
class StackSource:
    """A stage's process and the parent's end of its pipe for stacks."""

    name: str
    pid: int
    stacks: Connection


def process_state(pid: int) -> str:
    """In words; "gone" when there is no such process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    return _STATES.get(state, state)


def gather_stacks(sources: Sequence[StackSource]) -> str:
    """Stacks of all threads of these processes and of this one; takes a few seconds at most."""
    for source in sources:
        with contextlib.suppress(ProcessLookupError):
            os.kill(source.pid, signal.SIGUSR1)
    answers: dict[int, bytes] = {source.stacks.fileno(): b"" for source in sources}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    waiting = set(answers)
    while waiting and (left := deadline - time.monotonic()) > 0:
        # An answer is over when the pipe has been quiet for a moment.
        ready, _, _ = select.select(list(waiting), [], [], min(left, _QUIET_SECONDS))
        if not ready:
            waiting = {descriptor for descriptor in waiting if not answers[descriptor]}
        for descriptor in ready:
            piece = os.read(descriptor, 1 << 16)
            answers[descriptor] += piece
            if not piece:
                waiting.discard(descriptor)
    parts = [
        f"--- {source.name}, process {source.pid}, {process_state(source.pid)}\n"
        + (answers[source.stacks.fileno()].decode(errors="replace").rstrip() or "(it does not answer)")
        for source in sources
    ]
    return "\n".join([*parts, f"--- control plane, process {os.getpid()}", own_stacks()])


def own_stacks() -> str:
    """Stacks of all threads of this process but the caller's."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines = "".join(traceback.format_stack(frame)).rstrip()
            parts.append(f"Thread {names.get(ident, ident)} (most recent call last):\n{lines}")
    return "\n".join(parts)
