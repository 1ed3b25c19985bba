"""`ProcessExecutor`: one process a stage, plans down private pipes, reports back up.

    control plane                          stage processes
    submit --pickled once--> control pipe ---> stage 0, 1, ... N-1
    wait   <--in plan order-- report pipes <-- a report a stage and step

A result comes out when every stage has reported its step. A stage that fails or dies ends all of them, and the caller
gets an ExecutorError that names it. So it does when nothing gets on for `stall_seconds` (`watchdog.py`), with the
stacks of all processes. Stage processes come from a fork server that has the heavy modules imported.

Here live processes and what becomes of them. Never here: what a stage does (`worker/`), how much memory it gets
(`sizing.py`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import pickle
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipemax.config import DEFAULT_STALL_SECONDS, ConfigError, KVOffload, LoadFormat
from pipemax.cuda_options import CudaOptions
from pipemax.executor.base import ExecutorError
from pipemax.executor.exit_reason import describe_exit, memory_kills
from pipemax.executor.sizing import KVWishes, available_cores, free_host_bytes, size_kv
from pipemax.executor.stacks import StackSource, gather_stacks, process_state
from pipemax.executor.temporary_folder import OWNER_VARIABLE
from pipemax.executor.watchdog import Watchdog
from pipemax.model_spec import ModelSpec
from pipemax.plan import Capacity, Int64Array, StepPlan, StepResult

if TYPE_CHECKING:
    from pipemax.worker.pulse import StageBeat
    from pipemax.worker.stage_process import StageFailure, StageSettings
    from pipemax.worker.stage_worker import StageReport
    from pipemax.worker.start_up import StartUpPart

_PRELOAD = ["pipemax.worker.preload"]
# Read when the OpenMP library is loaded. Its threads spin while they wait otherwise, and there are more runnable
# threads than cores here: stages, copies, links, the control plane (measured on two busy cores, a step of a tiny model:
# 4 ms with this, 13 to 100 ms without).
#
# Of torch's own messages only errors: it warns of every NCCL group that it connects later than it could.
_SERVER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}
# When a stage dies, the others fail over broken links at the same moment; the cause may be told a little later.
_DIAGNOSIS_SECONDS = 1.0
_POLITE_SECONDS = 1.0
_BEAT_SECONDS = 1.0

_Message = TypeVar("_Message")


@dataclass(frozen=True, slots=True)
class _Stage:
    """One process and the parent's ends of its pipes."""

    index: int
    process: ForkServerProcess
    control: Connection
    reports: Connection
    stacks: Connection


class _StageGroup:
    """All stage processes: they live and end together."""

    def __init__(self, settings: Sequence[StageSettings], *, stall_seconds: float) -> None:
        self._owner_pid = os.getpid()
        self._stages: list[_Stage] = []
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
                self._stages.append(_start_stage(one))
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

    def _drain(self, stage: _Stage, messages: list[tuple[int, object]]) -> bool:
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

    def _describe(self, stage: _Stage, now_seconds: float) -> str:
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


@dataclass(slots=True)
class _SubmittedStep:
    """A plan that is on its way; `reports` fills up, one a stage."""

    step_id: int
    batch_id: int
    sampled_request_ids: Int64Array
    reports: list[StageReport | None]


class ProcessExecutor:
    """Executor over stage processes on this machine. Make one with `start`."""

    def __init__(
        self,
        *,
        stages: _StageGroup,
        stage_layers: Sequence[range],
        capacity: Capacity,
        vocab_size: int,
        device: str,
        start_up: Sequence[tuple[StartUpPart, ...]],
    ) -> None:
        self._stages = stages
        self._stage_layers = tuple(stage_layers)
        self._capacity = capacity
        self._vocab_size = vocab_size
        self._device = device
        self._start_up = tuple(start_up)
        self._submitted: deque[_SubmittedStep] = deque()
        self._finalizer = weakref.finalize(self, stages.end)

    @classmethod
    def start(
        cls,
        *,
        model_dir: Path,
        spec: ModelSpec,
        max_model_len: int | None,
        num_stages: int = 1,
        num_batches: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        load_format: LoadFormat = LoadFormat.AUTO,
        trust_remote_code: bool = False,
        block_size: int = 16,
        num_device_blocks: int | None = None,
        num_window_blocks: int | None = None,
        host_memory_gib: float | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        kv_offload: KVOffload = KVOffload.ON,
        threads_per_stage: int | None = None,
        stall_seconds: float = DEFAULT_STALL_SECONDS,
        cuda: CudaOptions | None = None,
        choose_layers: Callable[[str], Sequence[range]] | None = None,
    ) -> ProcessExecutor:
        """Starts and loads all stages; parameters are named and meant as in `EngineConfig`. `spec` is the model's.

        `choose_layers` is given the kind of device ("cpu", "cuda") and gives each stage's layers; without it they are
        as even as can be.

        With `max_model_len` None the model's own length counts, cut to what memory holds (`capacity` tells).

        Raises ConfigError when the settings, the files or the memory do not do (nothing is left running then), and
        ExecutorError when a stage fails otherwise.
        """
        # The server imports the heavy modules while this process imports what it needs of them.
        _start_server()
        from pipemax.worker.device import resolve_device
        from pipemax.worker.loader import check_checkpoint
        from pipemax.worker.stage_model import StageSlice, split_layers
        from pipemax.worker.stage_process import KVSize, StageLoaded, StageReady, StageSettings

        cuda = cuda or CudaOptions()
        model_len = max_model_len or spec.max_position_embeddings
        device = resolve_device(device, num_stages=num_stages, stage_devices=cuda.stage_devices)
        check_checkpoint(model_dir, load_format, trust_remote_code, num_stages=num_stages, max_model_len=model_len)
        layers_of = split_layers(spec.num_layers, num_stages) if choose_layers is None else choose_layers(device)
        # Mode 0700; gone when all are connected. It lies where the fork server removes it if this process is killed.
        with tempfile.TemporaryDirectory(prefix="pipemax-", dir=multiprocessing.util.get_temp_dir()) as private_dir:
            stages = _StageGroup(
                [
                    StageSettings(
                        stage=StageSlice(index, num_stages, layers),
                        model_dir=model_dir,
                        rendezvous=Path(private_dir) / "rendezvous",
                        device=device,
                        dtype=dtype,
                        load_format=load_format,
                        trust_remote_code=trust_remote_code,
                        seed=seed,
                        max_model_len=model_len,
                        block_size=block_size,
                        num_threads=threads_per_stage or max(1, available_cores() // num_stages),
                        environment=dict(os.environ),
                        max_num_seqs=max_num_seqs,
                        max_num_batched_tokens=max_num_batched_tokens,
                        beat_seconds=min(_BEAT_SECONDS, stall_seconds / 4),
                        cuda=cuda,
                    )
                    for index, layers in enumerate(layers_of)
                ],
                stall_seconds=stall_seconds,
            )
            try:
                loaded = stages.collect(StageLoaded)
                free_device_bytes = [one.free_device_bytes for one in loaded if one.free_device_bytes is not None]
                capacity = size_kv(
                    KVWishes(
                        block_size=block_size,
                        max_model_len=max_model_len,
                        max_num_seqs=max_num_seqs,
                        num_batches=num_batches or num_stages,
                        num_device_blocks=num_device_blocks,
                        num_window_blocks=num_window_blocks,
                        host_memory_gib=host_memory_gib,
                        offload=kv_offload,
                    ),
                    stage_block_bytes=[one.block_bytes for one in loaded],
                    free_device_bytes=free_device_bytes or None,
                    free_host_bytes=free_host_bytes(),
                )
                stages.send(pickle.dumps(KVSize(capacity.num_device_blocks, capacity.num_host_blocks)))
                ready = stages.collect(StageReady)
            except BaseException:
                stages.end()
                raise
        return cls(
            stages=stages,
            stage_layers=layers_of,
            capacity=capacity,
            vocab_size=spec.vocab_size,
            device=device,
            start_up=[one.start_up for one in ready],
        )

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def stage_layers(self) -> tuple[range, ...]:
        """The model's layers that each stage holds."""
        return self._stage_layers

    @property
    def start_up(self) -> tuple[tuple[StartUpPart, ...], ...]:
        """What each stage did before it was ready, and what that cost."""
        return self._start_up

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self._device

    @property
    def vocab_size(self) -> int:
        """Token ids that the model can embed are below this."""
        return self._vocab_size

    def submit(self, plan: StepPlan) -> None:
        """Hands a plan to every stage. Raises ExecutorError when a stage is gone."""
        self._stages.send(pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL))
        self._submitted.append(
            _SubmittedStep(
                plan.step_id, plan.batch_id, plan.request_ids[plan.samples], [None] * self._capacity.num_stages
            )
        )

    def wait(self) -> Sequence[StepResult]:
        """Blocks until at least one submitted plan is done; gives all that are, in submission order.

        Raises ExecutorError when a stage has died or failed, after the results that were complete by then.
        """
        assert self._submitted, "nothing has been submitted"
        while not (results := list(self._take_done())):
            for index, message in self._stages.receive():
                self._note(index, message)
        return results

    def now(self) -> float:
        """Seconds on this machine's monotonic clock, the one that stages report in."""
        return time.monotonic()

    def shutdown(self) -> None:
        """Ends all stages. Idempotent; never raises."""
        self._finalizer()

    def _note(self, stage: int, message: object) -> None:
        from pipemax.worker.stage_worker import StageReport

        assert isinstance(message, StageReport)
        for step in self._submitted:
            if step.step_id == message.step_id:
                assert step.reports[stage] is None
                step.reports[stage] = message
                return
        raise AssertionError(f"stage {stage} reports step {message.step_id}, which was not submitted")

    def _take_done(self) -> Iterator[StepResult]:
        while self._submitted and None not in self._submitted[0].reports:
            step = self._submitted.popleft()
            reports = [report for report in step.reports if report is not None]
            last = reports[-1]
            assert last.token_ids is not None and len(last.token_ids) == len(step.sampled_request_ids)
            yield StepResult(
                step_id=step.step_id,
                batch_id=step.batch_id,
                request_ids=step.sampled_request_ids,
                token_ids=last.token_ids.astype(np.int32, copy=False),
                logprobs=last.logprobs,
                row_errors=dict(last.row_errors or {}),
                finished_seconds=max(report.finished_seconds for report in reports),
                timings=tuple(report.timing for report in reports),
            )


def _start_server() -> None:
    """Starts the fork server, unless it runs."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    added = {name: value for name, value in _SERVER_ENVIRONMENT.items() if name not in os.environ}
    # Always its own: this process may itself come from a fork server.
    added[OWNER_VARIABLE] = f"{os.getpid()}:{multiprocessing.util.get_temp_dir()}"
    before = os.environ.get(OWNER_VARIABLE)
    os.environ.update(added)
    try:
        forkserver.ensure_running()
    finally:
        for name in added:
            del os.environ[name]
        if before is not None:
            os.environ[OWNER_VARIABLE] = before


def _start_stage(settings: StageSettings) -> _Stage:
    from pipemax.worker.stage_process import run_stage_process

    context = multiprocessing.get_context("forkserver")
    child_control, control = context.Pipe(duplex=False)
    reports, child_reports = context.Pipe(duplex=False)
    stacks, child_stacks = context.Pipe(duplex=False)
    process = context.Process(
        target=run_stage_process,
        args=(settings, child_control, child_reports, child_stacks),
        name=f"pipemax-stage-{settings.stage.stage}",
        daemon=True,
    )
    try:
        with _main_module_hidden():
            process.start()
    except BaseException:
        control.close()
        reports.close()
        stacks.close()
        raise
    finally:
        # The child has its own; with these open here, neither side would see the other's end.
        child_control.close()
        child_reports.close()
        child_stacks.close()
    return _Stage(settings.stage.stage, process, control, reports, stacks)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps multiprocessing from importing the user's script again in each stage, which has no use for it.

    So scripts need no `if __name__ == "__main__"` guard.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = type(sys)("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _stage_error(index: int, failure: StageFailure) -> ExecutorError:
    lines = failure.message.splitlines() or [""]
    return ExecutorError(f"stage {index} failed: {lines[0]}", details=failure.traceback)
