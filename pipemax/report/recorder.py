"""`StepRecorder`: listens to an engine and keeps what people look at, in bounded memory.

    whole run          sums                                           counters, summary
    whole run          intervals, wider as the run gets longer        charts over time, live rates
    first steps  ...   last steps, in full detail                     trace, timeline

Works the same for real and simulated runs: it knows plans, results and the executor's clock, and reads no other. Told
by the engine's thread, asked by others (progress, metrics), so a lock guards it. Never here: drawing, files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pipemax.observer import EngineGauges
from pipemax.plan import Capacity, CopyTiming, Phase, StepPlan, StepResult
from pipemax.report.interval import Interval, IntervalSeries, StageUse
from pipemax.report.step_record import StageSpan, StepRecord
from pipemax.scheduling.request_state import RequestUpdate

_HEAD_STEPS = 1000
_TAIL_STEPS = 4000
_MAX_INTERVALS = 480
_FIRST_WIDTH_SECONDS = 0.25


@dataclass(slots=True)
class RunTotals:
    """Sums since the start. Rows are counted a step; blocks are KV blocks of all layers of a stage.

    `prefill_tokens` are prompts, and what restarted requests computed again.
    """

    steps: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    rows: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    prefill_tokens: int = 0
    output_tokens: int = 0
    refill_blocks: int = 0
    home_blocks: int = 0
    finished_requests: int = 0
    failed_requests: int = 0
    stages: list[StageUse] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A recorder's contents at one moment; nothing in it changes any more.

    elapsed_seconds     from the first plan to the last thing that happened
    intervals           of `interval_seconds` each, from 0 on; the last is cut at `elapsed_seconds`
    head, tail          the first and the last steps in full; `num_skipped` steps between them are in sums only
    """

    capacity: Capacity
    elapsed_seconds: float
    totals: RunTotals
    interval_seconds: float
    intervals: tuple[Interval, ...]
    head: tuple[StepRecord, ...]
    tail: tuple[StepRecord, ...]
    num_skipped: int


@dataclass(frozen=True, slots=True)
class LiveView:
    """What is going on: rates over the last seconds and over the whole run. `recent` is the sum behind the rates."""

    phase: Phase | None
    gauges: EngineGauges | None
    elapsed_seconds: float
    output_tokens: int
    output_tokens_per_second: float
    average_output_tokens_per_second: float
    recent_seconds: float
    recent: tuple[StageUse, ...]

    def utilisation(self, stage: int) -> float:
        """Share of the last seconds that the stage computed, in [0, 1]."""
        return min(1.0, self.recent[stage].compute_seconds / self.recent_seconds) if self.recent_seconds else 0.0


@dataclass(frozen=True, slots=True)
class _Submitted:
    phase: Phase
    num_rows: int
    num_tokens: int
    prefill_tokens: int
    kv_tokens: int
    refill_blocks: int
    home_blocks: int
    submitted_seconds: float
    gauges: EngineGauges


class StepRecorder:
    """Implements `EngineObserver`. `capacity` is the executor's.

    May come to an engine that runs already: plans in flight by then are not counted. Engines may follow one another,
    on the same clock: tell it by `engine_replaced`.
    """

    def __init__(self, *, capacity: Capacity) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._start_seconds: float | None = None
        self._last_seconds = 0.0
        self._phase: Phase | None = None
        self._gauges: EngineGauges | None = None
        self._submitted: dict[int, _Submitted] = {}
        self._totals = RunTotals(stages=[StageUse() for _ in range(capacity.num_stages)])
        self._series = IntervalSeries(max_intervals=_MAX_INTERVALS, first_width_seconds=_FIRST_WIDTH_SECONDS)
        self._head: list[StepRecord] = []
        self._tail: deque[StepRecord] = deque(maxlen=_TAIL_STEPS)

    # -- told by the engine --------------------------------------------------------------------------------------------

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        """See `EngineObserver`."""
        with self._lock:
            if self._start_seconds is None:
                self._start_seconds = now_seconds
            seconds = self._see(now_seconds)
            self._gauges = gauges
            self._series.at(seconds).gauges = gauges
            self._submitted[plan.step_id] = _Submitted(
                phase=plan.phase,
                num_rows=plan.num_rows,
                num_tokens=plan.num_tokens,
                prefill_tokens=_prefill_tokens(plan),
                kv_tokens=plan.kv_tokens,
                refill_blocks=len(plan.refill),
                home_blocks=len(plan.write_home),
                submitted_seconds=seconds,
                gauges=gauges,
            )

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        """See `EngineObserver`."""
        with self._lock:
            step = self._submitted.pop(result.step_id, None)
            if step is None:
                return  # a plan of before this recorder came
            assert self._start_seconds is not None
            output_tokens = sum(update.token_id is not None for update in updates)
            failed = sum(update.error is not None for update in updates)
            record = StepRecord(
                step_id=result.step_id,
                batch_id=result.batch_id,
                phase=step.phase,
                num_rows=step.num_rows,
                num_tokens=step.num_tokens,
                kv_tokens=step.kv_tokens,
                output_tokens=output_tokens,
                refill_blocks=step.refill_blocks,
                home_blocks=step.home_blocks,
                submitted_seconds=step.submitted_seconds,
                finished_seconds=self._see(result.finished_seconds),
                gauges=step.gauges,
                stages=tuple(self._spans(result)),
            )
            self._phase = record.phase
            self._add_sums(record, prefill_tokens=step.prefill_tokens)
            self._totals.failed_requests += failed
            self._totals.finished_requests += sum(update.finish_reason is not None for update in updates) - failed
            if len(self._head) < _HEAD_STEPS:
                self._head.append(record)
            else:
                self._tail.append(record)

    def engine_replaced(self) -> None:
        """The engine is gone and another one is told of from now on: its steps are counted anew."""
        with self._lock:
            self._submitted.clear()

    # -- asked by others -----------------------------------------------------------------------------------------------

    def snapshot(self) -> RunSnapshot:
        """Everything, copied."""
        with self._lock:
            num_steps = sum(self._totals.steps.values())
            return RunSnapshot(
                capacity=self._capacity,
                elapsed_seconds=self._last_seconds,
                totals=self._copy_totals(),
                interval_seconds=self._series.width_seconds,
                intervals=tuple(interval.copy() for interval in self._series.intervals),
                head=tuple(self._head),
                tail=tuple(self._tail),
                num_skipped=num_steps - len(self._head) - len(self._tail),
            )

    def totals(self) -> RunTotals:
        """The sums, copied."""
        with self._lock:
            return self._copy_totals()

    def live(self, *, recent_seconds: float = 10.0) -> LiveView:
        """Rates over the last `recent_seconds`, or a little more: whole intervals."""
        with self._lock:
            width = self._series.width_seconds
            first = max(0, int((self._last_seconds - recent_seconds) / width))
            covered_seconds = self._last_seconds - first * width
            recent = Interval()
            for interval in self._series.intervals[first:]:
                recent.add(interval)
            stages = tuple(recent.stage(index) for index in range(self._capacity.num_stages))
            elapsed = self._last_seconds
            return LiveView(
                phase=self._phase,
                gauges=self._gauges,
                elapsed_seconds=elapsed,
                output_tokens=self._totals.output_tokens,
                output_tokens_per_second=recent.output_tokens / covered_seconds if covered_seconds > 0 else 0.0,
                average_output_tokens_per_second=self._totals.output_tokens / elapsed if elapsed > 0 else 0.0,
                recent_seconds=covered_seconds,
                recent=stages,
            )

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _see(self, clock_seconds: float) -> float:
        """Seconds since the start; the run is at least that long."""
        assert self._start_seconds is not None
        seconds = max(0.0, clock_seconds - self._start_seconds)
        self._last_seconds = max(self._last_seconds, seconds)
        return seconds

    def _spans(self, result: StepResult) -> list[StageSpan]:
        assert self._start_seconds is not None
        return [
            StageSpan(
                start_seconds=max(0.0, timing.start_seconds - self._start_seconds),
                compute_seconds=max(0.0, timing.compute_seconds),
                window_wait_seconds=timing.window_wait_seconds,
                activation_wait_seconds=timing.activation_wait_seconds,
                refill_bytes=timing.refill_bytes,
                home_bytes=timing.home_bytes,
                copies=tuple(self._copies(timing.copies)),
                issue_seconds=timing.issue_seconds,
            )
            for timing in result.timings
        ]

    def _copies(self, copies: Sequence[CopyTiming]) -> Iterator[CopyTiming]:
        assert self._start_seconds is not None
        for copy in copies:
            if copy.start_seconds >= self._start_seconds:  # else of a plan of before this recorder came
                yield replace(
                    copy,
                    start_seconds=copy.start_seconds - self._start_seconds,
                    end_seconds=copy.end_seconds - self._start_seconds,
                )

    def _add_sums(self, record: StepRecord, *, prefill_tokens: int) -> None:
        totals, phase = self._totals, record.phase
        interval = self._series.at(record.finished_seconds)
        for sums in (totals, interval):
            sums.steps[phase] += 1
            sums.rows[phase] += record.num_rows
            sums.prefill_tokens += prefill_tokens
            sums.output_tokens += record.output_tokens
        totals.refill_blocks += record.refill_blocks
        totals.home_blocks += record.home_blocks
        for stage, span in enumerate(record.stages):
            use = StageUse(
                compute_seconds=span.compute_seconds,
                window_wait_seconds=span.window_wait_seconds,
                activation_wait_seconds=span.activation_wait_seconds,
                refill_bytes=span.refill_bytes,
                home_bytes=span.home_bytes,
            )
            totals.stages[stage].add(use)
            self._last_seconds = max(self._last_seconds, span.end_seconds)
            self._series.spread(stage, phase, use, start_seconds=span.start_seconds, end_seconds=span.end_seconds)

    def _copy_totals(self) -> RunTotals:
        totals = self._totals
        copied = RunTotals(
            steps=dict(totals.steps),
            rows=dict(totals.rows),
            prefill_tokens=totals.prefill_tokens,
            output_tokens=totals.output_tokens,
            refill_blocks=totals.refill_blocks,
            home_blocks=totals.home_blocks,
            finished_requests=totals.finished_requests,
            failed_requests=totals.failed_requests,
        )
        for use in totals.stages:
            copied.stages.append(StageUse())
            copied.stages[-1].add(use)
        return copied


def _prefill_tokens(plan: StepPlan) -> int:
    """New tokens of the rows that are not decode: those compute the one token that was sampled last."""
    if plan.phase is Phase.DECODE:
        return 0
    if plan.phase is not Phase.MIXED:
        return plan.num_tokens
    decode = (plan.num_new_tokens == 1) & (plan.num_computed_tokens > 0) & plan.samples
    return int(plan.num_new_tokens[~decode].sum())
