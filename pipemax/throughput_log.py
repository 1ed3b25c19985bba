"""`ThroughputLog`: what a benchmark keeps of every step, and what it makes of them.

Never here: driving an engine, printing (`bench.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipemax.observer import EngineGauges
from pipemax.plan import Capacity, CopyDirection, Phase, StepPlan, StepResult
from pipemax.scheduling.request_state import RequestUpdate

# A decode step counts as full with at least this share of the most rows, or of the device's KV blocks.
_FULL_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class _Step:
    """`num_blocks` of the device that are taken, or the window's."""

    phase: Phase
    num_rows: int
    num_tokens: int
    num_blocks: int


class ThroughputLog:
    """EngineObserver that keeps what the summary needs of every step."""

    def __init__(self, *, capacity: Capacity) -> None:
        self.plans: dict[int, _Step] = {}
        self.results: list[StepResult] = []
        self.most_gauges = EngineGauges(0, 0, 0, 0, 0, 0)
        self._num_stages = capacity.num_stages
        self._num_device_blocks = capacity.num_device_blocks

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        num_blocks = gauges.resident_blocks + gauges.window_blocks
        self.plans[plan.step_id] = _Step(plan.phase, plan.num_rows, plan.num_tokens, num_blocks)
        names = EngineGauges.__slots__
        self.most_gauges = EngineGauges(*(max(getattr(self.most_gauges, n), getattr(gauges, n)) for n in names))

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        self.results.append(result)

    def steady_decode(self) -> dict[str, Any] | None:
        """Decode steps that follow another one while batches are full; None: there are no such.

        A step is full with nearly as many rows as the fullest, or with nearly all KV blocks of the device taken.
        `refill_bytes_per_second`: over the time from a refill's first layer to its last, waits between layers included.
        """
        most_rows = max((step.num_rows for step in self.plans.values() if step.phase is Phase.DECODE), default=0)

        def is_full(result: StepResult) -> bool:
            step = self.plans[result.step_id]
            return step.phase is Phase.DECODE and (
                step.num_rows >= _FULL_SHARE * most_rows or step.num_blocks >= _FULL_SHARE * self._num_device_blocks
            )

        full = [is_full(result) for result in self.results]
        steady = [
            (self.results[index - 1], self.results[index])
            for index in range(1, len(full))
            if full[index - 1] and full[index]
        ]
        seconds = sum(result.finished_seconds - before.finished_seconds for before, result in steady)
        if seconds <= 0:
            return None
        results = [result for _, result in steady]
        rows = sum(self.plans[result.step_id].num_rows for result in results)
        return {
            "steps": len(results),
            "rows_per_step": rows / len(results),
            "seconds_per_step": seconds / len(results),
            "tokens_per_second": rows / seconds,
            "stages": [self._steady_stage(stage, results, seconds) for stage in range(self._num_stages)],
        }

    def _steady_stage(self, stage: int, results: Sequence[StepResult], seconds: float) -> dict[str, float | None]:
        timings = [result.timings[stage] for result in results]
        ids = {result.step_id for result in results}
        refills = [
            copy
            for result in self.results
            for copy in result.timings[stage].copies
            if copy.direction is CopyDirection.REFILL and copy.step_id in ids
        ]
        refill_seconds = sum(copy.end_seconds - copy.start_seconds for copy in refills)
        return {
            "compute_share": sum(timing.compute_seconds for timing in timings) / seconds,
            "window_wait_share": sum(timing.window_wait_seconds for timing in timings) / seconds,
            "activation_wait_share": sum(timing.activation_wait_seconds for timing in timings) / seconds,
            "issue_share": sum(timing.issue_seconds for timing in timings) / seconds,
            "copy_issue_share": sum(timing.copy_issue_seconds for timing in timings) / seconds,
            "refill_bytes_per_second": sum(copy.num_bytes for copy in refills) / refill_seconds if refills else None,
        }

    def phases(self) -> dict[str, dict[str, float]]:
        """By phase: steps, rows and tokens a step, and seconds in which the last stage computed."""
        table: dict[str, dict[str, float]] = {}
        for result in self.results:
            step = self.plans[result.step_id]
            entry = table.setdefault(step.phase.value, {"steps": 0, "rows": 0, "tokens": 0, "compute_seconds": 0.0})
            entry["steps"] += 1
            entry["rows"] += step.num_rows
            entry["tokens"] += step.num_tokens
            entry["compute_seconds"] += result.timings[-1].compute_seconds
        return table

    def stages(self, wall_seconds: float) -> list[dict[str, float]]:
        """Where each stage's time went, in seconds, and what it moved."""
        table = []
        for stage in range(self._num_stages):
            timings = [result.timings[stage] for result in self.results]
            entry = {
                name: float(sum(getattr(timing, name) for timing in timings))
                for name in (
                    "compute_seconds",
                    "window_wait_seconds",
                    "activation_wait_seconds",
                    "refill_bytes",
                    "home_bytes",
                )
            }
            busy = entry["compute_seconds"] + entry["window_wait_seconds"] + entry["activation_wait_seconds"]
            table.append({**entry, "idle_seconds": max(0.0, wall_seconds - busy)})
        return table
