"""`Turns`: who leaves for whom, and what comes of it: requests that advance together."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.plan import Capacity
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState
from pipemax.scheduling.turns import Turns
from tests.scheduling.checking_executor import CheckingExecutor
from tests.scheduling.test_scheduler_properties import ErraticForecast

QUANTUM = 8


def request(request_id: int, num_outputs: int = 0, *, outputs_at_join: int = 0, prompt: int = 4, most: int = 1000):
    return RequestState(
        request_id=request_id,
        prompt_token_ids=np.zeros(prompt, dtype=np.int32),
        sampling=SamplingParams(max_tokens=most),
        seed=0,
        stop_token_ids=frozenset(),
        max_outputs=most,
        num_outputs=num_outputs,
        outputs_at_join=outputs_at_join,
    )


def over(members, following):
    return [r.request_id for r in Turns(quantum_tokens=QUANTUM).over(members, following)]


def test_who_is_ahead_of_one_that_waits_by_more_than_a_quantum_yields():
    members = [request(0, 50), request(1, 20), request(2, 80)]
    assert over(members, [request(9, 12)]) == [2]
    assert over(members, [request(9, 12), request(8, 12)]) == [2, 0]
    assert over(members, [request(9, 12), request(8, 12), request(7, 12)]) == [2, 0]  # 20 is not more than 12 + 8
    assert over(members, [request(9, 11), request(8, 11), request(7, 11)]) == [2, 0, 1]
    assert over(members, []) == []


def test_a_turn_lasts_a_quantum_at_least():
    assert over([request(0, 57, outputs_at_join=50)], [request(1, 0)]) == []
    assert over([request(0, 58, outputs_at_join=50)], [request(1, 0)]) == [0]


@given(st.lists(st.integers(0, 60), max_size=8), st.lists(st.integers(0, 60), max_size=8))
def test_after_a_change_of_turns_nobody_is_ahead_of_whom_it_made_wait(running, ready):
    members = [request(i, n) for i, n in enumerate(running)]
    following = [request(100 + i, n) for i, n in enumerate(sorted(ready))]
    leaving = Turns(quantum_tokens=QUANTUM).over(members, following)
    stay = [r for r in members if r not in leaving]
    if len(leaving) < len(following):
        left_waiting = following[len(leaving)].num_outputs
        assert all(r.num_outputs <= left_waiting + QUANTUM for r in stay)
    assert all(a.num_outputs > b.num_outputs + QUANTUM for a, b in zip(leaving, following, strict=False))
    if leaving and stay:
        assert max(r.num_outputs for r in stay) <= min(r.num_outputs for r in leaving)


def spreads(*, host: int, offload: KVOffload = KVOffload.ON) -> tuple[list[int], int]:
    """Most outputs less fewest of the live requests after every plan once all are prefilled, and turns taken.

    Twelve requests of 100 tokens, four of them in batches, and memory for six.
    """
    capacity = Capacity(
        num_stages=2,
        block_size=4,
        num_device_blocks=160,
        num_window_blocks=10 if offload is KVOffload.ON else 0,
        num_host_blocks=host,
        block_bytes=1,
    )
    executor = CheckingExecutor(capacity, max_plans_per_batch=2, endings={})
    with patch("pipemax.control_plane.Turns", partial(Turns, quantum_tokens=QUANTUM)):
        scheduler = build_scheduler(
            capacity=capacity,
            num_batches=2,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            async_scheduling=True,
            phase_policy=PhasePolicyName.DISAGGREGATED,
            kv_offload=offload,
            forecast=ErraticForecast([40], free_tokens=8),
        )
    for i in range(12):
        scheduler.add_request(request(i, most=96))
    found = []
    while scheduler.population.requests:
        while (plan := scheduler.schedule()) is not None:
            executor.submit(plan)
            if not scheduler.population.waiting:
                live = [r.num_outputs for r in scheduler.population.requests.values()]
                found.append(max(live) - min(live))
        for result in executor.wait():
            scheduler.update(result)
    return found, scheduler.stats.num_turns


def test_at_the_end_of_a_job_all_that_are_left_advance_together():
    found, num_turns = spreads(host=2000)
    # A quantum, and what runs on while the plan in flight and the copy that goes home are under way.
    assert max(found) <= 2 * QUANTUM
    assert 12 <= num_turns <= 12 * 96 // QUANTUM


def test_with_little_room_at_home_requests_run_to_their_end_until_few_are_left():
    # 12 x 25 blocks fit, but not what four that run and one more would want: 256 tokens each, as is expected.
    found, num_turns = spreads(host=312)
    assert max(found) > 80
    assert num_turns < 12


def test_without_offloading_there_are_no_turns():
    found, num_turns = spreads(host=2000, offload=KVOffload.OFF)
    assert max(found) > 80
    assert num_turns == 0
