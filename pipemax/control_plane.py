"""`build_scheduler`: wires the control plane. Real and simulated runs call the same function, so they decide alike."""

from __future__ import annotations

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.forecast import Forecast
from pipemax.plan import Capacity
from pipemax.scheduling.balancer import Balancer
from pipemax.scheduling.output_length import OutputLengthEstimate
from pipemax.scheduling.phase import Auto, Disaggregated, Mixed, PhasePolicy
from pipemax.scheduling.scheduler import Scheduler
from pipemax.scheduling.turns import Turns
from pipemax.scheduling.window_size import WindowSize


def build_scheduler(
    *,
    capacity: Capacity,
    num_batches: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    async_scheduling: bool,
    phase_policy: PhasePolicyName,
    kv_offload: KVOffload,
    forecast: Forecast,
) -> Scheduler:
    """A scheduler for an executor of that capacity. Parameters are named and meant as in `EngineConfig`."""
    return Scheduler(
        capacity=capacity,
        num_batches=num_batches,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_plans_per_batch=2 if async_scheduling else 1,
        phase_policy=_phase_policy(
            phase_policy,
            forecast=forecast,
            num_stages=capacity.num_stages,
            max_num_batched_tokens=max_num_batched_tokens,
        ),
        balancer=Balancer(num_batches=num_batches, max_rows=max_num_seqs),
        turns=Turns(),
        window_size=WindowSize(
            forecast=forecast,
            num_device_blocks=capacity.num_device_blocks,
            num_batches=num_batches,
            max_num_seqs=max_num_seqs,
        ),
        forecast=forecast,
        output_length=OutputLengthEstimate(),
        offload=kv_offload,
    )


def _phase_policy(
    name: PhasePolicyName, *, forecast: Forecast, num_stages: int, max_num_batched_tokens: int
) -> PhasePolicy:
    match name:
        case PhasePolicyName.DISAGGREGATED:
            return Disaggregated(
                forecast=forecast, num_stages=num_stages, max_num_batched_tokens=max_num_batched_tokens
            )
        case PhasePolicyName.MIXED:
            return Mixed(forecast=forecast, max_num_batched_tokens=max_num_batched_tokens)
        case PhasePolicyName.AUTO:
            return Auto(forecast=forecast, num_stages=num_stages, max_num_batched_tokens=max_num_batched_tokens)
