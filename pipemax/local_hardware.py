"""`local_server`: the profile of the machine that this process runs on, where estimates of step times start.

Only a start: the forecast corrects both compute and link by what steps really take, so a card without a profile
begins as a similar one. Never here: profiles themselves (`cost/profiles.py`), what the user is told of the machine
(`doctor/`).
"""

from __future__ import annotations

from pipemax.cost.hardware import HardwareProfile, HostLink, PeerLink, ServerProfile, StageLink
from pipemax.cost.profiles import gpu_names, server_profile
from pipemax.doctor.gpus import read_gpus
from pipemax.executor.sizing import GIB, free_host_bytes

# The driver's name holds all words of the profile's, whatever stands between; the first that fits counts.
_GPU_WORDS: tuple[tuple[str, str], ...] = (
    ("3090", "rtx-3090"),
    ("4090", "rtx-4090"),
    ("5090", "rtx-5090"),
    ("L20", "l20"),
    ("L40S", "l40s"),
    ("A100-PCIE-40", "a100-pcie-40gb"),
    ("A100", "a100-pcie-80gb"),
    ("H200", "h200"),
    ("H100 PCIe", "h100-pcie"),
    ("H100", "h100-sxm"),
    ("A10", "a10"),
)
_SIMILAR = "l40s"


def local_server(device: str, *, num_stages: int, host_memory_gib: float) -> ServerProfile:
    """`device` is "cpu" or "cuda", as the executor resolved it."""
    if device == "cpu":
        return _cpu_server(num_stages, host_memory_gib)
    gpus = read_gpus().gpus
    return server_profile(profile_name(gpus[0].name if gpus else ""), num_stages, host_memory_gib=host_memory_gib)


def this_server(device: str, *, num_stages: int) -> ServerProfile:
    """As above, with the host memory that is free now."""
    return local_server(device, num_stages=num_stages, host_memory_gib=free_host_bytes() / GIB)


def profile_name(driver_name: str) -> str:
    """ "NVIDIA GeForce RTX 4090" to "rtx-4090"; a card without a profile to that of a similar one."""
    for words, name in _GPU_WORDS:
        if words in driver_name:
            assert name in gpu_names()
            return name
    return _SIMILAR


def _cpu_server(num_stages: int, host_memory_gib: float) -> ServerProfile:
    link = HostLink(4e9, 4e9, 2e9)
    cpu = HardwareProfile(
        name="cpu",
        memory_gib=host_memory_gib,
        memory_bytes_per_second=10e9,
        tensor_flops_per_second=50e9,
        memory_fraction=1.0,
        tensor_fraction=1.0,
        kv_read_fraction=0.5,
        attention_fraction=0.5,
        pcie_generation=0,
        pcie_lanes=0,
        host_link=link,
        peer_link=PeerLink.HOST_MEMORY,
        peer_bytes_per_second=4e9,
        source="order of magnitude of two cores; corrected by the first steps",
    )
    return ServerProfile(
        gpu=cpu,
        num_gpus=num_stages,
        host_memory_gib=host_memory_gib,
        host_memory_bytes_per_second=10e9,
        host_link=link,
        stage_link=StageLink(100e-6, 1e9),
    )
