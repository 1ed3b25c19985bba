"""`Layout`: a way to put a model on a server; `candidate_layouts` lists those that are worth a comparison.

    pipeline    R replicas of N stages, KV travelling or not, a phase policy      simulated, with PipeMax's scheduler
    tensor      R replicas of N GPUs that share every layer, over the best link   estimated, as vLLM would run it
                between GPUs or over host memory

Each replica has its share of the GPUs, of host memory and of the requests. Never here: running them (`compare.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.hardware import HardwareProfile, PeerLink, ServerProfile


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """`num_stages` GPUs a replica, one stage each."""

    num_replicas: int
    num_stages: int
    kv_offload: KVOffload
    phase_policy: PhasePolicyName

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.num_stages

    def __str__(self) -> str:
        offload = ", offload" if self.kv_offload is KVOffload.ON else ""
        return f"{_replicas(self.num_replicas)}PP {self.num_stages}{offload}, {self.phase_policy}"


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """`num_shards` GPUs a replica; `peer_link` is the way of the all-reduces."""

    num_replicas: int
    num_shards: int
    peer_link: PeerLink

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.num_shards

    def __str__(self) -> str:
        links = {PeerLink.HOST_MEMORY: "no P2P", PeerLink.PCIE: "P2P over PCIe", PeerLink.NVLINK: "NVLink"}
        link = f", {links[self.peer_link]}" if self.num_shards > 1 else ""
        return f"{_replicas(self.num_replicas)}TP {self.num_shards}{link}"


Layout = PipelineLayout | TensorLayout


def _replicas(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def candidate_layouts(gpu: HardwareProfile, num_gpus: int) -> tuple[Layout, ...]:
    """One pipeline over all GPUs with and without offloading under every phase policy; replicas of shorter ones with
    everything on; tensor parallelism over all and over fewer GPUs, with P2P where the card has it and without."""
    pipelines = [
        PipelineLayout(1, num_gpus, offload, policy) for offload in reversed(KVOffload) for policy in PhasePolicyName
    ]
    sizes = [size for size in range(num_gpus, 0, -1) if num_gpus % size == 0]
    pipelines += [
        PipelineLayout(num_gpus // size, size, KVOffload.ON, PhasePolicyName.AUTO) for size in sizes if size < num_gpus
    ]
    links = [PeerLink.HOST_MEMORY] + [gpu.peer_link] * (gpu.peer_link is not PeerLink.HOST_MEMORY)
    tensors = [TensorLayout(num_gpus // size, size, link) for size in sizes if size > 1 for link in links]
    return (*pipelines, *tensors)


def replica_server(server: ServerProfile, num_replicas: int) -> ServerProfile:
    """One replica's part of a server on which all replicas run: its GPUs, its shares of host memory and bandwidth.

    Links stay as they are: a GPU's share of the host's bandwidth was taken with every GPU copying.
    """
    assert server.num_gpus % num_replicas == 0
    return dataclasses.replace(
        server,
        num_gpus=server.num_gpus // num_replicas,
        host_memory_gib=server.host_memory_gib / num_replicas,
        host_memory_bytes_per_second=server.host_memory_bytes_per_second / num_replicas,
    )
