"""`IntervalSeries`: what happened when, in a bounded number of equal intervals, however long a run is.

    0     w     2w    3w                     when the last interval is full, neighbours are
    |--a--|--b--|--c--|--d--|      ─►        merged and the width doubles:
    |--a+b------|--c+d------|-- ...

Sums only, which merge without loss; gauges keep the latest value. Never here: what is done with them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from pipemax.observer import EngineGauges
from pipemax.plan import Phase


@dataclass(slots=True)
class StageUse:
    """Sums over steps of one stage, seconds and bytes. Copies run beside compute; waits do not."""

    compute_seconds: float = 0.0
    window_wait_seconds: float = 0.0
    activation_wait_seconds: float = 0.0
    refill_bytes: float = 0.0
    home_bytes: float = 0.0

    def add(self, other: StageUse, share: float = 1.0) -> None:
        """Adds a share of `other`."""
        self.compute_seconds += share * other.compute_seconds
        self.window_wait_seconds += share * other.window_wait_seconds
        self.activation_wait_seconds += share * other.activation_wait_seconds
        self.refill_bytes += share * other.refill_bytes
        self.home_bytes += share * other.home_bytes

    @property
    def busy_seconds(self) -> float:
        """Time in which the stage had a step: compute and both waits."""
        return self.compute_seconds + self.window_wait_seconds + self.activation_wait_seconds


@dataclass(slots=True)
class Interval:
    """Sums over one interval.

    steps, rows         steps that were done in it, and their rows, by phase
    prefill_tokens      tokens that those steps computed in prefill
    output_tokens       tokens that live requests got
    phase_seconds       compute seconds of all stages together, by phase of the step
    stages              by stage
    gauges              as they were last; None if no plan was made in it
    """

    steps: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    rows: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    phase_seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    prefill_tokens: int = 0
    output_tokens: int = 0
    stages: list[StageUse] = field(default_factory=list)
    gauges: EngineGauges | None = None

    def stage(self, index: int) -> StageUse:
        while len(self.stages) <= index:
            self.stages.append(StageUse())
        return self.stages[index]

    def add(self, later: Interval) -> None:
        for phase in Phase:
            self.steps[phase] += later.steps[phase]
            self.rows[phase] += later.rows[phase]
            self.phase_seconds[phase] += later.phase_seconds[phase]
        self.prefill_tokens += later.prefill_tokens
        self.output_tokens += later.output_tokens
        for index, use in enumerate(later.stages):
            self.stage(index).add(use)
        self.gauges = later.gauges or self.gauges

    def copy(self) -> Interval:
        return copy.deepcopy(self)


class IntervalSeries:
    """Intervals from time 0 on. At most `max_intervals` (even); the first width is `first_width_seconds`."""

    def __init__(self, *, max_intervals: int, first_width_seconds: float) -> None:
        assert max_intervals >= 2 and max_intervals % 2 == 0 and first_width_seconds > 0
        self._max_intervals = max_intervals
        self.width_seconds = first_width_seconds
        self.intervals: list[Interval] = []

    def at(self, seconds: float) -> Interval:
        """The interval of a time since the start; widens all of them if it lies beyond the last."""
        assert seconds >= 0
        while seconds >= self.width_seconds * self._max_intervals:
            self._merge_neighbours()
        index = int(seconds / self.width_seconds)
        while len(self.intervals) <= index:
            self.intervals.append(Interval())
        return self.intervals[index]

    def spread(self, stage: int, phase: Phase, use: StageUse, *, start_seconds: float, end_seconds: float) -> None:
        """Adds a step of a stage to the intervals that it lies in, by the time that it spends in each."""
        start_seconds, end_seconds = max(0.0, start_seconds), max(0.0, start_seconds, end_seconds)
        self.at(end_seconds)
        first, last = int(start_seconds / self.width_seconds), int(end_seconds / self.width_seconds)
        duration_seconds = end_seconds - start_seconds
        for index in range(first, last + 1):
            begin = max(start_seconds, index * self.width_seconds)
            end = min(end_seconds, (index + 1) * self.width_seconds)
            share = 1.0 if first == last else (end - begin) / duration_seconds
            interval = self.intervals[index]
            interval.stage(stage).add(use, share)
            interval.phase_seconds[phase] += share * use.compute_seconds

    def _merge_neighbours(self) -> None:
        merged = []
        for index in range(0, len(self.intervals), 2):
            interval = self.intervals[index]
            if index + 1 < len(self.intervals):
                interval.add(self.intervals[index + 1])
            merged.append(interval)
        self.intervals = merged
        self.width_seconds *= 2
