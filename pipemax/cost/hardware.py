"""`HardwareProfile` and `ServerProfile`: what a GPU and a server can do, in bytes and operations a second.

Figures come from `profiles.py`; here is what they mean and how a server follows from its GPUs. Never here: models,
steps.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

GIB = 1 << 30


class PeerLink(enum.StrEnum):
    """How two GPUs of a server reach each other at best."""

    HOST_MEMORY = "host-memory"
    PCIE = "pcie"
    NVLINK = "nvlink"


@dataclass(frozen=True, slots=True)
class HostLink:
    """Copies between a GPU and pinned host memory, bytes a second in pieces of 1 MiB and more.

    up: host to device; down: device to host; duplex: each way while both ways are busy. What is copied uses memory and
    link that compute beside it and its messages want as well: `compute_seconds_per_byte` is what a step loses by it.
    """

    up_bytes_per_second: float
    down_bytes_per_second: float
    duplex_bytes_per_second: float
    compute_seconds_per_byte: float = 0.0

    def up_seconds(self, up_bytes: float, down_bytes: float) -> float:
        """Time for `up_bytes` when `down_bytes` start at the same moment in the other direction."""
        return _duplex_seconds(up_bytes, down_bytes, self.up_bytes_per_second, self.duplex_bytes_per_second)

    def down_seconds(self, up_bytes: float, down_bytes: float) -> float:
        """Time for `down_bytes` when `up_bytes` start at the same moment in the other direction."""
        return _duplex_seconds(down_bytes, up_bytes, self.down_bytes_per_second, self.duplex_bytes_per_second)


def _duplex_seconds(this: float, other: float, alone: float, duplex: float) -> float:
    shared = min(this, other)
    return shared / duplex + (this - shared) / alone


@dataclass(frozen=True, slots=True)
class StageLink:
    """From one stage to the next: a message of n bytes takes latency_seconds + n / bytes_per_second."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One GPU.

    memory_gib                          what CUDA reports as the total
    memory_bytes_per_second             of the data sheet
    tensor_flops_per_second             of the data sheet: dense bfloat16, accumulated in float32
    memory_fraction                     of memory_bytes_per_second that GEMMs of a few rows reach
    tensor_fraction                     of tensor_flops_per_second that large GEMMs reach
    kv_read_fraction                    of memory_bytes_per_second that paged decode attention reaches
    attention_fraction                  of tensor_flops_per_second that prefill attention reaches
    host_link                           this GPU copying alone
    peer_link, peer_bytes_per_second    the best way to another GPU of the server, one direction
    source                              where the figures are from, and which are derived
    """

    name: str
    memory_gib: float
    memory_bytes_per_second: float
    tensor_flops_per_second: float
    memory_fraction: float
    tensor_fraction: float
    kv_read_fraction: float
    attention_fraction: float
    pcie_generation: int
    pcie_lanes: int
    host_link: HostLink
    peer_link: PeerLink
    peer_bytes_per_second: float
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProfile:
    """One server of equal GPUs.

    host_memory_gib                 main memory
    host_memory_bytes_per_second    what all copies together can read and write there
    host_link                       one GPU's share while every GPU copies
    stage_link                      from a stage to the next one
    """

    gpu: HardwareProfile
    num_gpus: int
    host_memory_gib: float
    host_memory_bytes_per_second: float
    host_link: HostLink
    stage_link: StageLink


def shared_host_link(link: HostLink, *, num_gpus: int, host_memory_bytes_per_second: float) -> HostLink:
    """What is left of each GPU's link when `num_gpus` copy at once out of the same host memory."""
    share = host_memory_bytes_per_second / num_gpus
    return dataclasses.replace(
        link,
        up_bytes_per_second=min(link.up_bytes_per_second, share),
        down_bytes_per_second=min(link.down_bytes_per_second, share),
        duplex_bytes_per_second=min(link.duplex_bytes_per_second, share / 2),
    )
