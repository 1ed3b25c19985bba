"""Which steps count as steady decode, on logs made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipemax.observer import EngineGauges
from pipemax.plan import Phase, StageTiming, StepResult
from pipemax.planning.steps import StepLog
from tests.executor.plans import Row, make_plan

NUM_STAGES = 2


def gauges(unplaced: int, home_blocks: int = 0) -> EngineGauges:
    return EngineGauges(
        num_waiting=unplaced,
        num_ready=0,
        num_running=0,
        resident_blocks=0,
        window_blocks=0,
        home_blocks=home_blocks,
    )


def log_of(steps: list[tuple[Phase, int, int]]) -> StepLog:
    """Steps as (phase, rows, requests that still wait for a place): one a second, half of it compute, a quarter waiting
    for the window; stage 1 half a second later."""
    log = StepLog(num_stages=NUM_STAGES)
    for index, (phase, rows, unplaced) in enumerate(steps):
        plan = make_plan(index, [Row(row, 5, 1, [0, 1]) for row in range(rows)])
        object.__setattr__(plan, "phase", phase)
        log.on_submit(plan, now_seconds=0.0, gauges=gauges(unplaced, home_blocks=index))
        timings = tuple(StageTiming(index + 0.5 * stage, 0.5, 0.25, 0.125, 10, 0) for stage in range(NUM_STAGES))
        empty = np.empty(0, dtype=np.int64)
        log.on_result(StepResult(index, 0, empty, empty.astype(np.int32), None, {}, index + 1.0, timings), [])
    return log


def test_the_middle_of_a_decode_run_counts():
    # 4 steps at either end of the 20 are left out, and what comes once nobody waits any more.
    log = log_of([(Phase.PREFILL, 1, 9)] * 3 + [(Phase.DECODE, 8, 5)] * 20 + [(Phase.DECODE, 2, 0)] * 30)
    steady = log.steady_decode()
    assert steady is not None
    assert steady.num_steps == 12
    assert steady.mean_rows == 8
    assert steady.seconds == pytest.approx(12)
    assert steady.output_tokens_per_second == pytest.approx(8)
    assert steady.stage_utilisation == pytest.approx((0.5, 0.5))
    assert steady.window_wait == pytest.approx((0.25, 0.25))
    assert steady.activation_wait == pytest.approx((0.125, 0.125))
    assert log.max_home_blocks == 52


def test_runs_between_prefills_are_added_up():
    run = [(Phase.DECODE, 8, 5)] * 5 + [(Phase.MIXED, 8, 5)] * 5
    log = log_of([*run, (Phase.PREFILL, 1, 5), *run, (Phase.PREFILL, 1, 5), *run[:6], (Phase.PREFILL, 1, 0)])
    steady = log.steady_decode()
    assert steady is not None and steady.num_steps == 2 * (10 - 8)


def test_no_run_is_long_enough():
    assert log_of([(Phase.DECODE, 8, 5)] * 8 + [(Phase.DECODE, 1, 0)] * 100).steady_decode() is None
    assert log_of([(Phase.DECODE, 8, 0)] * 100).steady_decode() is None
    assert log_of([]).steady_decode() is None


def test_rows_and_time_by_phase():
    log = log_of([(Phase.PREFILL, 1, 0), (Phase.DECODE, 4, 0), (Phase.DECODE, 6, 0)])
    assert log.mean_rows([Phase.DECODE]) == 5 and log.mean_rows([Phase.MIXED]) == 0
    assert log.compute_seconds(Phase.DECODE, stage=1) == 1.0
    assert (log.num_steps, log.num_steps_of(Phase.PREFILL)) == (3, 1)
