"""`simulate_pipeline`: one pipeline over a workload, with PipeMax's own scheduler and engine, on simulated stages.

    workload ──► RequestState ──► Engine = Scheduler + SimExecutor ──► StepLog ──► SimulatedRun
                                  estimates    truth

A composition root like `llm.py`: parts are built and wired here. Output lengths are known to the simulator alone: the
scheduler sees a limit (the workload's longest output) and learns the rest as requests end. Never here: which layouts to
try, what to recommend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipemax.config import MOST_NUM_SEQS, ConfigError, KVOffload, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.hardware import GIB, ServerProfile
from pipemax.cost.load import StageShape
from pipemax.cost.memory import HOST_MEMORY_SHARE, RESERVE_BYTES, pipeline_capacity
from pipemax.cost.model import CostModel
from pipemax.cost.perturbed import PerturbedCostModel
from pipemax.cost.stage_split import split_stages
from pipemax.cost.steady_state import KVSpace, SteadyState
from pipemax.cost.table import best_cost_model
from pipemax.cost.workload import MeanLengths, RequestLengths
from pipemax.engine import Engine
from pipemax.executor.simulator import SimExecutor
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.observer import EngineObserver
from pipemax.plan import Capacity, Phase
from pipemax.planning.steps import SteadyDecode, StepLog
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState

_END_TOKEN = 1
_TOKEN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """What an engine is started with; names as in `EngineConfig`. Bytes are of one element.

    num_window_blocks    None: what the link brings up during a decode step; 0: prefilled requests may wait in host
                         memory, and no block of a running one travels
    correct_estimates    whether the scheduler learns from steps as they finish
    heads                where the head may be: the best of these is taken
    """

    phase_policy: PhasePolicyName
    kv_offload: KVOffload
    max_num_seqs: int = MOST_NUM_SEQS
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    async_scheduling: bool = True
    num_window_blocks: int | None = None
    correct_estimates: bool = True
    dtype_bytes: int = 2
    kv_dtype_bytes: int = 2
    heads: tuple[HeadPlace, ...] = tuple(HeadPlace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misestimate:
    """How the simulated machine differs from what the scheduler believes: true over estimated.

    decode_factor    of steps of one token a row
    prefill_factor   of what prompts add to such a step
    link_factor      of the host link's rates
    noise            standard deviation of the logarithm of a factor drawn for each step and stage, with `seed`
    """

    decode_factor: float = 1.0
    prefill_factor: float = 1.0
    link_factor: float = 1.0
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What came out. Shares are of `seconds`, one entry a stage.

    stage_layers           layers of each stage
    capacity               blocks that it had
    link_up, link_down     share of the time in which the host link was busy in that direction
    num_left               times that a running request had to leave its batch for lack of memory
    num_restarted          times that a request lost its KV and was computed again
    phase_steps            steps by phase
    phase_seconds          compute of the busiest stage by phase
    mean_decode_rows       of steps with decode rows
    max_home_blocks        homes in use at most; `max_home_bytes` over all stages
    steady                 the middle of the run (`steps.py`); None where it is too short to have one
    """

    seconds: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    stage_layers: tuple[int, ...]
    capacity: Capacity
    stage_utilisation: tuple[float, ...]
    window_wait: tuple[float, ...]
    activation_wait: tuple[float, ...]
    link_up: tuple[float, ...]
    link_down: tuple[float, ...]
    refill_bytes: int
    num_left: int
    num_restarted: int
    phase_steps: dict[Phase, int]
    phase_seconds: dict[Phase, float]
    mean_decode_rows: float
    max_home_blocks: int
    max_home_bytes: int
    steady: SteadyDecode | None

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return self.num_requests / self.seconds


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What is decided before a pipeline starts: stages, blocks, the window to start with."""

    stages: tuple[StageShape, ...]
    capacity: Capacity
    cost: CostModel
    state: SteadyState


def plan_pipeline(
    *, model: ModelSpec, server: ServerProfile, settings: PipelineSettings, lengths: MeanLengths, num_requests: int
) -> PipelinePlan:
    """Stages over all GPUs of the server, their blocks, and a window that the link can refill during a decode step.

    Raises ConfigError when the model does not fit.
    """
    cost = best_cost_model(
        model=model, gpu=server.gpu, dtype_bytes=settings.dtype_bytes, kv_dtype_bytes=settings.kv_dtype_bytes
    )
    num_batches = server.num_gpus
    max_rows = min(settings.max_num_seqs, max(1.0, num_requests / num_batches))
    host_link = server.host_link if settings.kv_offload is KVOffload.ON else None
    stages = split_stages(
        model=model,
        cost=cost,
        memory_bytes=[server.gpu.memory_bytes - RESERVE_BYTES] * server.num_gpus,
        host_bytes=int(server.host_memory_gib * HOST_MEMORY_SHARE * GIB),
        num_batches=num_batches,
        max_rows=max_rows,
        prefill_tokens=settings.max_num_batched_tokens,
        lengths=lengths,
        host_link=host_link,
        block_size=settings.block_size,
        dtype_bytes=settings.dtype_bytes,
        kv_dtype_bytes=settings.kv_dtype_bytes,
        heads=settings.heads,
    )
    capacity = pipeline_capacity(
        model=model,
        server=server,
        stages=stages,
        block_size=settings.block_size,
        window_blocks=0,
        dtype_bytes=settings.dtype_bytes,
        kv_dtype_bytes=settings.kv_dtype_bytes,
    )
    state = SteadyState.of(
        cost=cost,
        stages=stages,
        space=KVSpace(capacity.num_device_blocks, capacity.num_host_blocks, capacity.block_size, capacity.block_bytes),
        num_batches=num_batches,
        max_rows=max_rows,
        prefill_tokens=settings.max_num_batched_tokens,
        lengths=lengths,
        host_link=host_link,
    )
    window_blocks = state.window_blocks if settings.num_window_blocks is None else settings.num_window_blocks
    window_blocks = min(window_blocks, capacity.num_device_blocks - 1)
    return PipelinePlan(stages, dataclasses.replace(capacity, num_window_blocks=window_blocks), cost, state)


def simulate_pipeline(
    *,
    model: ModelSpec,
    server: ServerProfile,
    workload: Sequence[RequestLengths],
    settings: PipelineSettings,
    misestimate: Misestimate | None = None,
    watch: Callable[[Capacity], EngineObserver] | None = None,
) -> SimulatedRun:
    """Runs the whole workload, one stage a GPU of `server`, as many batches in flight.

    `watch` is given what the pipeline holds, and the observer that it gives is told of every plan and result.
    Raises ConfigError when the model, or one of the requests, does not fit.
    """
    assert workload
    lengths = MeanLengths.of(workload)
    plan = plan_pipeline(model=model, server=server, settings=settings, lengths=lengths, num_requests=len(workload))
    executor = SimExecutor.of_server(
        model=model,
        server=_true_server(server, misestimate),
        capacity=plan.capacity,
        stages=plan.stages,
        cost=_true_cost(plan.cost, misestimate),
        output_lengths=dict(enumerate(request.output_tokens for request in workload)),
        end_token_id=_END_TOKEN,
        token_id=_TOKEN,
        dtype_bytes=settings.dtype_bytes,
        kv_dtype_bytes=settings.kv_dtype_bytes,
    )
    num_stages = len(plan.stages)
    scheduler = build_scheduler(
        capacity=plan.capacity,
        num_batches=num_stages,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        async_scheduling=settings.async_scheduling,
        phase_policy=settings.phase_policy,
        forecast=Forecast(
            cost=plan.cost,
            stages=plan.stages,
            link=server.host_link,
            block_bytes=plan.capacity.block_bytes,
            learn=settings.correct_estimates,
        ),
        kv_offload=settings.kv_offload,
    )
    engine = Engine(scheduler=scheduler, executor=executor)
    log = StepLog(num_stages=num_stages)
    engine.observe(log)
    if watch is not None:
        engine.observe(watch(plan.capacity))
    for request in request_states(workload, capacity=plan.capacity):
        engine.add_request(request)
    output_tokens = 0
    while scheduler.population.requests or scheduler.num_plans_in_flight:
        output_tokens += len(engine.step())
    assert output_tokens == sum(request.output_tokens for request in workload)

    seconds = executor.now()
    totals = executor.stage_totals
    busiest = max(range(num_stages), key=lambda stage: totals[stage].compute_seconds)
    total_layers = sum(stage.num_layers for stage in plan.stages)
    largest = max(stage.num_layers for stage in plan.stages)
    return SimulatedRun(
        seconds=seconds,
        num_requests=len(workload),
        prompt_tokens=sum(request.prompt_tokens for request in workload),
        output_tokens=output_tokens,
        num_steps=log.num_steps,
        stage_layers=tuple(stage.num_layers for stage in plan.stages),
        capacity=plan.capacity,
        stage_utilisation=tuple(total.compute_seconds / seconds for total in totals),
        window_wait=tuple(total.window_wait_seconds / seconds for total in totals),
        activation_wait=tuple(total.activation_wait_seconds / seconds for total in totals),
        link_up=tuple(total.up_seconds / seconds for total in totals),
        link_down=tuple(total.down_seconds / seconds for total in totals),
        refill_bytes=sum(total.refill_bytes for total in totals),
        num_left=scheduler.memory.num_left,
        num_restarted=scheduler.memory.num_restarted,
        phase_steps={phase: log.num_steps_of(phase) for phase in Phase},
        phase_seconds={phase: log.compute_seconds(phase, stage=busiest) for phase in Phase},
        mean_decode_rows=log.mean_rows((Phase.DECODE, Phase.MIXED)),
        max_home_blocks=log.max_home_blocks,
        max_home_bytes=log.max_home_blocks * plan.capacity.block_bytes * total_layers // largest,
        steady=log.steady_decode(),
    )


def check_lengths(workload: Sequence[RequestLengths], *, capacity: Capacity) -> int:
    """Tokens that one request may have, so that it fits both pools alone. Raises ConfigError when one has more."""
    most_tokens = min(capacity.num_device_blocks, capacity.num_host_blocks) * capacity.block_size
    longest = max(request.prompt_tokens + request.output_tokens for request in workload)
    if longest > most_tokens:
        raise ConfigError(
            f"a request of {longest} tokens does not fit the KV of {most_tokens} tokens that a pipeline has for it; "
            "use more or larger GPUs, more host memory, or leave such requests out"
        )
    return most_tokens


def request_states(workload: Sequence[RequestLengths], *, capacity: Capacity) -> list[RequestState]:
    """Requests as the scheduler sees them: prompts, and the workload's longest output as everyone's limit, cut to what
    the pools hold. Raises ConfigError when a request does not fit them."""
    most_tokens = check_lengths(workload, capacity=capacity)
    limit = max(request.output_tokens for request in workload)
    sampling = SamplingParams(max_tokens=limit)
    return [
        RequestState(
            request_id=index,
            # Token ids do not matter: a view of one zero, however long.
            prompt_token_ids=np.broadcast_to(np.int32(0), (request.prompt_tokens,)),
            sampling=sampling,
            seed=0,
            stop_token_ids=frozenset({_END_TOKEN}),
            max_outputs=min(limit, most_tokens - request.prompt_tokens),
        )
        for index, request in enumerate(workload)
    ]


def _true_cost(cost: CostModel, misestimate: Misestimate | None) -> CostModel:
    if misestimate is None:
        return cost
    return PerturbedCostModel(
        model=cost,
        decode_factor=misestimate.decode_factor,
        prefill_factor=misestimate.prefill_factor,
        noise=misestimate.noise,
        seed=misestimate.seed,
    )


def _true_server(server: ServerProfile, misestimate: Misestimate | None) -> ServerProfile:
    if misestimate is None or misestimate.link_factor == 1.0:
        return server
    link, factor = server.host_link, misestimate.link_factor
    true_link = dataclasses.replace(
        link,
        up_bytes_per_second=link.up_bytes_per_second * factor,
        down_bytes_per_second=link.down_bytes_per_second * factor,
        duplex_bytes_per_second=link.duplex_bytes_per_second * factor,
    )
    return dataclasses.replace(server, host_link=true_link)
