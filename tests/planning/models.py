"""A model and a server so small that a simulated run takes a fraction of a second."""

from __future__ import annotations

import dataclasses

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.hardware import ServerProfile
from pipemax.cost.profiles import server_profile
from pipemax.cost.workload import RequestLengths
from pipemax.head_place import HeadPlace
from pipemax.planning.simulate import PipelineSettings
from tests.cost.models import LLAMA_70B

# On the stage that is short of memory: KV for a few dozen requests.
HEADS = (HeadPlace.LAST,)
MODEL = dataclasses.replace(LLAMA_70B, name="Llama-24-layers", num_layers=24, sliding_windows=(None,) * 24)


def server(num_gpus: int = 2, *, host_memory_gib: float = 512.0) -> ServerProfile:
    """Cards that 12 of the layers nearly fill: KV for a few dozen requests."""
    return server_profile("rtx-4090", num_gpus, host_memory_gib=host_memory_gib)


def workload(num_requests: int) -> tuple[RequestLengths, ...]:
    """Lengths that repeat every 7 and 11 requests; 110 prompt and 60 output tokens on average."""
    return tuple(RequestLengths(20 + 30 * (i % 7), 10 + 10 * (i % 11)) for i in range(num_requests))


def settings(**changes: object) -> PipelineSettings:
    base = PipelineSettings(
        phase_policy=PhasePolicyName.DISAGGREGATED, kv_offload=KVOffload.ON, max_num_seqs=256, heads=HEADS
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]
