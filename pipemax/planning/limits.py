"""`limits`: what a pipeline on a server is short of: the gain in throughput from a tenth more of each resource.

By the sums of `cost/steady_state.py`, each resource scaled up alone. The first of the list is the limit. No simulation.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from pipemax.config import KVOffload
from pipemax.cost.hardware import HardwareProfile, HostLink, ServerProfile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.cost.steady_state import KVSpace, SteadyState
from pipemax.cost.workload import MeanLengths
from pipemax.model_spec import ModelSpec
from pipemax.planning.simulate import PipelineSettings, plan_pipeline

_MORE = 1.1


class Resource(enum.StrEnum):
    """What there can be too little of. Values are words of a report."""

    WEIGHTS = "reading weights (GPU memory bandwidth)"
    KV_READING = "reading KV (GPU memory bandwidth)"
    COMPUTE = "compute (tensor cores)"
    KV_MEMORY = "KV memory (GPU memory left beside weights)"
    HOST_MEMORY = "host memory (homes of KV blocks)"
    LINK = "host link (copies of the window)"
    ROWS = "rows (requests, or max_num_seqs)"


@dataclass(frozen=True, slots=True)
class Gain:
    """`share` of throughput that a tenth more of the resource gives: 0.05 is 5 % more."""

    resource: Resource
    share: float


def limits(
    *, model: ModelSpec, server: ServerProfile, settings: PipelineSettings, lengths: MeanLengths, num_requests: int
) -> tuple[Gain, ...]:
    """The largest gain first. Raises ConfigError when the model does not fit."""
    plan = plan_pipeline(model=model, server=server, settings=settings, lengths=lengths, num_requests=num_requests)
    capacity = plan.capacity
    gpu, link = server.gpu, server.host_link
    rows = min(settings.max_num_seqs, max(1.0, num_requests / server.num_gpus))

    def request_seconds(
        *,
        gpu: HardwareProfile = gpu,
        link: HostLink = link,
        device_blocks: float = capacity.num_device_blocks,
        host_blocks: float = capacity.num_host_blocks,
        max_rows: float = rows,
    ) -> float:
        cost = RooflineCostModel(
            model=model, gpu=gpu, dtype_bytes=settings.dtype_bytes, kv_dtype_bytes=settings.kv_dtype_bytes
        )
        state = SteadyState.of(
            cost=cost,
            stages=plan.stages,
            space=KVSpace(int(device_blocks), int(host_blocks), capacity.block_size, capacity.block_bytes),
            num_batches=server.num_gpus,
            max_rows=max_rows,
            prefill_tokens=settings.max_num_batched_tokens,
            lengths=lengths,
            host_link=link if settings.kv_offload is KVOffload.ON else None,
        )
        return state.request_seconds

    now = request_seconds()
    scaled = {
        Resource.WEIGHTS: request_seconds(gpu=dataclasses.replace(gpu, memory_fraction=gpu.memory_fraction * _MORE)),
        Resource.KV_READING: request_seconds(
            gpu=dataclasses.replace(gpu, kv_read_fraction=gpu.kv_read_fraction * _MORE)
        ),
        Resource.COMPUTE: request_seconds(
            gpu=dataclasses.replace(gpu, tensor_flops_per_second=gpu.tensor_flops_per_second * _MORE)
        ),
        Resource.KV_MEMORY: request_seconds(device_blocks=capacity.num_device_blocks * _MORE),
        Resource.HOST_MEMORY: request_seconds(host_blocks=capacity.num_host_blocks * _MORE),
        Resource.LINK: request_seconds(
            gpu=dataclasses.replace(gpu, host_link=_faster(gpu.host_link)), link=_faster(link)
        ),
        Resource.ROWS: request_seconds(max_rows=rows * _MORE),
    }
    gains = [Gain(resource, max(0.0, now / seconds - 1)) for resource, seconds in scaled.items()]
    return tuple(sorted(gains, key=lambda gain: -gain.share))


def _faster(link: HostLink) -> HostLink:
    return dataclasses.replace(
        link,
        up_bytes_per_second=link.up_bytes_per_second * _MORE,
        down_bytes_per_second=link.down_bytes_per_second * _MORE,
        duplex_bytes_per_second=link.duplex_bytes_per_second * _MORE,
    )
