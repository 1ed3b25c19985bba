"""`StepLog`: what every step of a run was and where its time went; `SteadyDecode`: the middle of a run.

Fed by an `Engine` as an observer. Never here: what a run costs in memory or money, other layouts.

    prefill   decode, batches full        prefill   decode, batches full    decode, nobody left to join: the tail
    |-------|..====================..|-------|..==================..|------------------------------|
             ramp     counted      drain          counted             not counted

Steady decode are the steps with decode rows while requests still wait for a place, in unbroken runs of them, without
the first and the last two rounds of each run (a round: one step a stage), in which the pipeline fills and drains.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipemax.observer import EngineGauges
from pipemax.plan import Phase, StepPlan, StepResult
from pipemax.scheduling.request_state import RequestUpdate

_ROUNDS_LEFT_OUT = 2
_PER_STAGE = 5  # start, compute, window wait, activation wait, refill bytes


@dataclass(frozen=True, slots=True)
class SteadyDecode:
    """Sums over steady decode. Shares are of the time that a stage spent in it, one entry a stage."""

    num_steps: int
    seconds: float
    mean_rows: float
    output_tokens_per_second: float
    stage_utilisation: tuple[float, ...]
    window_wait: tuple[float, ...]
    activation_wait: tuple[float, ...]

    @property
    def busiest_stage(self) -> int:
        """The stage whose pace is the pipeline's."""
        return max(range(len(self.stage_utilisation)), key=self.stage_utilisation.__getitem__)


class StepLog:
    """Implements `EngineObserver`."""

    def __init__(self, *, num_stages: int) -> None:
        self._num_stages = num_stages
        self._phases: list[Phase] = []
        self._rows = array("q")
        self._samples = array("q")
        self._unplaced = array("q")
        self._times = array("d")
        self.max_home_blocks = 0

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        """See `EngineObserver`."""
        self._phases.append(plan.phase)
        self._rows.append(plan.num_rows)
        self._samples.append(int(np.count_nonzero(plan.samples)))
        self._unplaced.append(gauges.num_waiting + gauges.num_ready)
        self.max_home_blocks = max(self.max_home_blocks, gauges.home_blocks)

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        """See `EngineObserver`."""
        for timing in result.timings:
            self._times.extend(
                (
                    timing.start_seconds,
                    timing.compute_seconds,
                    timing.window_wait_seconds,
                    timing.activation_wait_seconds,
                    timing.refill_bytes,
                )
            )

    @property
    def num_steps(self) -> int:
        return len(self._phases)

    def num_steps_of(self, phase: Phase) -> int:
        return self._phases.count(phase)

    def compute_seconds(self, phase: Phase, *, stage: int) -> float:
        """Compute of one stage in steps of that phase."""
        chosen = np.array([p is phase for p in self._phases], dtype=np.bool_)
        return float(self._timings()[chosen, stage, 1].sum())

    def mean_rows(self, phases: Sequence[Phase]) -> float:
        """Rows of a step of these phases; 0 without any."""
        rows = [rows for phase, rows in zip(self._phases, self._rows, strict=True) if phase in phases]
        return sum(rows) / len(rows) if rows else 0.0

    def steady_decode(self) -> SteadyDecode | None:
        """None where no run of decode steps is long enough."""
        timings = self._timings()
        total = np.zeros((self._num_stages, _PER_STAGE))
        span = np.zeros(self._num_stages)
        steps = rows = samples = 0
        for first, after in self._decode_runs():
            part = timings[first:after]
            total += part.sum(axis=0)
            span += timings[after, :, 0] - part[0, :, 0]
            steps += after - first
            rows += sum(self._rows[first:after])
            samples += sum(self._samples[first:after])
        if not steps:
            return None
        shares = total / span[:, None]
        return SteadyDecode(
            num_steps=steps,
            seconds=float(span.mean()),
            mean_rows=rows / steps,
            output_tokens_per_second=samples / float(span.mean()),
            stage_utilisation=tuple(shares[:, 1].tolist()),
            window_wait=tuple(shares[:, 2].tolist()),
            activation_wait=tuple(shares[:, 3].tolist()),
        )

    def _timings(self) -> NDArray[np.float64]:
        """[steps, stages, values]"""
        return np.frombuffer(self._times, dtype=np.float64).reshape(-1, self._num_stages, _PER_STAGE)

    def _decode_runs(self) -> Iterator[tuple[int, int]]:
        """[first, after) of each counted run; step `after` exists."""
        margin = _ROUNDS_LEFT_OUT * self._num_stages
        last_unplaced = max((i for i, count in enumerate(self._unplaced) if count), default=-1)
        first = 0
        for index in range(last_unplaced + 2):
            in_run = index <= last_unplaced and self._phases[index] is not Phase.PREFILL
            if in_run:
                continue
            if index - first > 2 * margin:
                yield first + margin, index - margin
            first = index + 1
