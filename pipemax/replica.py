"""`Replica`: the parent's side of one replica's process: its pipe, its requests in flight, its counts.

    STARTING ──ready──► RUNNING ──failure, death, silence──► DOWN ──start──► STARTING

Never here: the other replicas, and what a failure means for requests (`replicas.py`); the process itself
(`replica_process.py`).
"""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from pipemax.config import ConfigError
from pipemax.engine_stats import EngineStats
from pipemax.executor.base import ExecutorError
from pipemax.executor.exit_reason import describe_exit, memory_kills
from pipemax.replica_messages import Drop, Observe, ReplicaFailure, ReplicaNews, ReplicaReady, ReplicaSettings
from pipemax.text_generator import GenerationRequest

PROGRAM = "pipemax.replica_process"
_POLITE_SECONDS = 5.0
# A pipeline that hangs is ended by its own watchdog after `stall_seconds`. So much later the replica hangs itself.
_SILENCE_SECONDS = 60.0
_ATTENTION_SECONDS = 10.0
# Sent ahead of what an engine has taken: more than it takes while the news of that are on their way.
_FEWEST_AHEAD = 64


class ReplicaState(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    DOWN = "down"


class Replica:
    """One pipeline in a process of its own. `settings` are `EngineConfig`'s, of one pipeline.

    room        requests that may be sent now: so many that its engine never waits for the pipe
    in_flight   request id to request, of what was sent and has not come back
    stats       of the engine that runs or ran last
    """

    def __init__(self, *, index: int, settings: Mapping[str, Any], stall_seconds: float) -> None:
        self.index = index
        self.state = ReplicaState.DOWN
        self.in_flight: dict[str, GenerationRequest] = {}
        self.room = 0
        self.ready: ReplicaReady | None = None
        self.stats: EngineStats | None = None
        self.fruitless_failures = 0
        self.start_at_seconds = 0.0
        self._settings = settings
        self._requests_ahead = 0
        self._silence_seconds = stall_seconds + _SILENCE_SECONDS
        self._heard_seconds = 0.0
        self._checked_seconds = 0.0
        self._open_drops = 0
        self._link: _Link | None = None

    def start(self) -> None:
        """Starts the process; `receive` tells when it is ready."""
        assert self.state is ReplicaState.DOWN and not self.in_flight
        self._link = _Link(ReplicaSettings(self._settings, dict(os.environ)))
        self.state = ReplicaState.STARTING
        self.stats = None
        self._open_drops = 0
        self._heard_seconds = time.monotonic()

    @property
    def pipe(self) -> Connection:
        assert self._link is not None
        return self._link.pipe

    @property
    def pid(self) -> int | None:
        """Of its process; None when it has none."""
        return None if self._link is None else self._link.process.pid

    @property
    def is_dropping(self) -> bool:
        """Whether a drop is not done yet."""
        return self._open_drops > 0

    def send_requests(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises ExecutorError when the process is gone; they are in flight all the same."""
        self.in_flight.update((request.request_id, request) for request in requests)
        self.room -= len(requests)
        self._send(list(requests))

    def observe(self) -> None:
        self._send(Observe())

    def drop(self, what: Drop) -> None:
        """Requests in flight that this spares still come out; the others are forgotten once it is done."""
        self._open_drops += 1
        if what is Drop.ALL:
            self.in_flight.clear()
        self._send(what)

    def receive(self) -> ReplicaNews | None:
        """One message, for which it blocks; None when that was all about itself. Room and states are up to date then.

        Raises ConfigError or ExecutorError when the process has failed or died.
        """
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        self._heard_seconds = time.monotonic()
        if isinstance(message, ReplicaFailure):
            if message.config_error:
                raise ConfigError(message.message)
            raise ExecutorError(self._named(message.message), details=message.details)
        if isinstance(message, ReplicaReady):
            self.ready = message
            self.state = ReplicaState.RUNNING
            self._requests_ahead = max(_FEWEST_AHEAD, message.max_num_seqs)
            self.room = self._requests_ahead
            return None
        assert isinstance(message, ReplicaNews)
        # What came out in spite of a drop of all is nobody's.
        wanted = [output for output in message.outputs if self.in_flight.pop(output.request_id, None) is not None]
        message.outputs = wanted
        self.room += message.num_taken
        self.stats = message.stats
        self._open_drops -= message.num_drops
        assert self._open_drops >= 0
        if message.num_drops and not self._open_drops:
            self.in_flight.clear()
            self.room = self._requests_ahead
        return message

    def check_silence(self) -> None:
        """Raises ExecutorError when nothing has been heard for so long that the process must hang."""
        now_seconds = time.monotonic()
        # Nobody has listened for a while: the caller is slow, or all processes were stopped and have been continued.
        was_away = now_seconds - self._checked_seconds > _ATTENTION_SECONDS
        self._checked_seconds = now_seconds
        if self.state is not ReplicaState.RUNNING or not self.in_flight or was_away:
            self._heard_seconds = now_seconds
        elif now_seconds - self._heard_seconds > self._silence_seconds:
            raise ExecutorError(self._named(f"has not been heard of for {self._silence_seconds:.0f} s"))

    def end(self) -> None:
        """Ends the process, by force if need be. Idempotent; never raises."""
        self.state = ReplicaState.DOWN
        self._open_drops = 0
        if self._link is not None:
            self._link.end()
            self._link = None

    def _send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            raise self._death() from None

    def _death(self) -> ExecutorError:
        assert self._link is not None
        code = self._link.wait()
        if code is None:
            return ExecutorError(self._named("closed its pipe and did not end"))
        how = describe_exit(code, memory_kills_before=self._link.memory_kills_before, memory_kills_now=memory_kills())
        return ExecutorError(self._named(how))

    def _named(self, what: str) -> str:
        return f"replica {self.index}: {what}"


class _Link:
    """A process and the pipe to it."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self.memory_kills_before = memory_kills()
        self.pipe, child_end = multiprocessing.Pipe()
        # Its own interpreter and fork server; not `multiprocessing`'s, whose daemons may not have stages.
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        finally:
            child_end.close()
        self._finalizer = weakref.finalize(self, _end, self.process, self.pipe, os.getpid())
        with contextlib.suppress(OSError):  # it is gone already: `receive` finds out
            self.pipe.send(settings)

    def wait(self) -> int | None:
        """The exit code; None when the process does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(_POLITE_SECONDS)
        return None

    def end(self) -> None:
        self._finalizer()


def _end(process: subprocess.Popen[bytes], pipe: Connection, owner_pid: int) -> None:
    pipe.close()
    if os.getpid() != owner_pid:
        return  # a fork of the parent: the replica is not its own
    try:
        process.wait(_POLITE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
