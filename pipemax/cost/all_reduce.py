"""`AllReduce`: seconds of an all-reduce over the GPUs of one server. What tensor parallelism pays twice a layer.

    seconds = latency + 2 (n - 1) / n * bytes / bus rate

The form of NCCL's ring; the bus rate is NCCL's "busbw". Latencies are those inside CUDA graphs: no kernel launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipemax.cost.hardware import PeerLink, ServerProfile

# Over host memory, measured on two H100 with P2P off: 226 us for 4 MiB and 2,640 us for 64 MiB give the line; smaller
# messages were measured at the pace of kernel launches (about 100 us) and say nothing. 26 GB/s is 0.476 of the link to
# the host. Eight RTX 5090 reach 28 GB/s (NVIDIA/nccl#1639); tiny messages over eight cards take 42 to 54 us
# (NVIDIA/nccl#1530, #1439).
_HOST_MEMORY_LATENCY_SECONDS = 65e-6
_HOST_MEMORY_LINK_FRACTION = 26 / 54.6
# Over PCIe between peers: four RTX 4090 with a patched driver give 28 us and a line
# (tinygrad/open-gpu-kernel-modules#22).
_PCIE_LATENCY_SECONDS = 28e-6
# Over NVLink: the one-shot kernels that engines use for small messages instead of NCCL (derived); rate measured with
# NCCL, 196 to 232 GB/s of 450.
_NVLINK_LATENCY_SECONDS = 10e-6
_NVLINK_FRACTION = 200 / 450


@dataclass(frozen=True, slots=True)
class AllReduce:
    """See the module. `num_gpus` is n."""

    num_gpus: int
    latency_seconds: float
    bus_bytes_per_second: float

    @classmethod
    def of_server(cls, server: ServerProfile, *, num_gpus: int, peer_link: PeerLink | None = None) -> AllReduce:
        """Over the server's best link between GPUs, or over `peer_link` where that one is switched off."""
        gpu = server.gpu
        match peer_link or gpu.peer_link:
            case PeerLink.NVLINK:
                assert gpu.peer_link is PeerLink.NVLINK
                return cls(num_gpus, _NVLINK_LATENCY_SECONDS, _NVLINK_FRACTION * gpu.peer_bytes_per_second)
            case PeerLink.PCIE:
                assert gpu.peer_link is PeerLink.PCIE
                return cls(num_gpus, _PCIE_LATENCY_SECONDS, gpu.peer_bytes_per_second)
            case PeerLink.HOST_MEMORY:
                # Every GPU writes and reads at the bus rate, and all of it passes through host memory.
                shared = server.host_memory_bytes_per_second / (2 * num_gpus)
                rate = min(_HOST_MEMORY_LINK_FRACTION * gpu.host_link.up_bytes_per_second, shared)
                return cls(num_gpus, _HOST_MEMORY_LATENCY_SECONDS, rate)

    def seconds(self, num_bytes: float) -> float:
        """Of one all-reduce of that many bytes a GPU; 0 for one GPU."""
        if self.num_gpus == 1:
            return 0.0
        return self.latency_seconds + 2 * (self.num_gpus - 1) / self.num_gpus * num_bytes / self.bus_bytes_per_second
