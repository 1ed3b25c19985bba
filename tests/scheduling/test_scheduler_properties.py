"""The invariants of the design, on the control plane alone: random request mixes at every legal memory size.

`CheckingExecutor` checks contents (invariants 1 to 3 and 5); here: nobody lost, duplicated or starved (6), pools
conserved (4), and no deadlock. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from functools import partial
from unittest.mock import patch

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.load import StepLoad
from pipemax.plan import Capacity, StepPlan, StepResult
from pipemax.request import FinishReason, SamplingParams
from pipemax.scheduling.memory_pressure import MemoryPressure
from pipemax.scheduling.output_length import OutputLengthEstimate
from pipemax.scheduling.request_state import RequestState, Status
from pipemax.scheduling.scheduler import Scheduler
from pipemax.scheduling.turns import Turns
from tests.scheduling.checking_executor import CheckingExecutor, expected_token

BLOCK = 4


@st.composite
def jobs(draw):
    requests = draw(
        st.lists(
            st.tuples(st.integers(1, 30), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 20))),
            min_size=1,
            max_size=14,
        )
    )
    longest = max(-(-(prompt + outputs) // BLOCK) for prompt, outputs, _ in requests)
    offload = draw(st.sampled_from([KVOffload.ON, KVOffload.ON, KVOffload.OFF]))
    window = draw(st.integers(0, 8)) if offload is KVOffload.ON else 0
    device = max(longest, window + 1) + draw(st.integers(0, 12))
    host = longest + draw(st.integers(0, 30))
    return {
        "requests": requests,
        "device": device,
        "window": window,
        "host": host,
        "num_stages": draw(st.integers(1, 4)),
        "num_batches": draw(st.integers(1, 5)),
        "max_num_seqs": draw(st.integers(1, 8)),
        "max_tokens_a_step": draw(st.integers(1, 40)),
        "max_plans": draw(st.integers(1, 2)),
        "budgets": draw(st.lists(st.integers(1, 14), min_size=1, max_size=5)),
        "free_tokens": draw(st.integers(1, 30)),
        "offload": offload,
        "phase": draw(st.sampled_from(PhasePolicyName)),
        "arrivals": draw(st.integers(1, 14)),
        "quantum": draw(st.integers(1, 8)),
        "expected_tokens": draw(st.integers(1, 20)),
        "aborts": draw(st.lists(st.integers(0, 13), max_size=2)),
    }


class ErraticForecast(Forecast):
    """Nothing is predictable: the link's budget changes from step to step, all steps take a second."""

    def __init__(self, budgets: list[int], free_tokens: int) -> None:
        self._budgets = itertools.cycle(budgets)
        self._copy_seconds = itertools.cycle([0.0] * 40 + [1.0] * 40)
        self.free_tokens = free_tokens
        self.budget_blocks = 0

    def step_seconds(self, load: StepLoad) -> float:
        return 1.0 if load.num_tokens else 0.0

    def refill_blocks(self, step_seconds: float) -> int:
        self.budget_blocks = next(self._budgets)
        return self.budget_blocks

    def copy_seconds(self, num_blocks: int) -> float:
        """Nothing at one time, and at another more than any window gives."""
        return num_blocks * next(self._copy_seconds)

    def submitted(self, plan: StepPlan) -> None:
        pass

    def finished(self, result: StepResult) -> None:
        pass


class CheckedTurns(Turns):
    """Counts whose turns end, and checks that none is shorter than promised."""

    def __init__(self, *, quantum_tokens: int) -> None:
        super().__init__(quantum_tokens=quantum_tokens)
        self.quantum_tokens = quantum_tokens
        self.num_over: Counter[int] = Counter()

    def over(self, members, following):
        following = list(following)
        leaving = super().over(members, following)
        assert len(leaving) <= len(following)
        for member, request in zip(leaving, following, strict=False):
            assert member.status is Status.RUNNING and request.status is Status.READY
            assert member.num_outputs > request.num_outputs + self.quantum_tokens
            assert member.num_outputs >= member.outputs_at_join + self.quantum_tokens
            self.num_over[member.request_id] += 1
        return leaving


def run(job) -> tuple[Scheduler, CheckingExecutor, dict[int, list[int]]]:
    capacity = Capacity(
        num_stages=job["num_stages"],
        block_size=BLOCK,
        num_device_blocks=job["device"],
        num_window_blocks=job["window"],
        num_host_blocks=job["host"],
        block_bytes=1,
    )
    endings = {i: end for i, (_, _, end) in enumerate(job["requests"]) if end is not None}
    executor = CheckingExecutor(capacity, max_plans_per_batch=job["max_plans"], endings=endings)
    # Requests here are shorter than what is right for real ones.
    checked_turns = CheckedTurns(quantum_tokens=job["quantum"])
    output_length = partial(OutputLengthEstimate, prior_tokens=job["expected_tokens"])
    with (
        patch("pipemax.control_plane.Turns", lambda: checked_turns),
        patch("pipemax.control_plane.OutputLengthEstimate", output_length),
    ):
        scheduler = build_scheduler(
            capacity=capacity,
            num_batches=job["num_batches"],
            max_num_seqs=job["max_num_seqs"],
            max_num_batched_tokens=job["max_tokens_a_step"],
            async_scheduling=job["max_plans"] == 2,
            phase_policy=job["phase"],
            kv_offload=job["offload"],
            forecast=ErraticForecast(job["budgets"], job["free_tokens"]),
        )
    if job["offload"] is KVOffload.OFF:
        executor.refuse_copies()
    outputs: dict[int, list[int]] = {}
    finished: dict[int, FinishReason] = {}
    coming = list(enumerate(job["requests"]))
    aborted: set[int] = set()
    turns = 0
    while coming or scheduler.population.requests:
        turns += 1
        assert turns < 20_000, "starved"
        for request_id, (prompt, max_outputs, _) in coming[: job["arrivals"]]:
            scheduler.add_request(
                RequestState(
                    request_id=request_id,
                    prompt_token_ids=np.zeros(prompt, dtype=np.int32),
                    sampling=SamplingParams(max_tokens=max_outputs),
                    seed=0,
                    stop_token_ids=frozenset({CheckingExecutor.STOP_TOKEN}),
                    max_outputs=max_outputs,
                )
            )
            outputs[request_id] = []
        del coming[: job["arrivals"]]
        while (plan := scheduler.schedule()) is not None:
            executor.submit(plan)
            check_pools(scheduler)
        if not scheduler.population.requests and not scheduler.num_plans_in_flight:
            continue
        assert scheduler.num_plans_in_flight, "deadlock: requests are left, and nothing is planned"
        for result in executor.wait():
            for update in scheduler.update(result):
                assert update.request_id not in finished
                if update.token_id is not None:
                    outputs[update.request_id].append(update.token_id)
                if update.finish_reason is not None:
                    finished[update.request_id] = update.finish_reason
        for request_id in job["aborts"]:
            if turns == 7 and request_id in outputs and request_id not in finished:
                scheduler.finish_request(request_id, is_complete=False)
                finished[request_id] = FinishReason.ABORT
                aborted.add(request_id)
        check_pools(scheduler)
    while scheduler.num_plans_in_flight:
        for result in executor.wait():
            assert scheduler.update(result) == []
    assert set(finished) == set(range(len(job["requests"])))
    for request_id, (_, max_outputs, ending) in enumerate(job["requests"]):
        if request_id in aborted:
            continue
        count = max_outputs if ending is None else min(max_outputs, ending)
        tokens = [expected_token(request_id, i) for i in range(count)]
        if ending is not None and ending <= max_outputs:
            tokens[-1] = CheckingExecutor.STOP_TOKEN
        assert outputs[request_id] == tokens
    assert checked_turns.num_over.total() == scheduler.stats.num_turns
    assert job["offload"] is KVOffload.ON or not scheduler.stats.num_turns
    for request_id, num_over in checked_turns.num_over.items():
        assert num_over <= job["requests"][request_id][1] // job["quantum"]
    return scheduler, executor, outputs


def check_pools(scheduler: Scheduler) -> None:
    kv = scheduler.kv
    for pool in (kv.device, kv.host):
        assert pool.num_free + pool.num_held == pool.num_blocks
        assert sum(pool._held) == pool.num_held
    tables = list(kv._tables.values())
    resident = [slot for table in tables for slot in table.slots.tolist() if slot >= 0]
    homes = [home for table in tables for home in table.homes.tolist()]
    assert len(set(resident)) == len(resident) and len(set(homes)) == len(homes)
    assert len(resident) + kv.window.num_blocks + len(kv._deferred_slots) == kv.device.num_held
    assert len(homes) == kv.host.num_held
    assert all(table.num_absent == len(table.absent_blocks()) for table in tables)
    population = scheduler.population
    assert population.ready == sorted(population.ready_by_outputs, key=lambda r: r.request_id)
    assert population.ready_by_outputs == sorted(population.ready, key=lambda r: (r.num_outputs, r.request_id))


def tight(requests, **values):
    """A job of one stage and three batches whose answers get longer than expected, so that homes run out."""
    rest = {"num_stages": 1, "num_batches": 3, "max_plans": 1, "offload": KVOffload.ON, "aborts": []}
    return {"requests": requests, **rest, **values}


# A request starts anew in the very plan that was to bring blocks of its own back.
BOARDS_AND_STARTS_ANEW = tight(
    [(4, 8, None), (5, 19, None), (12, 8, 6), (2, 19, None)],
    device=9,
    window=1,
    host=7,
    max_num_seqs=1,
    max_tokens_a_step=2,
    budgets=[1, 8, 3, 3, 1],
    free_tokens=8,
    phase=PhasePolicyName.MIXED,
    arrivals=3,
    quantum=3,
    expected_tokens=4,
)
# All have left their batches, their blocks are full, and so is host memory.
NOBODY_RUNS_AND_HOMES_ARE_FULL = tight(
    [(5, 10, None), (12, 17, None), (3, 10, 4), (12, 18, None), (7, 20, 2), (5, 4, None)],
    device=10,
    window=1,
    host=11,
    max_num_seqs=2,
    max_tokens_a_step=20,
    budgets=[1, 3, 3, 3, 8],
    free_tokens=4,
    phase=PhasePolicyName.AUTO,
    arrivals=4,
    quantum=4,
    expected_tokens=1,
)


@settings(max_examples=6000, deadline=None)
@given(jobs())
@example(BOARDS_AND_STARTS_ANEW)
@example(NOBODY_RUNS_AND_HOMES_ARE_FULL)
def test_every_request_comes_through_whatever_memory_it_has(job):
    scheduler, _, _ = run(job)
    assert scheduler.kv.device.num_held == scheduler.kv.window.num_blocks + len(scheduler.kv._deferred_slots)
    assert scheduler.kv.host.num_held == 0


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_batch_as_a_whole_or_member_by_member_gives_the_same_plans(job):
    _, as_a_whole, _ = run(job)
    with patch.object(MemoryPressure, "_all_fit", lambda *_, **__: False):
        _, one_by_one, _ = run(job)
    for plan, other in zip(as_a_whole.plans, one_by_one.plans, strict=True):
        np.testing.assert_equal(dataclasses.asdict(plan), dataclasses.asdict(other))


def test_nothing_travels_where_all_fits_though_steps_had_time_for_more_prompts():
    """What prompts may want is no more than they have: nobody who waits for its batch makes room for it."""
    job = {
        "requests": [(prompt, 14, None) for prompt in (3, 17, 9, 40, 26, 33, 5)],
        "device": 256,
        "window": 0,
        "host": 1000,
        "num_stages": 1,
        "num_batches": 2,
        "max_num_seqs": 16,
        "max_tokens_a_step": 24,
        "max_plans": 2,
        "budgets": [100],
        "free_tokens": 1000,
        "offload": KVOffload.ON,
        "phase": PhasePolicyName.MIXED,
        "arrivals": 7,
        "quantum": 8,
        "expected_tokens": 20,
        "aborts": [],
    }
    _, executor, _ = run(job)
    assert sum(len(plan.write_home) for plan in executor.plans) > 30
    assert not any(len(plan.refill) for plan in executor.plans)


def test_control_plane_needs_no_torch():
    import subprocess

    code = "import sys, pipemax.scheduling.scheduler, pipemax.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
