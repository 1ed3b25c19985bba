"""`StageGroup`: the stage processes of a pipeline. They live and end together, and one of them is why.

    send      the same bytes to all                     control pipes
    receive   what any of them has said                 report pipes and the ends of processes
    broken    which went first? wait a moment for its own words, kill the rest, tell

Here lives what becomes of processes. Never here: how one is started (`stage_handle.py`), what messages mean to a
pipeline (`process.py`), when silence is a stall (`watchdog.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar

from pipemax.config import ConfigError
from pipemax.executor.base import ExecutorError
from pipemax.executor.exit_reason import describe_exit, memory_kills
from pipemax.executor.stacks import StackSource, gather_stacks, process_state
from pipemax.executor.stage_handle import StageHandle, start_stage
from pipemax.executor.watchdog import Watchdog

if TYPE_CHECKING:
    from pipemax.worker.pulse import StageBeat
    from pipemax.worker.stage_process import StageFailure, StageSettings

# When a stage dies, the others fail over broken links at the same moment; the cause may be told a little later.
_DIAGNOSIS_SECONDS = 1.0
_POLITE_SECONDS = 1.0

_Message = TypeVar("_Message")


class StageGroup:
    """All stage processes: they live and end together."""

    def __init__(self, settings: Sequence[StageSettings], *, stall_seconds: float) -> None:
        self._owner_pid = os.getpid()
        self._stages: list[StageHandle] = []
        self._failures: dict[int, StageFailure] = {}
        self._exit_codes: dict[int, int] = {}
        self._broken = False
        self._error: ExecutorError | ConfigError | None = None
        self._beats: dict[int, StageBeat] = {}
        self._heard_seconds: dict[int, float] = {}
        self._stall: ExecutorError | None = None
        self._stall_seconds = stall_seconds
        self._memory_kills_before = memory_kills()
        self._watchdog = Watchdog(stall_seconds=stall_seconds, on_stall=self._break_stall)
        try:
            for one in settings:
                self._stages.append(start_stage(one))
        except BaseException:
            self.end()
            raise

    def send(self, message: bytes) -> None:
        """The same bytes to every stage. Raises ExecutorError when one is gone."""
        try:
            with self._watchdog.watch():
                for stage in self._stages:
                    stage.control.send_bytes(message)
                    self._watchdog.progress()
        except OSError:
            raise self._end_and_explain() from None

    def receive(self) -> list[tuple[int, object]]:
        """Blocks until a stage has said something; (stage, message) pairs, in order for each stage.

        Raises ConfigError when a stage found the user's settings or files at fault, ExecutorError when one has failed
        or died or nothing has got on for too long; all stages have been ended then.
        """
        with self._watchdog.watch():
            while not self._broken:
                messages = self._receive_until(None)
                if messages:
                    return messages
        raise self._end_and_explain()

    def collect(self, kind: type[_Message]) -> list[_Message]:
        """One message of this kind from every stage, in stage order. Raises as `receive` does."""
        got: dict[int, _Message] = {}
        while len(got) < len(self._stages):
            for index, message in self.receive():
                assert isinstance(message, kind) and index not in got
                got[index] = message
        return [got[index] for index in range(len(self._stages))]

    def end(self) -> None:
        """Ends every process: by closing its pipe, else by SIGKILL. Idempotent; never raises."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the parent: the stages are not its own
        self._watchdog.stop()
        for stage in self._stages:
            with contextlib.suppress(OSError):
                stage.control.close()
        for by_force in (False, True):
            deadline = time.monotonic() + _POLITE_SECONDS
            for stage in self._stages:
                if by_force and stage.process.exitcode is None:
                    stage.process.kill()
            for stage in self._stages:
                stage.process.join(max(0.0, deadline - time.monotonic()))
        for stage in self._stages:
            with contextlib.suppress(OSError):
                stage.reports.close()
                stage.stacks.close()

    def _receive_until(self, deadline_seconds: float | None) -> list[tuple[int, object]]:
        """What stages have said, waiting for it if need be; notes failures and ends."""
        timeout = None if deadline_seconds is None else max(0.0, deadline_seconds - time.monotonic())
        watched: list[Connection | int] = [
            stage.process.sentinel for stage in self._stages if stage.index not in self._exit_codes
        ]
        watched += [stage.reports for stage in self._stages if not stage.reports.closed]
        ready = connection.wait(watched, timeout)
        messages: list[tuple[int, object]] = []
        for stage in self._stages:
            # The exit code first: what the stage has said by then is all that it ever says.
            code = stage.process.exitcode if stage.process.sentinel in ready else None
            if not self._drain(stage, messages):
                self._broken = True
            if code is not None:
                self._broken = True
                self._exit_codes[stage.index] = code
        return messages

    def _drain(self, stage: StageHandle, messages: list[tuple[int, object]]) -> bool:
        """Takes all that the stage has said so far; False when it will say no more."""
        from pipemax.worker.pulse import StageBeat
        from pipemax.worker.stage_process import StageFailure

        if stage.reports.closed:
            return False
        try:
            while stage.reports.poll():
                message = stage.reports.recv()
                if isinstance(message, StageFailure):
                    self._failures[stage.index] = message
                    return False
                self._heard_seconds[stage.index] = time.monotonic()
                if isinstance(message, StageBeat):
                    self._note_beat(stage.index, message)
                else:
                    self._watchdog.progress()
                    messages.append((stage.index, message))
        except (EOFError, OSError):
            stage.reports.close()
            return False
        return True

    def _note_beat(self, index: int, beat: StageBeat) -> None:
        last = self._beats.get(index)
        if last is None or beat.count != last.count:
            self._watchdog.progress()
        self._beats[index] = beat

    def _break_stall(self) -> None:
        """On the watchdog's thread: notes what every process is at, and kills the stages, which frees who waits."""
        now_seconds = time.monotonic()
        what = "; ".join(self._describe(stage, now_seconds) for stage in self._stages)
        sources = [StackSource(f"stage {s.index}", s.process.pid, s.stacks) for s in self._stages if s.process.pid]
        self._stall = ExecutorError(
            f"the pipeline hangs: nothing got on for {self._stall_seconds:g} s ({what})", details=gather_stacks(sources)
        )
        for stage in self._stages:
            stage.process.kill()

    def _describe(self, stage: StageHandle, now_seconds: float) -> str:
        beat, heard_seconds = self._beats.get(stage.index), self._heard_seconds.get(stage.index)
        what = f"stage {stage.index} {'starting' if beat is None else beat.doing}"
        if heard_seconds is None or now_seconds - heard_seconds > self._stall_seconds / 2:
            state = process_state(stage.process.pid) if stage.process.pid else "gone"
            what += f", without a sign of life, its process is {state}"
        return what

    def _end_and_explain(self) -> ExecutorError | ConfigError:
        """Finds out which stage was the first to go and why, and ends them all."""
        if self._error is None:
            self._error = self._stall
        deadline = time.monotonic() + _DIAGNOSIS_SECONDS
        while self._error is None and time.monotonic() < deadline:
            self._receive_until(min(deadline, time.monotonic() + 0.05))
            self._error = self._cause()
        self.end()
        if self._error is None:
            self._error = self._cause_of_last_resort()
        return self._error

    def _cause(self) -> ExecutorError | ConfigError | None:
        """The failure that is not the echo of another; None when there is none (yet)."""
        for stage in self._stages:
            failure, code = self._failures.get(stage.index), self._exit_codes.get(stage.index)
            if failure is not None and failure.config_error:
                return ConfigError(failure.message)
            if failure is not None and not failure.is_echo:
                return _stage_error(stage.index, failure)
            if failure is None and code is not None:
                reason = describe_exit(
                    code, memory_kills_before=self._memory_kills_before, memory_kills_now=memory_kills()
                )
                return ExecutorError(f"stage {stage.index} {reason}")
        return None

    def _cause_of_last_resort(self) -> ExecutorError:
        """When nothing but echoes is to be heard: a stage lives and does not answer."""
        for index, failure in sorted(self._failures.items()):
            return _stage_error(index, failure)
        return ExecutorError("a stage closed its pipe and did not end; all stages have been ended")


def _stage_error(index: int, failure: StageFailure) -> ExecutorError:
    lines = failure.message.splitlines() or [""]
    return ExecutorError(f"stage {index} failed: {lines[0]}", details=failure.traceback)
