"""A run on the simulator, recorded: two stages, a window that works, all phases, some requests that end early."""

from __future__ import annotations

import functools

import numpy as np

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.hardware import HostLink, StageLink
from pipemax.cost.load import StageShape, StepLoad, even_stages
from pipemax.engine import Engine
from pipemax.executor.simulator import SimExecutor
from pipemax.plan import Capacity, StepPlan, StepResult
from pipemax.report.recorder import RunSnapshot, StepRecorder
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState
from pipemax.scheduling.scheduler import Scheduler

CAPACITY = Capacity(
    num_stages=2, block_size=4, num_device_blocks=48, num_window_blocks=24, num_host_blocks=400, block_bytes=4000
)
STAGES = even_stages(4, 2)
END, TOKEN = 2, 7
OUTPUT_LENGTHS = {request_id: 5 + (request_id * 7) % 30 for request_id in range(40)}


class StepSeconds:
    """10 ms and 1 ms a token, on every stage; `factor` times that."""

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        return self._factor * (0.010 + 0.001 * load.num_tokens) if load.num_tokens else 0.0


def executor() -> SimExecutor:
    return SimExecutor(
        capacity=CAPACITY,
        stages=STAGES,
        layer_block_bytes=2000,
        cost=StepSeconds(),
        host_link=HostLink(3e6, 3e6, 2e6),
        stage_link=StageLink(0.0005, 1e9),
        token_bytes=100,
        token_seconds=0.0005,
        output_lengths=OUTPUT_LENGTHS,
        end_token_id=END,
        token_id=TOKEN,
    )


class ExpectsLess(Forecast):
    """Expects 90 % of what steps take and a link that brings up a window's worth; learns nothing."""

    def __init__(self) -> None:
        self.free_tokens = 0

    def step_seconds(self, load: StepLoad) -> float:
        return StepSeconds(0.9).step_seconds(load, STAGES[0])

    def refill_blocks(self, step_seconds: float) -> int:
        return CAPACITY.num_window_blocks

    def copy_seconds(self, num_blocks: int) -> float:
        return 0.0

    def submitted(self, plan: StepPlan) -> None:
        pass

    def finished(self, result: StepResult) -> None:
        pass


def scheduler() -> Scheduler:
    return build_scheduler(
        capacity=CAPACITY,
        num_batches=2,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        async_scheduling=True,
        phase_policy=PhasePolicyName.DISAGGREGATED,
        kv_offload=KVOffload.ON,
        forecast=ExpectsLess(),
    )


def request(request_id: int) -> RequestState:
    return RequestState(
        request_id=request_id,
        prompt_token_ids=np.arange(3, 3 + 6 + request_id % 9, dtype=np.int32),
        sampling=SamplingParams(max_tokens=60),
        seed=0,
        stop_token_ids=frozenset({END}),
        max_outputs=60,
    )


def record(recorder: StepRecorder, *, num_requests: int = 40) -> SimExecutor:
    """Runs all requests to their end; gives the executor, which has sums of its own."""
    sim = executor()
    engine = Engine(scheduler=scheduler(), executor=sim)
    engine.observe(recorder)
    for request_id in range(num_requests):
        engine.add_request(request(request_id))
    while engine.scheduler.population.requests or engine.scheduler.num_plans_in_flight:
        engine.step()
    return sim


@functools.cache
def recorded_run() -> RunSnapshot:
    """The run of all requests."""
    recorder = StepRecorder(capacity=CAPACITY)
    record(recorder)
    return recorder.snapshot()
