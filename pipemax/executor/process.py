"""`ProcessExecutor`: one process a stage, plans down private pipes, reports back up.

    control plane                          stage processes
    submit --pickled once--> control pipe ---> stage 0, 1, ... N-1
    wait   <--in plan order-- report pipes <-- a report a stage and step

A result comes out when every stage has reported its step. A stage that fails or dies ends all of them, and the caller
gets an ExecutorError that names it. So it does when nothing gets on for `stall_seconds` (`watchdog.py`), with the
stacks of all processes. Stage processes come from a fork server that has the heavy modules imported.

Here live plans on their way and their results. Never here: the life of processes (`stage_group.py`), what a stage does
(`worker/`), how much memory it gets (`sizing.py`).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import pickle
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipemax.config import DEFAULT_STALL_SECONDS, FEWEST_NUM_SEQS, LoadFormat, OffloadChoice
from pipemax.cuda_options import CudaOptions
from pipemax.executor.sizing import KVWishes, available_cores, free_host_bytes, size_kv
from pipemax.executor.stage_group import StageGroup
from pipemax.executor.stage_handle import start_server
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.pipeline_shape import PipelineShape
from pipemax.plan import Capacity, Int64Array, StepPlan, StepResult

if TYPE_CHECKING:
    from pipemax.worker.running_step import StageReport
    from pipemax.worker.start_up import StartUpPart

_BEAT_SECONDS = 1.0


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
        stages: StageGroup,
        shape: PipelineShape,
        capacity: Capacity,
        vocab_size: int,
        device: str,
        start_up: Sequence[tuple[StartUpPart, ...]],
    ) -> None:
        self._stages = stages
        self._shape = shape
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
        max_num_batched_tokens: int = 2048,
        kv_offload: OffloadChoice = OffloadChoice.AUTO,
        threads_per_stage: int | None = None,
        stall_seconds: float = DEFAULT_STALL_SECONDS,
        cuda: CudaOptions | None = None,
        choose_shape: Callable[[str, bool], PipelineShape] | None = None,
    ) -> ProcessExecutor:
        """Starts and loads all stages; parameters are named and meant as in `EngineConfig`. `spec` is the model's.

        `choose_shape` is given the kind of device ("cpu", "cuda") and whether the head can be cut. Without it the head
        is on the last stage, layers are as even as can be, and steps have 256 rows at most.

        With `max_model_len` None the model's own length counts, cut to what memory holds (`capacity` tells).

        Raises ConfigError when the settings, the files or the memory do not do (nothing is left running then), and
        ExecutorError when a stage fails otherwise.
        """
        # The server imports the heavy modules while this process imports what it needs of them.
        start_server()
        from pipemax.worker.device import resolve_device
        from pipemax.worker.loader import check_checkpoint
        from pipemax.worker.model_slice import StageSlice, split_layers
        from pipemax.worker.stage_process import KVSize, StageLoaded, StageReady, StageSettings

        cuda = cuda or CudaOptions()
        model_len = max_model_len or spec.max_position_embeddings
        device = resolve_device(device, num_stages=num_stages, stage_devices=cuda.stage_devices)
        can_cut_head = check_checkpoint(
            model_dir, load_format, trust_remote_code, num_stages=num_stages, max_model_len=model_len
        )
        if choose_shape is not None:
            shape = choose_shape(device, can_cut_head)
        else:
            even = tuple(split_layers(spec.num_layers, num_stages))
            shape = PipelineShape(HeadPlace.LAST, even, FEWEST_NUM_SEQS)
        # Mode 0700; gone when all are connected. It lies where the fork server removes it if this process is killed.
        with tempfile.TemporaryDirectory(prefix="pipemax-", dir=multiprocessing.util.get_temp_dir()) as private_dir:
            stages = StageGroup(
                [
                    StageSettings(
                        stage=StageSlice(index, num_stages, layers, shape.head),
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
                        max_num_seqs=shape.max_num_seqs,
                        max_num_batched_tokens=max_num_batched_tokens,
                        beat_seconds=min(_BEAT_SECONDS, stall_seconds / 4),
                        cuda=cuda,
                    )
                    for index, layers in enumerate(shape.layers)
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
                        max_num_seqs=shape.max_num_seqs,
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
            shape=shape,
            capacity=capacity,
            vocab_size=spec.vocab_size,
            device=device,
            start_up=[one.start_up for one in ready],
        )

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def shape(self) -> PipelineShape:
        return self._shape

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
        from pipemax.worker.running_step import StageReport

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
            (sampling,) = (report for report in reports if report.token_ids is not None)
            assert sampling.token_ids is not None and len(sampling.token_ids) == len(step.sampled_request_ids)
            yield StepResult(
                step_id=step.step_id,
                batch_id=step.batch_id,
                request_ids=step.sampled_request_ids,
                token_ids=sampling.token_ids.astype(np.int32, copy=False),
                logprobs=sampling.logprobs,
                row_errors=dict(sampling.row_errors or {}),
                finished_seconds=max(report.finished_seconds for report in reports),
                timings=tuple(report.timing for report in reports),
            )
