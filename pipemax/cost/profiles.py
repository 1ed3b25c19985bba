"""Figures of GPUs and servers, each with its source; `server_profile` makes a server of them.

Data only. "Sheet": NVIDIA's data sheet or white paper of the card. "Measured": on a server with two H100 SXM 80 GB,
PCIe 5 x16 each, torch 2.11. "Derived": carried over from another card, so to be measured before it is trusted.

GeForce cards multiply bfloat16 with float32 accumulation at half the rate of the headline figure (which is for float16
accumulation); the figure here is the half. Data-centre cards have one rate. Figures with sparsity are twice as high and
never apply.
"""

from __future__ import annotations

import dataclasses

from pipemax.config import ConfigError
from pipemax.cost.hardware import HardwareProfile, HostLink, PeerLink, ServerProfile, StageLink, shared_host_link

# One H100 copying alone: 54.6 up, 54.4 down, 41.2 each way at once.
_PCIE5_X16 = HostLink(54.6e9, 54.4e9, 41.2e9)
# Derived: pinned copies reach 25 GB/s of PCIe 4 x16's 31.5; both ways at once as on PCIe 5.
_PCIE4_X16 = HostLink(25e9, 25e9, 25e9 * 41.2 / 54.6)

# PCIe peer copies pass the bus once: derived, as 0.8 of a copy to the host.
_PCIE_PEER_FRACTION = 0.8

# Prefill attention of the fa2 kernels reaches about half of what GEMMs reach: derived, everywhere.
_ATTENTION_OF_GEMM = 0.5


def _pcie_card(
    name: str,
    *,
    memory_gib: float,
    memory_gbytes_per_second: float,
    tensor_tflops: float,
    memory_fraction: float,
    tensor_fraction: float,
    kv_read_fraction: float,
    pcie_generation: int,
    peers: bool,
    source: str,
) -> HardwareProfile:
    link = _PCIE5_X16 if pcie_generation == 5 else _PCIE4_X16
    return HardwareProfile(
        name=name,
        memory_gib=memory_gib,
        memory_bytes_per_second=memory_gbytes_per_second * 1e9,
        tensor_flops_per_second=tensor_tflops * 1e12,
        memory_fraction=memory_fraction,
        tensor_fraction=tensor_fraction,
        kv_read_fraction=kv_read_fraction,
        attention_fraction=tensor_fraction * _ATTENTION_OF_GEMM,
        pcie_generation=pcie_generation,
        pcie_lanes=16,
        host_link=link,
        peer_link=PeerLink.PCIE if peers else PeerLink.HOST_MEMORY,
        peer_bytes_per_second=_PCIE_PEER_FRACTION * link.up_bytes_per_second if peers else 0.0,
        source=source,
    )


def _sxm_card(name: str, *, memory_gib: float, memory_gbytes_per_second: float, source: str) -> HardwareProfile:
    return HardwareProfile(
        name=name,
        memory_gib=memory_gib,
        memory_bytes_per_second=memory_gbytes_per_second * 1e9,
        tensor_flops_per_second=989.4e12,
        memory_fraction=0.836,
        tensor_fraction=0.728,
        kv_read_fraction=0.45,
        attention_fraction=0.728 * _ATTENTION_OF_GEMM,
        pcie_generation=5,
        pcie_lanes=16,
        host_link=_PCIE5_X16,
        peer_link=PeerLink.NVLINK,
        peer_bytes_per_second=450e9,
        source=source,
    )


_PROFILES = {
    profile.name: profile
    for profile in (
        _pcie_card(
            "rtx-3090",
            memory_gib=23.7,
            memory_gbytes_per_second=936,
            tensor_tflops=71,
            memory_fraction=0.9,
            tensor_fraction=0.95,
            kv_read_fraction=0.75,
            pcie_generation=4,
            peers=False,
            source="GA102 white paper v2 (71 of 142 TFLOP/s); memory: CUDA out-of-memory messages (23.68 GiB); no P2P "
            "with stock drivers, NVLink bridges in pairs not assumed; fractions derived (as RTX 5090)",
        ),
        _pcie_card(
            "rtx-4090",
            memory_gib=23.6,
            memory_gbytes_per_second=1008,
            tensor_tflops=165.2,
            memory_fraction=0.9,
            tensor_fraction=0.95,
            kv_read_fraction=0.75,
            pcie_generation=4,
            peers=False,
            source="Ada white paper (165.2 of 330.3 TFLOP/s); memory: CUDA out-of-memory messages (23.52 to "
            "23.65 GiB); no P2P with stock drivers; fractions derived (as RTX 5090)",
        ),
        _pcie_card(
            "rtx-5090",
            memory_gib=31.4,
            memory_gbytes_per_second=1792,
            tensor_tflops=209.5,
            memory_fraction=0.9,
            tensor_fraction=1.0,
            kv_read_fraction=0.7,
            pcie_generation=5,
            peers=False,
            source="RTX Blackwell white paper (209.5 of 419 TFLOP/s); memory: CUDA out-of-memory messages (31.37 GiB); "
            "tensor fraction: 224 TFLOP/s of torch.matmul (main-horse.github.io/posts/5090-mm-perf), above the sheet "
            "because the card boosts higher; no P2P with stock drivers; other fractions derived",
        ),
        _pcie_card(
            "l20",
            memory_gib=44.5,
            memory_gbytes_per_second=864,
            tensor_tflops=119.5,
            memory_fraction=0.85,
            tensor_fraction=0.9,
            kv_read_fraction=0.75,
            pcie_generation=4,
            peers=True,
            source="sheet (119.5 TFLOP/s, 864 GB/s, PCIe 4); tensor fraction: cuBLAS at 105 to 115 TFLOP/s (CUDA-Learn-"
            "Notes); P2P works but is no faster than host memory on some servers (NVIDIA/nccl#1817); memory and other "
            "fractions derived (ECC takes a sixteenth)",
        ),
        _pcie_card(
            "l40s",
            memory_gib=44.5,
            memory_gbytes_per_second=864,
            tensor_tflops=362.05,
            memory_fraction=0.85,
            tensor_fraction=0.65,
            kv_read_fraction=0.75,
            pcie_generation=4,
            peers=True,
            source="sheet (362.05 TFLOP/s dense, 864 GB/s, PCIe 4); memory and fractions derived (350 W limit GEMMs)",
        ),
        _pcie_card(
            "a10",
            memory_gib=22.1,
            memory_gbytes_per_second=600,
            tensor_tflops=125,
            memory_fraction=0.85,
            tensor_fraction=0.55,
            kv_read_fraction=0.75,
            pcie_generation=4,
            peers=True,
            source="sheet (125 TFLOP/s dense, 600 GB/s, PCIe 4); memory and fractions derived (150 W limit GEMMs)",
        ),
        _pcie_card(
            "a100-pcie-40gb",
            memory_gib=39.4,
            memory_gbytes_per_second=1555,
            tensor_tflops=312,
            memory_fraction=0.85,
            tensor_fraction=0.8,
            kv_read_fraction=0.6,
            pcie_generation=4,
            peers=True,
            source="sheet; memory: CUDA out-of-memory messages (39.5 GiB); NVLink bridges in pairs not assumed; "
            "fractions derived",
        ),
        _pcie_card(
            "a100-pcie-80gb",
            memory_gib=79.1,
            memory_gbytes_per_second=1935,
            tensor_tflops=312,
            memory_fraction=0.85,
            tensor_fraction=0.8,
            kv_read_fraction=0.6,
            pcie_generation=4,
            peers=True,
            source="sheet; memory: CUDA out-of-memory messages (79.14 GiB); NVLink bridges in pairs not assumed; "
            "fractions derived",
        ),
        _pcie_card(
            "h100-pcie",
            memory_gib=79.1,
            memory_gbytes_per_second=2039,
            tensor_tflops=756,
            memory_fraction=0.85,
            tensor_fraction=0.65,
            kv_read_fraction=0.55,
            pcie_generation=5,
            peers=True,
            source="sheet (1,513 TFLOP/s with sparsity); NVLink bridges in pairs not assumed; fractions derived",
        ),
        _sxm_card(
            "h100-sxm",
            memory_gib=79.2,
            memory_gbytes_per_second=3350,
            source="sheet; fractions measured: GEMMs of one decoder layer (fit over 60 points, docs/cost-model.md), "
            "FlashInfer 0.6.14 fa2 decode over pages of 16 tokens at 1,520 GB/s; NVLink 450 GB/s each way",
        ),
        _sxm_card(
            "h200",
            memory_gib=139.8,
            memory_gbytes_per_second=4800,
            source="sheet; fractions derived (as H100 SXM)",
        ),
    )
}

# What all copies together move through host memory, by PCIe generation of the server.
_HOST_MEMORY_BYTES_PER_SECOND = {
    # Derived: two sockets, 8 channels of DDR4-3200 each, 409.6 GB/s, of which 0.73 as below.
    4: 0.73 * 409.6e9,
    # Eight RTX 5090 on two 8-channel DDR5-4800 sockets ran an all-reduce at 28 GB/s of bus bandwidth
    # (NVIDIA/nccl#1639): each GPU writes and reads at that rate, and so does its neighbour: 8 x 2 x 28 GB/s = 448 GB/s,
    # 0.73 of 614 GB/s.
    5: 448e9,
}

# Measured with P2P off: 33 GB/s against 54.6 of the host link, 90 us for small messages.
_HOST_MEMORY_STAGE_FRACTION = 33 / 54.6
_STAGE_LATENCY_SECONDS = 90e-6
# What a step loses by a byte copied beside it, in bytes that it would read itself at the data sheet's rate. Measured on
# two H200 with refills of 0.3 to 1.2 GB a step: compute takes longer by 2 to 6; with what messages between stages are
# held up, a whole job by 6.5 (docs/lab-notes.md, "Where a step's time goes", "What offloading is worth"). Of other
# cards, and of blocks that go home, it is not known.
_COPY_COST = 5.0


def gpu_names() -> tuple[str, ...]:
    """Names that `gpu_profile` knows, sorted."""
    return tuple(sorted(_PROFILES))


def gpu_profile(name: str) -> HardwareProfile:
    """The profile of that name. Raises ConfigError that lists the names when there is none."""
    profile = _PROFILES.get(name.lower())
    if profile is None:
        raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(gpu_names())}")
    return profile


def server_profile(gpu_name: str, num_gpus: int, *, host_memory_gib: float = 512.0) -> ServerProfile:
    """A server of `num_gpus` such cards, each on its own x16 slots, with the host memory usual for its PCIe generation.

    Stages hand over through host memory unless NVLink joins them. Raises ConfigError for an unknown GPU or sizes below
    1.
    """
    gpu = gpu_profile(gpu_name)
    if num_gpus < 1:
        raise ConfigError(f"num_gpus must be at least 1, got {num_gpus}")
    if not host_memory_gib > 0:
        raise ConfigError(f"host_memory_gib must be above 0, got {host_memory_gib:g}")
    host_memory = _HOST_MEMORY_BYTES_PER_SECOND[gpu.pcie_generation]
    stage_rate = _HOST_MEMORY_STAGE_FRACTION * gpu.host_link.up_bytes_per_second
    if gpu.peer_link is PeerLink.NVLINK:
        stage_rate = gpu.peer_bytes_per_second / 2
    return ServerProfile(
        gpu=gpu,
        num_gpus=num_gpus,
        host_memory_gib=host_memory_gib,
        host_memory_bytes_per_second=host_memory,
        host_link=_beside_compute(
            shared_host_link(gpu.host_link, num_gpus=num_gpus, host_memory_bytes_per_second=host_memory), gpu
        ),
        stage_link=StageLink(_STAGE_LATENCY_SECONDS, stage_rate),
    )


def measured_h100_pair() -> ServerProfile:
    """The server that the measurements come from, with P2P off: both GPUs copying, stages joined by host memory."""
    gpu = gpu_profile("h100-sxm")
    return ServerProfile(
        gpu=gpu,
        num_gpus=2,
        host_memory_gib=256.0,
        host_memory_bytes_per_second=4 * 30.6e9,
        host_link=_beside_compute(HostLink(49.2e9, 45.0e9, 30.5e9), gpu),
        stage_link=StageLink(_STAGE_LATENCY_SECONDS, 33e9),
    )


def _beside_compute(link: HostLink, gpu: HardwareProfile) -> HostLink:
    return dataclasses.replace(link, compute_seconds_per_byte=_COPY_COST / gpu.memory_bytes_per_second)
