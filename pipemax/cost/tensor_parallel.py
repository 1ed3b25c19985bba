"""Tensor parallelism as vLLM does it, estimated: every GPU has a share of every layer, two all-reduces a layer join
them.

    step = layers x (GEMMs, attention and small kernels of one share + 2 all-reduces of tokens x hidden size) + head

Nothing hides an all-reduce: the next GEMM needs it. One step is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipemax.cost.all_reduce import AllReduce
from pipemax.cost.continuous_batching import BatchingLimits
from pipemax.cost.hardware import PeerLink, ServerProfile
from pipemax.cost.load import StageShape, StepLoad, whole_model
from pipemax.cost.model import CostModel
from pipemax.cost.serving import ServingEstimate, estimate_serving
from pipemax.cost.table import best_cost_model
from pipemax.cost.workload import RequestLengths
from pipemax.model_spec import ModelSpec


class TensorParallelCostModel:
    """Implements `CostModel` for all GPUs of the group together. `share` is one GPU's compute."""

    def __init__(self, *, share: CostModel, all_reduce: AllReduce, hidden_size: int, dtype_bytes: int = 2) -> None:
        self._share = share
        self._all_reduce = all_reduce
        self._token_bytes = hidden_size * dtype_bytes

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """See `CostModel`."""
        if load.num_tokens == 0:
            return 0.0
        all_reduce = self._all_reduce.seconds(load.num_tokens * self._token_bytes)
        return self._share.step_seconds(load, stage) + 2 * stage.num_layers * all_reduce


def estimate_tensor_parallel(
    *,
    model: ModelSpec,
    server: ServerProfile,
    workload: Sequence[RequestLengths],
    limits: BatchingLimits,
    peer_link: PeerLink | None = None,
    dtype_bytes: int = 2,
    kv_read_fraction: float | None = None,
) -> ServingEstimate:
    """All GPUs of the server as one group. `limits.num_blocks` counts blocks over the group.

    peer_link           the way of the all-reduces where it is not the GPUs' best
    kv_read_fraction    of memory bandwidth in decode attention, where the kernel is not the profile's
    """
    cost = TensorParallelCostModel(
        share=best_cost_model(
            model=model,
            gpu=server.gpu,
            dtype_bytes=dtype_bytes,
            shards=server.num_gpus,
            kv_read_fraction=kv_read_fraction,
        ),
        all_reduce=AllReduce.of_server(server, num_gpus=server.num_gpus, peer_link=peer_link),
        hidden_size=model.hidden_size,
        dtype_bytes=dtype_bytes,
    )
    stage = whole_model(model.num_layers)
    return estimate_serving(
        workload=workload,
        limits=limits,
        stage_seconds=lambda load: (cost.step_seconds(load, stage),),
        handover_seconds=lambda load: 0.0,
    )
