"""The link's budget: what fits a step, and what waits teach about the link."""

from __future__ import annotations

import numpy as np
import pytest

from pipemax.cost.hardware import HostLink
from pipemax.cost.link_rate import LinkRate
from pipemax.plan import StageTiming
from tests.executor.test_simulator import executor, plan

LINK = HostLink(4.0, 4.0, 3.0)


def timing(compute: float, wait: float, refill: int, home: int = 0) -> StageTiming:
    return StageTiming(0.0, compute, wait, 0.0, refill, home)


def test_the_budget_is_rate_times_step_less_the_margin():
    assert LinkRate(link=LINK, margin=0.05).prefetch_bytes(1000.0) == 3800
    # 300 bytes go home in the first 100 of 950 s, at 3 bytes a second both ways.
    assert LinkRate(link=LINK, margin=0.05).prefetch_bytes(1000.0, home_bytes=300) == 300 + 850 * 4


def test_a_wait_shows_the_rate():
    rate = LinkRate(link=LINK, window_steps=3)
    rate.observe(timing(10.0, 0.0, 40))
    # 40 bytes took 10 + 10 s: half the profile's rate.
    for _ in range(3):
        rate.observe(timing(10.0, 10.0, 40))
    assert rate.factor == pytest.approx(0.5)
    assert rate.prefetch_bytes(100.0) == pytest.approx(190, abs=1)


def test_one_stall_is_not_the_link():
    rate = LinkRate(link=LINK)
    for step in range(40):
        rate.observe(timing(10.0, 100.0 if step == 20 else 0.0, 36))
    assert rate.factor >= 1.0


def test_small_refills_and_none_say_nothing():
    rate = LinkRate(link=LINK)
    for _ in range(100):
        rate.observe(timing(10.0, 0.0, 10))
        rate.observe(timing(0.0, 0.0, 0))
    assert rate.factor == 1.0


@pytest.mark.parametrize("true_rate", [2.0, 4.0, 6.0])
def test_budgets_settle_at_the_true_rate_of_the_link(true_rate):
    """A stage of 10 layers, steps of 100 s; the profile says 4 bytes a second. A block has 10 bytes."""
    sim = executor(num_stages=1, num_layers=10, up=true_rate, down=true_rate)
    rate = LinkRate(link=HostLink(4.0, 4.0, 3.0))
    moved, waits = [], []
    for step in range(150):
        sim.submit(plan(step, tokens=100, refill=rate.prefetch_bytes(100.0) // 10))
        (result,) = sim.wait()
        rate.observe(result.timings[0])
        moved.append(result.timings[0].refill_bytes)
        waits.append(result.timings[0].window_wait_seconds)

    assert np.mean(moved[-50:]) == pytest.approx(100 * true_rate, rel=0.1)
    assert np.mean(waits[-50:]) < 3.0


def test_a_few_blocks_that_come_late_say_nothing_of_the_rate():
    """10 bytes need a quarter of the step; whatever held them up, it was not the link's rate."""
    rate = LinkRate(link=LINK)
    for _ in range(100):
        rate.observe(timing(10.0, 0.2, 10))
    assert rate.factor == 1.0


def test_a_few_blocks_that_come_very_late_do():
    rate = LinkRate(link=LINK)
    for _ in range(100):
        rate.observe(timing(10.0, 6.0, 16))
    assert rate.factor == pytest.approx(0.25)


def test_a_link_that_was_taken_for_too_fast_is_found_out_by_what_it_can_not_bring():
    rate = LinkRate(link=LINK, window_steps=3)
    for _ in range(40):
        rate.observe(timing(10.0, 0.0, 100))  # no wait whatever comes
    assert rate.factor > 1.4
    for _ in range(10):
        rate.observe(timing(10.0, 0.5, 42))  # far less than it was believed to bring, and late
    assert rate.factor == pytest.approx(1.0)
