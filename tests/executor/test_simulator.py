"""The simulator on timelines worked out by hand, and against a simulation of every layer's events.

Speed: `python -m tests.executor.test_simulator` runs 20,000 decode steps of 76 rows on 8 stages of an 80-layer model
with refills and homes, and prints steps a second of the simulator alone. Seen on a core of a shared machine: 7,000 a
second, 142 us a step (with a cost model that takes no time; the roofline's takes 1 us a stage).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.cost.hardware import HostLink, StageLink
from pipemax.cost.load import StageShape, StepLoad, even_stages
from pipemax.cost.perturbed import PerturbedCostModel
from pipemax.executor.simulator import SimExecutor
from pipemax.plan import NO_BATCH, BlockCopies, Capacity, NewRequest, Phase, StepPlan, StepResult
from pipemax.request import SamplingParams

BLOCK = 4
END, TOKEN = 2, 7
NO_LINK_TIME = StageLink(0.0, 1e30)


class SecondsPerToken:
    """A step of n tokens takes n seconds on every stage."""

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        return float(load.num_tokens)


def executor(
    *,
    num_stages: int = 2,
    num_layers: int = 4,
    up: float = 1.0,
    down: float = 1.0,
    duplex: float | None = None,
    stage_link: StageLink = NO_LINK_TIME,
    token_seconds: float = 0.0,
    output_lengths: dict[int, int] | None = None,
    cost=None,
) -> SimExecutor:
    """Stages of `num_layers` layers in all. A block has one byte a layer: 1 s at 1 byte a second."""
    stages = even_stages(num_layers, num_stages)
    block_bytes = max(stage.num_layers for stage in stages)
    return SimExecutor(
        capacity=Capacity(num_stages, BLOCK, 1000, 100, 1000, block_bytes),
        stages=stages,
        layer_block_bytes=1,
        cost=cost or SecondsPerToken(),
        host_link=HostLink(up, down, duplex or min(up, down)),
        stage_link=stage_link,
        token_bytes=1,
        token_seconds=token_seconds,
        output_lengths=output_lengths or {},
        end_token_id=END,
        token_id=TOKEN,
    )


def copies(num: int, first: int = 0) -> BlockCopies:
    blocks = np.arange(first, first + num, dtype=np.int32)
    return BlockCopies(blocks, blocks)


def plan(
    step_id: int,
    *,
    tokens: int = 1,
    request_id: int | None = None,
    computed: int = 0,
    samples: bool = False,
    refill: int = 0,
    home: int = 0,
    after: int = -1,
    new: Sequence[NewRequest] = (),
) -> StepPlan:
    """One row of `tokens` tokens; none and no batch when `tokens` is 0."""
    rows = 1 if tokens else 0
    num_blocks = -(-(computed + tokens) // BLOCK) if rows else 0
    return StepPlan(
        step_id=step_id,
        batch_id=0 if rows else NO_BATCH,
        phase=Phase.DECODE if rows else Phase.COPY,
        request_ids=np.full(rows, step_id if request_id is None else request_id, dtype=np.int64),
        num_computed_tokens=np.full(rows, computed, dtype=np.int32),
        num_new_tokens=np.full(rows, tokens, dtype=np.int32),
        samples=np.full(rows, samples, dtype=np.bool_),
        block_table_indptr=np.array([0, num_blocks][: rows + 1], dtype=np.int32),
        block_table_indices=np.arange(num_blocks, dtype=np.int32),
        write_home=copies(home, 500),
        refill=copies(refill),
        new_requests=tuple(new),
        finished_request_ids=(),
        sampled_through_step=after,
    )


def run(sim: SimExecutor, plans: Sequence[StepPlan]) -> list[StepResult]:
    for one in plans:
        sim.submit(one)
    results = []
    while len(results) < len(plans):
        results += sim.wait()
    return results


def starts(results: Sequence[StepResult]) -> list[list[float]]:
    return [[timing.start_seconds for timing in result.timings] for result in results]


def test_two_stages_three_steps():
    # stage 0  |0    2|2      5|5 6|
    # stage 1         |2.5  4.5|    |5.5     8.5|8.5 9.5|      a message takes 0.5 s
    results = run(executor(stage_link=StageLink(0.5, 1e30)), [plan(0, tokens=2), plan(1, tokens=3), plan(2, tokens=1)])

    assert starts(results) == [[0.0, 2.5], [2.0, 5.5], [5.0, 8.5]]
    assert [result.finished_seconds for result in results] == [4.5, 8.5, 9.5]
    # The second stage waits for its first input, and from 4.5 to 5.5 for the second one's.
    assert [result.timings[1].activation_wait_seconds for result in results] == [2.5, 1.0, 0.0]


def test_messages_queue_on_a_slow_link():
    # 4 tokens at 2 bytes a second: each message holds the link for 2 s and takes 1 s more to arrive.
    sim = executor(stage_link=StageLink(1.0, 2.0), cost=PerturbedCostModel(**_halved()))
    results = run(sim, [plan(0, tokens=4), plan(1, tokens=4), plan(2, tokens=4)])

    # Compute takes 1 s: sent at 1, 2, 3; on the link until 3, 5, 7; there at 4, 6, 8.
    assert starts(results) == [[0.0, 4.0], [1.0, 6.0], [2.0, 8.0]]


def _halved() -> dict:
    return {"model": SecondsPerToken(), "decode_factor": 0.25, "prefill_factor": 0.25, "noise": 0, "seed": 0}


def test_a_plan_waits_for_the_tokens_that_it_needs():
    sim = executor(token_seconds=0.25)
    results = run(sim, [plan(0, tokens=2), plan(1, tokens=2), plan(2, tokens=1, after=0)])

    # Stage 0 is free at 4; step 0 ends at 4 on stage 1 and its tokens are known at 4.25.
    assert starts(results)[2][0] == 4.25
    assert results[2].timings[0].activation_wait_seconds == 0.25
    assert results[0].finished_seconds == 4.25


def test_wait_moves_the_clock_to_the_next_finished_step_only():
    sim = executor()
    for one in (plan(0, tokens=2), plan(1, tokens=1), plan(2, tokens=1)):
        sim.submit(one)

    assert sim.now() == 0.0
    assert [result.step_id for result in sim.wait()] == [0]
    assert sim.now() == 4.0
    sim.submit(plan(3, tokens=1))
    # It comes at 4, when stage 0 has just left step 2.
    assert [result.step_id for result in sim.wait()] == [1]
    assert sim.now() == 5.0
    assert [[result.step_id for result in sim.wait()], [result.step_id for result in sim.wait()]] == [[2], [3]]


def test_a_stage_without_a_plan_neither_computes_nor_waits():
    sim = executor(num_stages=1)
    run(sim, [plan(0, tokens=2)])
    sim.submit(plan(1, tokens=3))
    (result,) = sim.wait()

    assert result.timings[0].start_seconds == 2.0
    assert result.timings[0].activation_wait_seconds == 0.0


def test_a_refill_that_fits_costs_nothing():
    # 1 stage of 4 layers, 1 s each. 4 blocks of 4 bytes at 4 bytes/s: 4 s in all, 1 s a layer, from 1 s on.
    results = run(executor(num_stages=1, up=4.0), [plan(0, tokens=4, refill=4), plan(1, tokens=4, refill=4)])

    assert [result.finished_seconds for result in results] == [4.0, 8.0]
    assert [result.timings[0].window_wait_seconds for result in results] == [0.0, 0.0]
    assert [result.timings[0].refill_bytes for result in results] == [16, 16]


def test_a_refill_larger_than_the_budget_waits_exactly_for_the_excess():
    # Layer l of step 0 is done at l + 1. 1.5 s a layer: refilled at 2.5, 4, 5.5, 7. Step 1 starts at 4: layers 0 to 2
    # end at 5, 6, 7, and layer 3 starts right at 7: no wait yet. Its refill: 7 (the link), +1.5 a layer: 8.5, 10, 11.5,
    # 13. Step 2 starts at 8: layer 0 waits until 8.5 and ends at 9.5, layer 1 at 11, layer 2 at 12.5, layer 3 at 14.
    sim = executor(num_stages=1, up=4.0)
    results = run(sim, [plan(i, tokens=4, refill=6) for i in range(3)])

    assert [result.finished_seconds for result in results] == [4.0, 8.0, 14.0]
    assert [result.timings[0].window_wait_seconds for result in results] == [0.0, 0.0, 2.0]


def test_in_the_long_run_the_link_sets_the_pace():
    sim = executor(num_stages=1, up=4.0)
    results = run(sim, [plan(i, tokens=4, refill=6) for i in range(50)])

    # 24 bytes a step at 4 bytes/s.
    assert np.diff([result.finished_seconds for result in results])[5:].tolist() == pytest.approx([6.0] * 44)
    assert sim.stage_totals[0].window_wait_seconds == pytest.approx(sim.now() - 200.0)


def test_copies_both_ways_share_the_link():
    # 8 bytes up and 4 down at 1 byte/s each way while both move, 2 up alone: 4 s + 2 s up, 4 s down.
    sim = executor(num_stages=1, num_layers=1, up=2.0, down=2.0, duplex=1.0)
    results = run(sim, [plan(0, tokens=1, refill=8, home=4), plan(1, tokens=1)])

    assert results[1].timings[0].window_wait_seconds == 6.0
    assert sim.stage_totals[0].up_seconds == 6.0
    assert sim.stage_totals[0].down_seconds == 4.0


def test_the_next_step_waits_for_homes_too():
    results = run(executor(num_stages=1, num_layers=1, down=0.5), [plan(0, tokens=1, home=1), plan(1, tokens=1)])

    assert results[1].finished_seconds == 1.0 + 2.0 + 1.0


def test_a_step_that_only_copies_does_not_stop_compute_but_its_blocks_are_waited_for():
    sim = executor(num_stages=1, num_layers=2, up=1.0)
    results = run(sim, [plan(0, tokens=2), plan(1, tokens=0, refill=2), plan(2, tokens=2)])

    # Layers of step 0 end at 1 and 2; refills, 2 s a layer, at 3 and 5; step 2 starts at 2 and waits for both.
    assert results[1].finished_seconds == 2.0
    assert results[1].batch_id == NO_BATCH and len(results[1].token_ids) == 0
    assert results[2].timings[0].start_seconds == 2.0
    assert results[2].finished_seconds == 6.0


def test_a_refill_waits_for_the_home_of_the_step_before():
    # Home: 10 s. The copying step reads what it wrote: its refill runs from 11 to 12.
    sim = executor(num_stages=1, num_layers=1, up=1.0, down=0.1, duplex=0.1)
    results = run(sim, [plan(0, tokens=1, home=1), plan(1, tokens=0, refill=1), plan(2, tokens=1)])

    assert results[2].finished_seconds == 13.0


def test_what_is_copied_costs_compute_beside_it():
    sim = executor(num_stages=1, num_layers=1, up=1e9)
    sim._host_link = dataclasses.replace(sim._host_link, compute_seconds_per_byte=0.75)
    (result,) = run(sim, [plan(0, tokens=1, refill=2)])

    assert result.timings[0].compute_seconds == 1 + 2 * 0.75


def test_tokens_end_when_the_request_has_its_length():
    request = NewRequest(5, np.zeros(6, dtype=np.int32), SamplingParams(max_tokens=100), 0, (END,))
    sim = executor(output_lengths={5: 3})
    prompt = plan(0, tokens=6, request_id=5, samples=True, new=[request])
    chunk = [plan(i, request_id=5, computed=5 + i, samples=True) for i in (1, 2, 3)]
    results = run(sim, [prompt, *chunk])

    assert [result.token_ids.tolist() for result in results] == [[TOKEN], [TOKEN], [END], [END]]
    assert [result.request_ids.tolist() for result in results] == [[5]] * 4


def test_rows_without_samples_give_no_tokens():
    request = NewRequest(5, np.zeros(8, dtype=np.int32), SamplingParams(), 0, ())
    (result,) = run(executor(output_lengths={5: 1}), [plan(0, tokens=4, request_id=5, new=[request])])

    assert len(result.request_ids) == len(result.token_ids) == 0


def test_a_balanced_pipeline_is_busy_all_the_time():
    num_stages, num_steps = 4, 200
    sim = executor(num_stages=num_stages, num_layers=8, stage_link=StageLink(0.001, 1e30), token_seconds=0.001)
    # As many batches as stages: a batch's next step needs the tokens of its last one.
    run(sim, [plan(i, after=i - num_stages) for i in range(num_steps)])

    busy = [totals.compute_seconds / sim.now() for totals in sim.stage_totals]
    assert min(busy) > 0.97
    # One batch less leaves a stage's worth of time idle.
    sim = executor(num_stages=num_stages, num_layers=8)
    run(sim, [plan(i, after=i - num_stages + 1) for i in range(num_steps)])
    assert max(totals.compute_seconds / sim.now() for totals in sim.stage_totals) < 0.76


def test_equal_seeds_give_equal_runs():
    def times(seed: int) -> list[float]:
        cost = PerturbedCostModel(model=SecondsPerToken(), decode_factor=1.3, prefill_factor=0.8, noise=0.2, seed=seed)
        results = run(executor(cost=cost), [plan(i, tokens=1 + i % 3, refill=i % 5) for i in range(40)])
        return [result.finished_seconds for result in results]

    assert times(1) == times(1)
    assert times(1) != times(2)


def test_plans_that_break_the_order_are_refused():
    sim = executor()
    sim.submit(plan(3))
    with pytest.raises(AssertionError, match="order of step_id"):
        sim.submit(plan(3))
    clash = copies(2)
    bad = StepPlan(**{**_fields(plan(4)), "refill": clash, "write_home": clash})
    with pytest.raises(AssertionError, match="slot that it writes home"):
        sim.submit(bad)


def _fields(one: StepPlan) -> dict:
    return {name: getattr(one, name) for name in StepPlan.__dataclass_fields__}


steps = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=25
)


@given(steps, st.integers(1, 3), st.integers(1, 4), st.floats(0.3, 8), st.floats(0.3, 8))
@settings(max_examples=200, deadline=None)
def test_every_layer_keeps_the_order_of_the_plans(shape, num_stages, layers_per_stage, up, down):
    """The same servers, event by event: a layer of a stage is computed, sent home and refilled one after the other."""
    sim = executor(num_stages=num_stages, num_layers=num_stages * layers_per_stage, up=up, down=down)
    plans = [
        plan(i, tokens=tokens, refill=refill, home=home, after=i - back)
        for i, (tokens, refill, home, back) in enumerate(shape)
    ]
    results = run(sim, plans)

    expected = _layer_by_layer(plans, num_stages, layers_per_stage, up, down)
    assert [result.finished_seconds for result in results] == pytest.approx(expected)


def _layer_by_layer(plans, num_stages, num_layers, up, down):
    link = HostLink(up, down, min(up, down))
    done = np.zeros((num_stages, num_layers))  # computed, homes and refill of the last step, by layer
    home = np.zeros((num_stages, num_layers))
    refill = np.zeros((num_stages, num_layers))
    up_free, down_free, compute_free = np.zeros(num_stages), np.zeros(num_stages), np.zeros(num_stages)
    known: list[float] = []
    for one in plans:
        sums = len(one.refill) * num_layers, len(one.write_home) * num_layers
        ready = known[one.sampled_through_step] if one.sampled_through_step >= 0 else 0.0
        ends = []
        for stage in range(num_stages):
            compute_free[stage] = max(compute_free[stage], ready) if one.num_rows else compute_free[stage]
            time = compute_free[stage]
            for layer in range(num_layers):
                fence = max(home[stage, layer], refill[stage, layer])
                if one.num_rows:
                    time = max(time, fence) + one.num_tokens / num_layers
                    done[stage, layer] = time
                else:
                    done[stage, layer] = max(done[stage, layer], fence)
                if sums[1]:
                    down_free[stage] = max(down_free[stage], done[stage, layer]) + link.down_seconds(*sums) / num_layers
                    home[stage, layer] = down_free[stage]
                if sums[0]:
                    up_free[stage] = max(up_free[stage], done[stage, layer]) + link.up_seconds(*sums) / num_layers
                    refill[stage, layer] = up_free[stage]
            compute_free[stage] = ready = time
            ends.append(time)
        known.append(max(max(ends), known[-1] if known else 0.0))
    return known


def _measure_speed() -> None:
    num_rows, num_stages, num_steps = 76, 8, 20_000
    sim = executor(
        num_stages=num_stages, num_layers=80, up=1e3, down=1e3, output_lengths=dict.fromkeys(range(num_rows), 10**6)
    )
    none = np.empty(0, dtype=np.int32)
    new = tuple(NewRequest(i, none, SamplingParams(), 0, ()) for i in range(num_rows))
    began = time.perf_counter()
    spent = 0.0
    for step in range(num_steps):
        computed = np.full(num_rows, 400 + step, dtype=np.int32)
        blocks = -(-(computed + 1) // BLOCK)
        indptr = np.zeros(num_rows + 1, dtype=np.int32)
        np.cumsum(blocks, out=indptr[1:])
        one = StepPlan(
            step_id=step,
            batch_id=step % num_stages,
            phase=Phase.DECODE,
            request_ids=np.arange(num_rows),
            num_computed_tokens=computed,
            num_new_tokens=np.ones(num_rows, dtype=np.int32),
            samples=np.ones(num_rows, dtype=np.bool_),
            block_table_indptr=indptr,
            block_table_indices=np.empty(0, dtype=np.int32),
            write_home=copies(5, 500),
            refill=copies(100),
            new_requests=new if step == 0 else (),
            finished_request_ids=(),
            sampled_through_step=step - num_stages,
        )
        start = time.process_time()
        sim.submit(one)
        if step >= num_stages:
            sim.wait()
        spent += time.process_time() - start
    elapsed = time.perf_counter() - began
    print(f"{num_steps / spent:.0f} steps/s, {1e6 * spent / num_steps:.0f} us a step ({elapsed:.1f} s in all)")


if __name__ == "__main__":
    _measure_speed()
