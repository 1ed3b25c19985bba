"""`compare_layouts`: every candidate over the same workload, a simulation or an estimate each, on all cores.

A long workload is sampled, and its time made up from the sample's:

    time(all) = time(sample) + (requests left) x (decode of one at the steady rate + its prefill)

because a sample has the same ramp and the same tail as the whole. Where a sample is too short to have a steady part its
mean time a request is used, which is pessimistic. Estimates are cheap: half a sample tells what the other half adds.
Never here: which layouts (`layouts.py`), which is best (`recommend.py`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random

from pipemax.config import ConfigError, KVOffload, PhasePolicyName
from pipemax.cost.continuous_batching import BatchingLimits
from pipemax.cost.hardware import ServerProfile
from pipemax.cost.memory import tensor_parallel_blocks
from pipemax.cost.tensor_parallel import estimate_tensor_parallel
from pipemax.cost.workload import RequestLengths
from pipemax.model_spec import ModelSpec
from pipemax.plan import Phase
from pipemax.planning.layouts import Layout, PipelineLayout, TensorLayout, replica_server
from pipemax.planning.simulate import PipelineSettings, SimulatedRun, simulate_pipeline

# Of the engine that a tensor-parallel group would run: vLLM's defaults for offline use on large cards. Smaller ones
# would hold fewer rows.
_TENSOR_PARALLEL_SEQS = 1024
_TENSOR_PARALLEL_BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What all layouts share; names as in `EngineConfig`. Bytes are of one element."""

    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    dtype_bytes: int = 2
    kv_dtype_bytes: int = 2

    def of_pipeline(self, *, kv_offload: KVOffload, phase_policy: PhasePolicyName) -> PipelineSettings:
        return PipelineSettings(
            phase_policy=phase_policy,
            kv_offload=kv_offload,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            dtype_bytes=self.dtype_bytes,
            kv_dtype_bytes=self.kv_dtype_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A workload and what was drawn of it, in file order; `total_*` are of all of it."""

    sample: tuple[RequestLengths, ...]
    total_requests: int
    total_output_tokens: int

    @classmethod
    def of(cls, workload: Sequence[RequestLengths], *, max_requests: int) -> Job:
        """Draws at most `max_requests`, always the same ones. The longest request is among them: it must fit too."""
        chosen: Sequence[int] = range(len(workload))
        if len(workload) > max_requests:
            longest = max(chosen, key=lambda i: workload[i].prompt_tokens + workload[i].output_tokens)
            others = [index for index in chosen if index != longest]
            chosen = sorted([longest, *Random(0).sample(others, max_requests - 1)])
        return cls(
            sample=tuple(workload[index] for index in chosen),
            total_requests=len(workload),
            total_output_tokens=sum(request.output_tokens for request in workload),
        )

    @property
    def is_sampled(self) -> bool:
        return len(self.sample) < self.total_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutResult:
    """One layout over the whole job, all replicas together.

    job_seconds         of the whole workload, made up from the sample
    mean_rows           of a step with decode rows, of one replica
    home_bytes          host memory in use at most
    run                 one replica's simulation of its share of the sample; None for an estimate
    """

    layout: Layout
    job_seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    mean_rows: float
    home_bytes: int
    run: SimulatedRun | None


@dataclass(frozen=True, slots=True)
class LayoutRefusal:
    """A layout that does not fit, in one line."""

    layout: Layout
    reason: str


def compare_layouts(
    *, layouts: Sequence[Layout], model: ModelSpec, server: ServerProfile, job: Job, settings: JobSettings
) -> list[LayoutResult | LayoutRefusal]:
    """In the order of `layouts`."""
    evaluate = partial(evaluate_layout, model=model, server=server, job=job, settings=settings)
    num_workers = min(len(layouts), len(os.sched_getaffinity(0)))
    if num_workers <= 1:
        return [evaluate(layout) for layout in layouts]
    # Forking a process that has read a model's config would copy torch's threads.
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(evaluate, layouts))


def evaluate_layout(
    layout: Layout, *, model: ModelSpec, server: ServerProfile, job: Job, settings: JobSettings
) -> LayoutResult | LayoutRefusal:
    """Simulates a pipeline, estimates tensor parallelism."""
    replica = replica_server(server, layout.num_replicas)
    share = job.sample[:: layout.num_replicas]
    try:
        if isinstance(layout, PipelineLayout):
            pipeline = settings.of_pipeline(kv_offload=layout.kv_offload, phase_policy=layout.phase_policy)
            run = simulate_pipeline(model=model, server=replica, workload=share, settings=pipeline)
            return _result(
                layout,
                job,
                sample_seconds=run.seconds,
                request_seconds=_pipeline_request_seconds(run),
                mean_rows=run.mean_decode_rows,
                home_bytes=run.max_home_bytes * layout.num_replicas,
                run=run,
            )
        return _tensor_parallel(layout, model=model, server=replica, share=share, job=job, settings=settings)
    except ConfigError as error:
        return LayoutRefusal(layout, str(error))


def _tensor_parallel(
    layout: TensorLayout,
    *,
    model: ModelSpec,
    server: ServerProfile,
    share: Sequence[RequestLengths],
    job: Job,
    settings: JobSettings,
) -> LayoutResult:
    num_blocks = tensor_parallel_blocks(
        model=model,
        server=server,
        block_size=settings.block_size,
        dtype_bytes=settings.dtype_bytes,
        kv_dtype_bytes=settings.kv_dtype_bytes,
    )
    estimate = partial(
        estimate_tensor_parallel,
        model=model,
        server=server,
        limits=BatchingLimits(
            num_blocks=num_blocks,
            block_size=settings.block_size,
            max_num_seqs=_TENSOR_PARALLEL_SEQS,
            max_num_batched_tokens=_TENSOR_PARALLEL_BATCHED_TOKENS,
        ),
        peer_link=layout.peer_link,
        dtype_bytes=settings.dtype_bytes,
    )
    whole = estimate(workload=share)
    request_seconds = whole.seconds / len(share)
    if job.is_sampled and len(share) > 1:
        half = share[::2]
        request_seconds = (whole.seconds - estimate(workload=half).seconds) / (len(share) - len(half))
    return _result(
        layout,
        job,
        sample_seconds=whole.seconds,
        request_seconds=request_seconds,
        mean_rows=whole.mean_rows,
        home_bytes=0,
        run=None,
    )


def _pipeline_request_seconds(run: SimulatedRun) -> float:
    """What one more request adds to a run that is long enough."""
    mean_seconds = run.seconds / run.num_requests
    if run.steady is None:
        return mean_seconds
    decode = run.output_tokens / run.num_requests / run.steady.output_tokens_per_second
    return min(mean_seconds, decode + run.phase_seconds[Phase.PREFILL] / run.num_requests)


def _result(
    layout: Layout,
    job: Job,
    *,
    sample_seconds: float,
    request_seconds: float,
    mean_rows: float,
    home_bytes: int,
    run: SimulatedRun | None,
) -> LayoutResult:
    left = (job.total_requests - len(job.sample)) / layout.num_replicas
    job_seconds = sample_seconds + left * request_seconds
    return LayoutResult(
        layout=layout,
        job_seconds=job_seconds,
        output_tokens_per_second=job.total_output_tokens / job_seconds,
        requests_per_second=job.total_requests / job_seconds,
        mean_rows=mean_rows,
        home_bytes=home_bytes,
        run=run,
    )
