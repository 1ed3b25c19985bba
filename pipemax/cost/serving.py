"""`ServingEstimate`: how long a serving engine takes for a workload, step by step on a virtual clock.

    host      schedule k   | schedule k+1 | ...          rows x a constant; a pipeline has one step a stage in flight
    stage 0                | step k       | step k+1
    stage 1                               > step k   | step k+1

`tensor_parallel.py` and `plain_pipeline.py` say what a step costs there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipemax.config import ConfigError
from pipemax.cost.continuous_batching import BatchedStep, BatchingLimits, ContinuousBatching
from pipemax.cost.load import StepLoad
from pipemax.cost.workload import RequestLengths

FRAMEWORK_SECONDS_PER_ROW = 10e-6
"""The engine's own work, a row and step: scheduling, sampling's bookkeeping, taking tokens in. The one fitted constant:
it makes the 8B run on one H100 come out (docs/cost-model.md); every other run is predicted with it."""


@dataclass(frozen=True, slots=True)
class ServingEstimate:
    """What came out. `num_prefill_tokens` includes those of requests that started over."""

    seconds: float
    output_tokens: int
    num_steps: int
    num_rows: int
    num_preemptions: int
    num_prefill_tokens: int

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def mean_rows(self) -> float:
        return self.num_rows / self.num_steps


def estimate_serving(
    *,
    workload: Sequence[RequestLengths],
    limits: BatchingLimits,
    stage_seconds: Callable[[StepLoad], Sequence[float]],
    handover_seconds: Callable[[StepLoad], float],
    framework_seconds_per_row: float = FRAMEWORK_SECONDS_PER_ROW,
) -> ServingEstimate:
    """Runs the whole workload. `stage_seconds` gives the time of a step on each stage; as many steps are in flight.

    Raises ConfigError when a request is longer than the whole cache.
    """
    longest = max(request.prompt_tokens + request.output_tokens for request in workload)
    if longest > limits.num_blocks * limits.block_size:
        raise ConfigError(
            f"a request of {longest} tokens does not fit the KV cache of {limits.num_blocks * limits.block_size} "
            "tokens; use more or larger GPUs, or a smaller model"
        )
    batching = ContinuousBatching(workload=workload, limits=limits)
    in_flight: deque[tuple[float, BatchedStep]] = deque()
    num_stages = len(stage_seconds(StepLoad(0, 0, 0, 0, 0)))
    stage_free = [0.0] * num_stages
    now = 0.0
    num_steps = num_rows = 0
    while not batching.is_done:
        step = batching.schedule() if len(in_flight) < num_stages else None
        if step is None:
            finished, step = in_flight.popleft()
            now = max(now, finished)
            batching.complete(step)
            continue
        now += framework_seconds_per_row * step.load.num_rows
        reached = now
        for stage, seconds in enumerate(stage_seconds(step.load)):
            if stage:
                reached += handover_seconds(step.load)
            reached = stage_free[stage] = max(reached, stage_free[stage]) + seconds
        in_flight.append((reached, step))
        num_steps += 1
        num_rows += step.load.num_rows
    return ServingEstimate(
        seconds=now,
        output_tokens=sum(request.output_tokens for request in workload),
        num_steps=num_steps,
        num_rows=num_rows,
        num_preemptions=batching.num_preemptions,
        num_prefill_tokens=batching.num_prefill_tokens,
    )
