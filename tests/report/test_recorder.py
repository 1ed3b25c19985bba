"""What a recorder keeps of a run: sums that agree with the executor's own, in memory that does not grow."""

import subprocess
import sys

import pytest

from pipemax.engine import Engine
from pipemax.observer import EngineGauges
from pipemax.plan import Phase
from pipemax.report import recorder as recorder_module
from pipemax.report.interval import Interval, IntervalSeries, StageUse
from pipemax.report.recorder import StepRecorder
from tests.report.runs import CAPACITY, OUTPUT_LENGTHS, executor, record, recorded_run, request, scheduler


def test_sums_are_those_of_the_executor():
    recorder = StepRecorder(capacity=CAPACITY)
    sim = record(recorder)
    run = recorder.snapshot()

    assert sum(run.totals.steps.values()) == sim.num_steps
    for use, expected in zip(run.totals.stages, sim.stage_totals, strict=True):
        assert use.compute_seconds == pytest.approx(expected.compute_seconds)
        assert use.window_wait_seconds == pytest.approx(expected.window_wait_seconds)
        assert use.activation_wait_seconds == pytest.approx(expected.activation_wait_seconds)
        assert (use.refill_bytes, use.home_bytes) == (expected.refill_bytes, expected.home_bytes)
    assert run.totals.stages[0].refill_bytes == run.totals.refill_blocks * 4000 > 0
    assert run.totals.stages[0].home_bytes == run.totals.home_blocks * 4000 > 0


def test_tokens_and_requests_are_those_of_the_workload():
    totals = recorded_run().totals
    assert totals.output_tokens == sum(OUTPUT_LENGTHS.values())
    assert (totals.finished_requests, totals.failed_requests) == (40, 0)
    assert totals.prefill_tokens == sum(request(i).num_prompt for i in range(40))
    assert totals.steps[Phase.PREFILL] > 0 and totals.steps[Phase.DECODE] > 0


def test_intervals_add_up_to_the_totals():
    run = recorded_run()
    merged = Interval()
    for interval in run.intervals:
        merged.add(interval)
    totals = run.totals
    assert (merged.steps, merged.rows) == (totals.steps, totals.rows)
    assert (merged.output_tokens, merged.prefill_tokens) == (totals.output_tokens, totals.prefill_tokens)
    for use, expected in zip(merged.stages, totals.stages, strict=True):
        for name in StageUse.__slots__:
            assert getattr(use, name) == pytest.approx(getattr(expected, name)), name
    assert sum(merged.phase_seconds.values()) == pytest.approx(sum(use.compute_seconds for use in totals.stages))


def test_no_stage_is_busier_than_time_allows():
    run = recorded_run()
    for interval in run.intervals:
        for use in interval.stages:
            assert use.compute_seconds + use.window_wait_seconds <= run.interval_seconds * 1.0001


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(recorder_module, "_HEAD_STEPS", 5)
    monkeypatch.setattr(recorder_module, "_TAIL_STEPS", 7)
    monkeypatch.setattr(recorder_module, "_MAX_INTERVALS", 4)
    recorder = StepRecorder(capacity=CAPACITY)
    sim = record(recorder)
    run = recorder.snapshot()

    assert [step.step_id for step in run.head] == list(range(5))
    assert [step.step_id for step in run.tail] == list(range(sim.num_steps - 7, sim.num_steps))
    assert run.num_skipped == sim.num_steps - 12 > 0
    assert len(run.intervals) <= 4 and run.interval_seconds * 4 >= run.elapsed_seconds
    assert sum(interval.output_tokens for interval in run.intervals) == sum(OUTPUT_LENGTHS.values())


def test_steps_in_full_are_in_order_and_consistent():
    run = recorded_run()
    assert run.num_skipped == 0
    for step in run.head:
        assert 0 <= step.submitted_seconds <= step.finished_seconds <= run.elapsed_seconds
        assert len(step.stages) == 2
        if step.num_rows:
            first, second = step.stages
            assert second.start_seconds >= first.end_seconds
            assert step.gauges.expected_seconds == pytest.approx(0.9 * step.slowest_compute_seconds, rel=0.05)
        else:
            assert step.phase is Phase.COPY and step.gauges.expected_seconds == 0


def test_gauges_fit_in_the_pools():
    for step in recorded_run().head:
        gauges = step.gauges
        assert gauges.resident_blocks + gauges.window_blocks <= CAPACITY.num_device_blocks
        assert gauges.home_blocks <= CAPACITY.num_host_blocks
    assert max(step.gauges.travelling_blocks for step in recorded_run().head) > CAPACITY.num_window_blocks


def test_travelling_blocks_are_never_fewer_than_none():
    assert EngineGauges(0, 0, 0, resident_blocks=5, window_blocks=0, home_blocks=3).travelling_blocks == 0


def test_live_rates_of_a_steady_run():
    recorder = StepRecorder(capacity=CAPACITY)
    record(recorder)
    run, live = recorder.snapshot(), recorder.live(recent_seconds=1e9)
    assert live.recent_seconds == pytest.approx(run.elapsed_seconds)
    assert live.output_tokens_per_second == pytest.approx(live.average_output_tokens_per_second)
    assert live.average_output_tokens_per_second == pytest.approx(live.output_tokens / run.elapsed_seconds)
    assert live.utilisation(0) == pytest.approx(run.totals.stages[0].compute_seconds / run.elapsed_seconds)
    assert 0 < recorder.live(recent_seconds=1).recent_seconds < 1.5


def test_live_before_anything_has_happened():
    live = StepRecorder(capacity=CAPACITY).live()
    assert (live.phase, live.gauges, live.output_tokens, live.output_tokens_per_second) == (None, None, 0, 0.0)
    assert live.utilisation(1) == 0.0


def test_a_snapshot_does_not_change_any_more():
    recorder = StepRecorder(capacity=CAPACITY)
    before = recorder.snapshot()
    record(recorder)
    assert before.totals.output_tokens == 0 and before.intervals == () and before.head == ()


@pytest.mark.parametrize("times", [(0.0, 0.4), (0.2, 2.7), (0.9, 1.1), (3.0, 3.0), (0.5, 40.0)])
def test_a_step_is_spread_over_the_intervals_that_it_lies_in(times):
    start, end = times
    series = IntervalSeries(max_intervals=8, first_width_seconds=1.0)
    use = StageUse(compute_seconds=10.0, window_wait_seconds=2.0, refill_bytes=100.0)
    series.spread(1, Phase.DECODE, use, start_seconds=start, end_seconds=end)
    width = series.width_seconds
    for index, interval in enumerate(series.intervals):
        overlap = max(0.0, min(end, (index + 1) * width) - max(start, index * width))
        expected = 10.0 * overlap / (end - start) if end > start else 10.0 * (index == int(start / width))
        assert interval.stage(1).compute_seconds == pytest.approx(expected)
        assert interval.stage(0).compute_seconds == 0
    assert sum(interval.stage(1).refill_bytes for interval in series.intervals) == pytest.approx(100)


def test_an_engine_may_be_replaced_by_another():
    recorder = StepRecorder(capacity=CAPACITY)
    first = record(recorder)
    recorder.engine_replaced()
    second = record(recorder)  # its steps have the same numbers, its clock starts again
    run = recorder.snapshot()
    assert len(run.head) == first.num_steps + second.num_steps
    assert run.totals.output_tokens == 2 * sum(OUTPUT_LENGTHS.values())


def test_a_recorder_may_come_late():
    engine = Engine(scheduler=scheduler(), executor=executor())
    for request_id in range(4):
        engine.add_request(request(request_id))
    for _ in range(3):
        engine.step()
    in_flight = engine.scheduler.num_plans_in_flight
    recorder = StepRecorder(capacity=CAPACITY)
    engine.observe(recorder)
    while engine.scheduler.num_plans_in_flight:
        engine.step()
    run = recorder.snapshot()
    assert in_flight > 0 and len(run.head) == sum(run.totals.steps.values()) > 0
    assert run.head[0].step_id > 0 and run.head[0].submitted_seconds == 0


def test_recording_needs_no_torch():
    script = (
        "import sys; import pipemax.report.recorder, pipemax.report.chrome_trace, pipemax.engine\n"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
