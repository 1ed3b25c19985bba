"""`read_gpus`: what NVIDIA's driver says of the GPUs of this machine; `gpu_findings`: what that means.

Facts come through NVML (`nvidia-ml-py`), which needs the driver and nothing else: no CUDA context is made, no memory
of a GPU taken. Never here: measuring (`links.py`), libraries (`software.py`).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipemax.doctor.finding import Finding, Severity

GIB = 1024**3
# The oldest GPUs that FlashInfer's kernels are built for, and the oldest with bfloat16 in their tensor cores.
_MIN_COMPUTE_CAPABILITY = (8, 0)
_TRUSTED_FREE_SHARE = 0.9


class PeerAccess(enum.StrEnum):
    """How a GPU may reach another one's memory."""

    NVLINK = "nvlink"
    PCIE = "pcie"
    NONE = "none"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as the driver sees it. PCIe values are None where the driver does not tell (virtual machines).

    pcie_generation, pcie_lanes           as the link runs now; it may idle at a lower generation
    max_pcie_generation, max_pcie_lanes   what GPU and slot could do together
    replays                               PCIe packets sent again since the driver was loaded: signal trouble
    """

    index: int
    name: str
    memory_bytes: int
    free_memory_bytes: int
    compute_capability: tuple[int, int]
    pcie_generation: int | None
    pcie_lanes: int | None
    max_pcie_generation: int | None
    max_pcie_lanes: int | None
    replays: int | None
    num_processes: int | None


@dataclass(frozen=True, slots=True)
class GpuSurvey:
    """All GPUs. `peers[a][b]`: how a reaches b. `problem` says why there is nothing, "" if there is."""

    driver_version: str
    cuda_version: str
    gpus: tuple[Gpu, ...]
    peers: tuple[tuple[PeerAccess, ...], ...]
    problem: str = ""


def read_gpus() -> GpuSurvey:
    """Asks the driver. Never raises: without driver or GPU the survey is empty and says why."""
    try:
        import pynvml as nvml
    except ImportError:
        return _nothing("the package nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _nothing(str(error))
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        version = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return GpuSurvey(
            driver_version=_text(nvml.nvmlSystemGetDriverVersion()),
            cuda_version=f"{version // 1000}.{version % 1000 // 10}",
            gpus=tuple(_gpu(nvml, index, handle) for index, handle in enumerate(handles)),
            peers=tuple(tuple(_peer(nvml, one, other) for other in handles) for one in handles),
        )
    except nvml.NVMLError as error:
        return _nothing(str(error))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _nothing(problem: str) -> GpuSurvey:
    return GpuSurvey("", "", (), (), problem)


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    def told(ask: Callable[[Any], Any]) -> Any:
        """None where this driver or card does not answer."""
        try:
            return ask(handle)
        except nvml.NVMLError:
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    processes = told(nvml.nvmlDeviceGetComputeRunningProcesses)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=memory.total,
        free_memory_bytes=memory.free,
        compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        pcie_generation=told(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
        pcie_lanes=told(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        max_pcie_generation=told(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        max_pcie_lanes=told(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        replays=told(nvml.nvmlDeviceGetPcieReplayCounter),
        num_processes=None if processes is None else len(processes),
    )


def _peer(nvml: Any, one: Any, other: Any) -> PeerAccess:
    if one is other:
        return PeerAccess.NONE
    try:
        if nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            return PeerAccess.NVLINK
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_READ)
        return PeerAccess.PCIE if status == nvml.NVML_P2P_STATUS_OK else PeerAccess.NONE
    except nvml.NVMLError:
        return PeerAccess.UNKNOWN


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def gpu_findings(survey: GpuSurvey) -> list[Finding]:
    """What the survey means for a job."""
    if not survey.gpus:
        return [
            Finding(
                "GPUs",
                Severity.NOTE,
                f"none ({survey.problem})" if survey.problem else "none",
                "jobs run on the CPU: right answers, for trying things out",
                "install NVIDIA's driver if there is a GPU in this machine",
            )
        ]
    findings = [_models(survey.gpus)]
    for gpu in survey.gpus:
        findings += _one_gpu(gpu)
    if len(survey.gpus) > 1:
        findings.append(_peers(survey.peers))
    return findings


def _models(gpus: Sequence[Gpu]) -> Finding:
    names = sorted({gpu.name for gpu in gpus})
    found = ", ".join(
        f"{sum(gpu.name == name for gpu in gpus)} x {name} "
        f"({min(gpu.memory_bytes for gpu in gpus if gpu.name == name) / GIB:.0f} GiB)"
        for name in names
    )
    if len(names) > 1:
        return Finding(
            "GPUs",
            Severity.COSTS,
            found,
            "stages get equal shares of the layers, so the slowest and the smallest GPU set the pace",
            "choose equal ones with CUDA_VISIBLE_DEVICES",
        )
    return Finding("GPUs", Severity.GOOD, found, f"{stages_for(len(gpus))}: --pipeline-parallel-size {len(gpus)}")


def stages_for(num_gpus: int) -> str:
    """How many stages find a GPU each, in words."""
    return f"up to {num_gpus} stages" if num_gpus > 1 else "one stage"


def _one_gpu(gpu: Gpu) -> list[Finding]:
    subject = f"GPU {gpu.index}"
    findings = []
    if gpu.compute_capability < _MIN_COMPUTE_CAPABILITY:
        capability = ".".join(map(str, gpu.compute_capability))
        findings.append(
            Finding(
                f"{subject} generation",
                Severity.COSTS,
                f"compute capability {capability}",
                "no fast bfloat16 and no FlashInfer kernels before 8.0",
                "use --dtype float16, or GPUs of the Ampere generation or later",
            )
        )
    if gpu.free_memory_bytes < _TRUSTED_FREE_SHARE * gpu.memory_bytes:
        processes = "" if gpu.num_processes is None else f", {gpu.num_processes} processes on it"
        findings.append(
            Finding(
                f"{subject} memory",
                Severity.COSTS,
                f"{gpu.free_memory_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB free{processes}",
                "every stage gets as many KV blocks as the fullest GPU can hold",
                "end what else runs on it (nvidia-smi shows it)",
            )
        )
    findings.append(_pcie(gpu))
    if gpu.replays:
        findings.append(
            Finding(
                f"{subject} PCIe errors",
                Severity.COSTS,
                f"{gpu.replays:,} packets were sent again",
                "a bad riser, slot or signal: copies get slower, and the machine may freeze under load",
                "reseat the card; set the slot to one PCIe generation less in the BIOS; watch nvidia-smi -q",
            )
        )
    return findings


def _pcie(gpu: Gpu) -> Finding:
    subject = f"GPU {gpu.index} PCIe"
    now, most = (gpu.pcie_generation, gpu.pcie_lanes), (gpu.max_pcie_generation, gpu.max_pcie_lanes)
    if now[1] is None or most[1] is None:
        return Finding(subject, Severity.NOTE, "the driver does not tell", "measured rates say what the link can do")
    found = f"generation {now[0]} x{now[1]} now, {most[0]} x{most[1]} at most"
    if now[1] < most[1]:
        return Finding(
            subject,
            Severity.COSTS,
            found,
            f"{now[1]} of {most[1]} lanes: KV comes back at {now[1] / most[1]:.0%} of the rate",
            "put the card in a slot with all lanes; check risers and the BIOS's lane split",
        )
    if now[0] is not None and most[0] is not None and now[0] < most[0]:
        return Finding(
            subject,
            Severity.NOTE,
            found,
            "an idle link saves power at a lower generation; under load it should come up",
            "compare the measured rates; if they are low, set the slot's generation in the BIOS",
        )
    return Finding(subject, Severity.GOOD, found, "the link runs as fast as card and slot can")


def _peers(peers: Sequence[Sequence[PeerAccess]]) -> Finding:
    pairs = [peers[a][b] for a in range(len(peers)) for b in range(len(peers)) if a != b]
    subject = "GPU to GPU"
    if all(pair is PeerAccess.NVLINK for pair in pairs):
        return Finding(
            subject,
            Severity.NOTE,
            "NVLink between all of them",
            "tensor parallelism is cheap here: an engine that uses it may be as fast as this one",
            "compare before you decide",
        )
    if PeerAccess.NONE in pairs:
        return Finding(
            subject,
            Severity.GOOD,
            f"no peer access between {sum(pair is PeerAccess.NONE for pair in pairs) // 2} of {len(pairs) // 2} pairs",
            "activations pass through host memory; this engine sends few of them, it is made for such machines",
        )
    if PeerAccess.UNKNOWN in pairs:
        return Finding(subject, Severity.NOTE, "the driver does not tell", "activations go the way that NCCL finds")
    return Finding(subject, Severity.GOOD, "peer access over PCIe", "activations go from GPU to GPU directly")
