"""`compare_layouts`: every candidate over the same workload, a simulation or an estimate each, on all cores.

A long workload is sampled, and its time made up from the sample's, which has the same ramp and the same tail:

    time(all) = time(sample) + (requests left) x (decode of one at the steady rate + its prefill)

A sample that fills the batches in flight less than a few times over shows no steady rate. Then what a request adds is
the sum of `cost/steady_state.py`, over the share of time that the busiest stage was busy (`LayoutResult.is_rough`).
Estimates of tensor parallelism are cheap: they take a larger sample, and the best of a few settings. Never here: which
layouts (`layouts.py`), which is best (`recommend.py`).
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random

from pipemax.config import MOST_NUM_SEQS, ConfigError, KVOffload, PhasePolicyName
from pipemax.cost.continuous_batching import BatchingLimits
from pipemax.cost.hardware import ServerProfile
from pipemax.cost.memory import tensor_parallel_blocks
from pipemax.cost.tensor_parallel import estimate_tensor_parallel
from pipemax.cost.workload import MeanLengths, RequestLengths
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.plan import Phase
from pipemax.planning.layouts import Layout, PipelineLayout, TensorLayout, replica_server
from pipemax.planning.simulate import PipelineSettings, SimulatedRun, plan_pipeline, simulate_pipeline
from pipemax.planning.steps import SteadyDecode

# max_num_batched_tokens that are tried for the engine that a tensor-parallel group would run, each with as many rows as
# memory takes and with as many as it takes without starting anyone over.
_TENSOR_PARALLEL_BATCHED_TOKENS = (2048, 8192)
_ESTIMATED_REQUESTS = 5000
# A sample that fills the batches in flight this often has a steady part.
_FILLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What all layouts share; names as in `EngineConfig`. Bytes are of one element."""

    max_num_seqs: int = MOST_NUM_SEQS
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    dtype_bytes: int = 2
    kv_dtype_bytes: int = 2
    heads: tuple[HeadPlace, ...] = tuple(HeadPlace)

    def of_pipeline(self, *, kv_offload: KVOffload, phase_policy: PhasePolicyName) -> PipelineSettings:
        return PipelineSettings(
            phase_policy=phase_policy,
            kv_offload=kv_offload,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            dtype_bytes=self.dtype_bytes,
            kv_dtype_bytes=self.kv_dtype_bytes,
            heads=self.heads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A workload and what was drawn of it, in file order: `sample` for simulations, `large_sample` for estimates;
    `total_*` are of all of it."""

    sample: tuple[RequestLengths, ...]
    large_sample: tuple[RequestLengths, ...]
    total_requests: int
    total_output_tokens: int

    @classmethod
    def of(cls, workload: Sequence[RequestLengths], *, max_requests: int) -> Job:
        """`sample` has at most `max_requests`, always the same ones."""
        return cls(
            sample=_sample(workload, max_requests),
            large_sample=_sample(workload, max(max_requests, _ESTIMATED_REQUESTS)),
            total_requests=len(workload),
            total_output_tokens=sum(request.output_tokens for request in workload),
        )

    @property
    def is_sampled(self) -> bool:
        return len(self.sample) < self.total_requests


def _sample(workload: Sequence[RequestLengths], num_requests: int) -> tuple[RequestLengths, ...]:
    """In file order. The longest request is among them: it must fit too."""
    if len(workload) <= num_requests:
        return tuple(workload)
    longest = max(range(len(workload)), key=lambda i: workload[i].prompt_tokens + workload[i].output_tokens)
    others = [index for index in range(len(workload)) if index != longest]
    return tuple(workload[index] for index in sorted([longest, *Random(0).sample(others, num_requests - 1)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutResult:
    """One layout over the whole job, all replicas together.

    job_seconds         of the whole workload, made up from the sample
    mean_rows           of a step with decode rows, of one replica
    home_bytes          host memory in use at most
    run                 one replica's simulation of its share of the sample; None for an estimate
    is_rough            made up from a sample that is too short to have a steady part
    """

    layout: Layout
    job_seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    mean_rows: float
    home_bytes: int
    run: SimulatedRun | None
    is_rough: bool


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
    try:
        if isinstance(layout, PipelineLayout):
            return _pipeline(layout, model=model, server=replica, job=job, settings=settings)
        return _tensor_parallel(layout, model=model, server=replica, job=job, settings=settings)
    except ConfigError as error:
        return LayoutRefusal(layout, str(error))


def _pipeline(
    layout: PipelineLayout, *, model: ModelSpec, server: ServerProfile, job: Job, settings: JobSettings
) -> LayoutResult:
    share = job.sample[:: layout.num_replicas]
    pipeline = settings.of_pipeline(kv_offload=layout.kv_offload, phase_policy=layout.phase_policy)
    run = simulate_pipeline(model=model, server=server, workload=share, settings=pipeline)
    num_requests = job.total_requests / layout.num_replicas
    state = plan_pipeline(
        model=model,
        server=server,
        settings=pipeline,
        lengths=MeanLengths.of(share),
        num_requests=math.ceil(num_requests),
    ).state
    is_rough = job.is_sampled and (run.steady is None or len(share) < _FILLS * state.rows * layout.num_stages)
    if is_rough or run.steady is None:
        request_seconds = state.request_seconds / max(
            run.stage_utilisation if run.steady is None else run.steady.stage_utilisation
        )
    else:
        request_seconds = _steady_request_seconds(run, run.steady)
    request_seconds = min(request_seconds, run.seconds / run.num_requests)
    return _result(
        layout,
        job,
        job_seconds=run.seconds + (num_requests - len(share)) * request_seconds,
        mean_rows=run.mean_decode_rows,
        home_bytes=run.max_home_bytes * layout.num_replicas,
        run=run,
        is_rough=is_rough,
    )


def _tensor_parallel(
    layout: TensorLayout, *, model: ModelSpec, server: ServerProfile, job: Job, settings: JobSettings
) -> LayoutResult:
    num_blocks = tensor_parallel_blocks(
        model=model,
        server=server,
        block_size=settings.block_size,
        dtype_bytes=settings.dtype_bytes,
        kv_dtype_bytes=settings.kv_dtype_bytes,
    )
    lengths = MeanLengths.of(job.large_sample)
    all_rows = settings.max_num_seqs * layout.num_shards  # as many as a pipeline of these GPUs may have in flight
    safe_rows = int(num_blocks * settings.block_size / (lengths.prompt_tokens + lengths.output_tokens))
    limits = [
        BatchingLimits(
            num_blocks=num_blocks, block_size=settings.block_size, max_num_seqs=rows, max_num_batched_tokens=tokens
        )
        for tokens in _TENSOR_PARALLEL_BATCHED_TOKENS
        for rows in sorted({all_rows, max(1, min(all_rows, safe_rows))})
    ]
    estimate = partial(
        estimate_tensor_parallel,
        model=model,
        server=server,
        peer_link=layout.peer_link,
        dtype_bytes=settings.dtype_bytes,
    )
    share = job.sample[:: layout.num_replicas]
    best = min(limits, key=lambda one: estimate(workload=share, limits=one).seconds)
    large_share = job.large_sample[:: layout.num_replicas]
    result = estimate(workload=large_share, limits=best)
    return _result(
        layout,
        job,
        job_seconds=result.seconds * job.total_requests / len(job.large_sample),
        mean_rows=result.mean_rows,
        home_bytes=0,
        run=None,
        is_rough=False,
    )


def _steady_request_seconds(run: SimulatedRun, steady: SteadyDecode) -> float:
    """What one more request adds to a run that is long enough."""
    decode = run.output_tokens / run.num_requests / steady.output_tokens_per_second
    return decode + run.phase_seconds[Phase.PREFILL] / run.num_requests


def _result(
    layout: Layout,
    job: Job,
    *,
    job_seconds: float,
    mean_rows: float,
    home_bytes: int,
    run: SimulatedRun | None,
    is_rough: bool,
) -> LayoutResult:
    return LayoutResult(
        layout=layout,
        job_seconds=job_seconds,
        output_tokens_per_second=job.total_output_tokens / job_seconds,
        requests_per_second=job.total_requests / job_seconds,
        mean_rows=mean_rows,
        home_bytes=home_bytes,
        run=run,
        is_rough=is_rough,
    )
