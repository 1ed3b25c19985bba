"""What the host's time for queueing copies leaves of a refill."""

from __future__ import annotations

import numpy as np
import pytest

from pipemax.cost.copy_issue import CopyIssue
from pipemax.cost.forecast import Forecast
from pipemax.cost.hardware import HostLink
from pipemax.cost.load import StepLoad, even_stages
from pipemax.plan import StageTiming, StepResult
from tests.executor.plans import Row, make_plan

LOAD = StepLoad.of_decode(num_rows=64, kv_tokens=64 * 512)


def test_a_third_of_the_step_goes_into_queueing_copies() -> None:
    issue = CopyIssue()
    assert issue.most_blocks(1.0) is None
    issue.observe(num_blocks=64, copy_issue_seconds=2.0)
    assert issue.most_blocks(12.0) == 128
    assert issue.most_blocks(0.0) == 0


def test_small_copies_and_single_stalls_say_nothing() -> None:
    issue = CopyIssue()
    issue.observe(num_blocks=3, copy_issue_seconds=0.003)
    assert issue.most_blocks(1.0) is None
    for step in range(20):
        issue.observe(num_blocks=64, copy_issue_seconds=200.0 if step % 8 == 3 else 2.0)
        assert issue.most_blocks(12.0) == 128


class SteadyCost:
    def step_seconds(self, load, stage):
        return 0.024


def test_steps_that_wait_for_their_host_do_not_raise_what_it_has_to_do() -> None:
    """A host of 4 ms a step and 50 us a block, a GPU of 24 ms, a link that brings 500 blocks in that time."""
    forecast = Forecast(
        cost=SteadyCost(),
        stages=even_stages(4, 2),
        link=HostLink(500 / 0.024, 500 / 0.024, 500 / 0.024),
        block_bytes=1,
    )
    seconds, refills = 0.0, []
    for step_id in range(200):
        blocks = forecast.refill_blocks(0.2 if step_id == 50 else forecast.step_seconds(LOAD))  # one long step
        refills.append(blocks)
        slots = np.arange(blocks, dtype=np.int32)
        plan = make_plan(step_id, [Row(0, 8, 1, [0])], refill=list(zip(slots.tolist(), slots.tolist(), strict=True)))
        forecast.submitted(plan)
        copy_issue_seconds = 50e-6 * blocks
        seconds = max(0.024, 0.004 + copy_issue_seconds)
        timings = [StageTiming(0.0, seconds, 0.0, 0.0, blocks, 0, (), seconds, copy_issue_seconds) for _ in range(2)]
        tokens = np.zeros(1, np.int32)
        forecast.finished(StepResult(step_id, 0, plan.request_ids, tokens, None, {}, 0.0, tuple(timings)))
    assert max(refills[20:50]) == pytest.approx(160, abs=1)
    assert max(refills[51:]) < 180
    assert seconds == 0.024
