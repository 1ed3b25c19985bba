"""What `pipemax bench throughput` makes of the steps that it sees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipemax.observer import EngineGauges
from pipemax.plan import Capacity, CopyDirection, CopyTiming, Phase, StageTiming, StepResult
from pipemax.throughput_log import ThroughputLog
from tests.executor.plans import Row, make_plan

CAPACITY = Capacity(
    num_stages=1, block_size=16, num_device_blocks=100, num_window_blocks=0, num_host_blocks=100, block_bytes=1
)


def logged(steps: list[tuple[int, int, float]], *, window_blocks: int = 0) -> ThroughputLog:
    """A log of (rows, new tokens a row, end in seconds); one stage that computed for half of every second."""
    log = ThroughputLog(capacity=CAPACITY)
    for step_id, (num_rows, num_new, end_seconds) in enumerate(steps):
        rows = [Row(i, 0 if num_new > 1 else 8, num_new, [i, i + 100, i + 200]) for i in range(num_rows)]
        plan = make_plan(step_id, rows)
        gauges = EngineGauges(0, 0, num_rows, 2 * num_rows, window_blocks, num_rows)
        plan = dataclasses.replace(plan, phase=Phase.PREFILL if num_new > 1 else Phase.DECODE)
        log.on_submit(plan, now_seconds=0.0, gauges=gauges)
        copy = CopyTiming(step_id, CopyDirection.REFILL, 1, 100, end_seconds - 0.5, end_seconds - 0.25)
        timing = StageTiming(end_seconds - 0.5, 0.5, 0.0, 0.0, 3, 5, (copy,), 0.25, 0.125)
        tokens = np.zeros(num_rows, np.int32)
        log.on_result(StepResult(step_id, 0, plan.request_ids, tokens, None, {}, end_seconds, (timing,)), [])
    return log


def test_the_steady_rate_looks_at_full_decode_steps_that_follow_each_other():
    steps = [(10, 5, 1.0), (10, 1, 3.0), (10, 1, 4.0), (9, 1, 5.0), (4, 1, 5.1), (1, 5, 9.0), (10, 1, 20.0)]
    # Steps 2 and 3: 19 rows in two seconds. The first decode step follows prefill, the fifth is not full.
    steady = logged(steps).steady_decode()
    assert (steady["steps"], steady["rows_per_step"], steady["seconds_per_step"]) == (2, 9.5, 1.0)
    assert steady["tokens_per_second"] == pytest.approx(9.5)
    # The stage computed for half of both seconds; what step 2 refilled took a quarter of one.
    assert steady["stages"] == [
        {
            "compute_share": 0.5,
            "window_wait_share": 0.0,
            "activation_wait_share": 0.0,
            "issue_share": 0.25,
            "copy_issue_share": 0.125,
            "refill_bytes_per_second": pytest.approx(400.0),
        }
    ]
    assert logged(steps[:2]).steady_decode() is None


def test_a_step_is_full_with_few_rows_when_memory_is():
    steps = [(10, 1, 1.0), (45, 1, 2.0), (4, 1, 3.0), (4, 1, 4.0)]
    assert logged(steps).steady_decode() is None  # one step of 45 rows, which follows none
    full = logged(steps, window_blocks=90).steady_decode()
    assert (full["steps"], full["rows_per_step"]) == (3, 53 / 3)


def test_phases_and_stages_add_up_what_was_seen():
    log = logged([(2, 5, 1.0), (3, 1, 2.0), (1, 1, 3.0)])
    assert log.phases() == {
        "prefill": {"steps": 1, "rows": 2, "tokens": 10, "compute_seconds": 0.5},
        "decode": {"steps": 2, "rows": 4, "tokens": 4, "compute_seconds": 1.0},
    }
    stage = log.stages(wall_seconds=4.0)[0]
    assert (stage["compute_seconds"], stage["idle_seconds"], stage["refill_bytes"], stage["home_bytes"]) == (
        1.5,
        2.5,
        9,
        15,
    )
    assert (log.most_gauges.num_running, log.most_gauges.resident_blocks) == (3, 6)
