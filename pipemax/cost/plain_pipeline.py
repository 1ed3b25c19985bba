"""A pipeline as vLLM runs it, estimated: layers cut over the GPUs, as many batches in flight, KV on the GPUs only.

No phases, no balance between batches, no offloading: prompts are chunked into the steps as they come. What PipeMax does
instead is not estimated but simulated, with its own scheduler (`executor/simulator.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipemax.cost.continuous_batching import BatchingLimits
from pipemax.cost.hardware import ServerProfile
from pipemax.cost.load import StepLoad, even_stages
from pipemax.cost.serving import ServingEstimate, estimate_serving
from pipemax.cost.table import best_cost_model
from pipemax.cost.workload import RequestLengths
from pipemax.model_spec import ModelSpec


def estimate_plain_pipeline(
    *,
    model: ModelSpec,
    server: ServerProfile,
    workload: Sequence[RequestLengths],
    limits: BatchingLimits,
    dtype_bytes: int = 2,
    kv_read_fraction: float | None = None,
) -> ServingEstimate:
    """One stage a GPU. `limits.num_blocks` counts blocks of one stage, which all batches share."""
    cost = best_cost_model(model=model, gpu=server.gpu, dtype_bytes=dtype_bytes, kv_read_fraction=kv_read_fraction)
    stages = even_stages(model.num_layers, server.num_gpus)
    # Hidden states and residual travel apart.
    token_bytes = 2 * model.hidden_size * dtype_bytes
    link = server.stage_link

    def handover_seconds(load: StepLoad) -> float:
        return link.latency_seconds + load.num_tokens * token_bytes / link.bytes_per_second

    return estimate_serving(
        workload=workload,
        limits=limits,
        stage_seconds=lambda load: [cost.step_seconds(load, stage) for stage in stages],
        handover_seconds=handover_seconds,
    )
