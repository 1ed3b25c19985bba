"""The invariants of the design on random workloads, models, servers and estimates that are up to half wrong.

The scheduler plans for real roofline times; the simulator answers in times that differ from them by up to 50 %, and
symbolic memory checks what every plan reads and writes (`checked_simulation.py`):

    1, 2   a slot is not reused before its home is valid, nor a window slot before its last reader has left:
           attention would read a wrong block                                         CheckingExecutor
    3      a refill is within the budget of the step beside which it travels          BudgetedForecast
    4      free + held = total                                                        each turn
    5      plans in flight for a batch                                                CheckingExecutor
    6      nobody lost, duplicated, starved                                           outputs, and virtual time
"""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.hardware import HostLink
from pipemax.cost.load import StageShape, StepLoad, even_stages
from pipemax.cost.perturbed import PerturbedCostModel
from pipemax.cost.profiles import gpu_names, server_profile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.engine import Engine
from pipemax.executor.simulator import SimExecutor
from pipemax.model_spec import ModelSpec
from pipemax.observer import EngineGauges
from pipemax.plan import Capacity, StepPlan, StepResult
from pipemax.request import FinishReason, SamplingParams
from pipemax.scheduling.request_state import RequestState, RequestUpdate
from pipemax.scheduling.scheduler import Scheduler
from tests.cost.models import LLAMA_1B, LLAMA_70B, MIXTRAL
from tests.executor.checked_simulation import CheckedSimulation
from tests.scheduling.checking_executor import CheckingExecutor, expected_token

BLOCK = 4
FACTORS = st.floats(0.5, 1.5)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`requests` are (prompt, limit, true output)."""

    requests: tuple[tuple[int, int, int], ...]
    model: ModelSpec
    gpu_name: str
    num_stages: int
    num_batches: int
    device_blocks: int
    window_blocks: int
    host_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool
    phase_policy: PhasePolicyName
    kv_offload: KVOffload
    learn: bool
    decode_factor: float
    prefill_factor: float
    link_factor: float
    noise: float


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    requests = []
    for _ in range(draw(st.integers(1, 24))):
        prompt, limit = draw(st.integers(1, 60)), draw(st.integers(1, 40))
        requests.append((prompt, limit, draw(st.integers(1, limit))))
    longest = max(-(-(prompt + limit) // BLOCK) for prompt, limit, _ in requests)
    kv_offload = draw(st.sampled_from([KVOffload.ON, KVOffload.ON, KVOffload.OFF]))
    window = draw(st.integers(1, 16)) if kv_offload is KVOffload.ON else 0
    return Scenario(
        requests=tuple(requests),
        model=draw(st.sampled_from([LLAMA_1B, LLAMA_70B, MIXTRAL])),
        gpu_name=draw(st.sampled_from(gpu_names())),
        num_stages=draw(st.sampled_from([1, 2, 3, 8])),
        num_batches=draw(st.integers(1, 9)),
        device_blocks=max(longest, window + 1) + draw(st.integers(0, 40)),
        window_blocks=window,
        host_blocks=longest + draw(st.integers(0, 120)),
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.integers(1, 100)),
        async_scheduling=draw(st.booleans()),
        phase_policy=draw(st.sampled_from(PhasePolicyName)),
        kv_offload=kv_offload,
        learn=draw(st.booleans()),
        decode_factor=draw(FACTORS),
        prefill_factor=draw(FACTORS),
        link_factor=draw(FACTORS),
        noise=draw(st.sampled_from([0.0, 0.1, 0.3])),
    )


class BudgetedForecast(Forecast):
    """Remembers the budget that the scheduler was given last."""

    budget_blocks = 0

    def refill_blocks(self, step_seconds: float) -> int:
        blocks = super().refill_blocks(step_seconds)
        self.budget_blocks = max(self.budget_blocks, blocks)
        return blocks


class Watcher:
    """Checks budget and books as plans go out; an `EngineObserver`."""

    def __init__(self, *, scheduler: Scheduler, forecast: BudgetedForecast) -> None:
        self._scheduler = scheduler
        self._forecast = forecast

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        # A plan's refill is for the rows staged meanwhile. One row alone may pass the budget: it must be able to run.
        staged = self._scheduler._staged
        is_lone = staged is not None and len(staged.requests) == 1
        assert len(plan.refill) <= self._forecast.budget_blocks or is_lone, "the prefetch budget is passed"
        self._forecast.budget_blocks = 0
        check_books(self._scheduler)

    def on_result(self, result: StepResult, updates: list[RequestUpdate]) -> None:
        check_books(self._scheduler)


def check_books(scheduler: Scheduler) -> None:
    for pool in (scheduler.kv.device, scheduler.kv.host):
        assert pool.num_free >= 0 and pool.num_free + pool.num_held == pool.num_blocks


def run(scenario: Scenario) -> None:
    model = dataclasses.replace(scenario.model, num_layers=8, sliding_windows=(None,) * 8)
    server = server_profile(scenario.gpu_name, scenario.num_stages)
    stages = even_stages(model.num_layers, scenario.num_stages)
    layer_bytes = model.kv_geometry(block_size=BLOCK, dtype_bytes=2).layer_block_bytes(0)
    capacity = Capacity(
        num_stages=scenario.num_stages,
        block_size=BLOCK,
        num_device_blocks=scenario.device_blocks,
        num_window_blocks=scenario.window_blocks,
        num_host_blocks=scenario.host_blocks,
        block_bytes=layer_bytes * max(stage.num_layers for stage in stages),
    )
    # So small a KV cache fits any link: slow it down to a few blocks a step, so that the budget binds.
    estimated_cost = RooflineCostModel(model=model, gpu=server.gpu)
    link = _slow(server.host_link, capacity, estimated_cost, stages)
    true_link = _scaled(link, scenario.link_factor)
    true_cost = PerturbedCostModel(
        model=estimated_cost,
        decode_factor=scenario.decode_factor,
        prefill_factor=scenario.prefill_factor,
        noise=scenario.noise,
        seed=0,
    )
    lengths = {index: output for index, (_, _, output) in enumerate(scenario.requests)}
    simulator = SimExecutor.of_server(
        model=model,
        server=dataclasses.replace(server, host_link=true_link),
        capacity=capacity,
        stages=stages,
        cost=true_cost,
        output_lengths=lengths,
        end_token_id=CheckingExecutor.STOP_TOKEN,
        token_id=CheckingExecutor.STOP_TOKEN + 1,
    )
    checker = CheckingExecutor(capacity, max_plans_per_batch=2 if scenario.async_scheduling else 1, endings=lengths)
    if scenario.kv_offload is KVOffload.OFF:
        checker.refuse_copies()
    executor = CheckedSimulation(simulator=simulator, checker=checker)
    forecast = BudgetedForecast(
        cost=estimated_cost, stages=stages, link=link, block_bytes=capacity.block_bytes, learn=scenario.learn
    )
    scheduler = build_scheduler(
        capacity=capacity,
        num_batches=scenario.num_batches,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        async_scheduling=scenario.async_scheduling,
        phase_policy=scenario.phase_policy,
        kv_offload=scenario.kv_offload,
        forecast=forecast,
    )
    engine = Engine(scheduler=scheduler, executor=executor)
    engine.observe(Watcher(scheduler=scheduler, forecast=forecast))
    for index, (prompt, limit, _) in enumerate(scenario.requests):
        engine.add_request(
            RequestState(
                request_id=index,
                prompt_token_ids=np.zeros(prompt, dtype=np.int32),
                sampling=SamplingParams(max_tokens=limit),
                seed=0,
                stop_token_ids=frozenset({CheckingExecutor.STOP_TOKEN}),
                max_outputs=limit,
            )
        )
    outputs: dict[int, list[int]] = {index: [] for index in lengths}
    ends: dict[int, FinishReason] = {}
    turns = 0
    while scheduler.population.requests or scheduler.num_plans_in_flight:
        turns += 1
        assert turns < 50_000, "starved"
        for news in engine.step():
            update = news.update
            assert update.request_id not in ends and update.token_id is not None
            outputs[update.request_id].append(update.token_id)
            if update.finish_reason is not None:
                ends[update.request_id] = update.finish_reason
    for index, length in lengths.items():
        tokens = [expected_token(index, i) for i in range(length - 1)]
        assert outputs[index] == [*tokens, CheckingExecutor.STOP_TOKEN]
    assert set(ends.values()) == {FinishReason.STOP}
    assert scheduler.kv.host.num_held == 0


def _slow(link: HostLink, capacity: Capacity, cost: RooflineCostModel, stages: tuple[StageShape, ...]) -> HostLink:
    """A link that brings about eight blocks during a decode step."""
    step = cost.step_seconds(StepLoad.of_decode(num_rows=4, kv_tokens=160), stages[0])
    return _scaled(link, 8 * capacity.block_bytes / step / link.up_bytes_per_second)


def _scaled(link: HostLink, factor: float) -> HostLink:
    return HostLink(
        link.up_bytes_per_second * factor, link.down_bytes_per_second * factor, link.duplex_bytes_per_second * factor
    )


# Without shrinking, which takes minutes here; the checks that plans are right say enough about what went wrong.
@settings(max_examples=200, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(scenarios())
def test_invariants_hold_however_wrong_the_estimates(scenario: Scenario) -> None:
    run(scenario)
