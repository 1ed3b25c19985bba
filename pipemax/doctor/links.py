"""`measure_links`: how fast each GPU copies from and to registered host memory; `link_findings`: what that means.

    alone      up | down | both at once        one GPU after the other
    together   up | both at once               all GPUs at the same time: what a job has

Takes a few seconds and 256 MiB of host and device memory a GPU. Large copies: the rate of the link, not of many small
blocks. Never here: what the driver says of the link (`gpus.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipemax.doctor.finding import Finding, Severity
from pipemax.doctor.gpus import Gpu

if TYPE_CHECKING:
    import torch

_BUFFER_BYTES = 256 * 1024**2
_MEASURED_SECONDS = 0.3
# One lane's bytes a second by PCIe generation, after line coding.
_LANE_RATE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
# Measured: an H100 on PCIe 5 x16 copies 54.6 of 63 GB/s; below this share something is wrong.
_FAIR_SHARE = 0.7
# All GPUs at once against one alone: below this share host memory or a shared switch is the limit.
_FAIR_TOGETHER = 0.8
_STEP_SECONDS = 0.025


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes a second. `duplex` is each way while both ways are busy; `down` None where it was not measured."""

    up: float
    down: float | None
    duplex: float


@dataclass(frozen=True, slots=True)
class LinkSurvey:
    """By GPU: alone, and while all copy (empty with one GPU). `problem` says why there is nothing, "" if there is."""

    alone: tuple[LinkRates, ...]
    together: tuple[LinkRates, ...]
    problem: str = ""


def measure_links() -> LinkSurvey:
    """Copies on every GPU that CUDA shows. Never raises for what CUDA refuses: the survey says it."""
    import torch

    from pipemax.config import ConfigError

    try:
        copiers = [_Copier(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        try:
            alone = tuple(_rates([copier])[0] for copier in copiers)
            together = tuple(_rates(copiers)) if len(copiers) > 1 else ()
        finally:
            for copier in copiers:
                copier.close()
    except (RuntimeError, ConfigError) as error:  # torch's CUDA errors are RuntimeErrors
        return LinkSurvey((), (), (str(error).splitlines() or [repr(error)])[0])
    return LinkSurvey(alone, together)


class _Copier:
    """Buffers and two streams of one GPU; the first half of a buffer goes up, the second down."""

    def __init__(self, device: torch.device) -> None:
        import torch

        from pipemax.worker.host_memory import HostMemory

        torch.cuda.set_device(device)
        self._torch = torch
        self._host = HostMemory(_BUFFER_BYTES)
        self._device_bytes = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, device=device)
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def start(self, *, up: bool, down: bool) -> int:
        """Queues a copy of half the buffer each way asked for; gives the bytes of one way."""
        half = _BUFFER_BYTES // 2
        host, device = self._host.tensor, self._device_bytes
        if up:
            with self._torch.cuda.stream(self._streams[0]):
                device[:half].copy_(host[:half], non_blocking=True)
        if down:
            with self._torch.cuda.stream(self._streams[1]):
                host[half:].copy_(device[half:], non_blocking=True)
        return half

    def wait(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.wait()
        self._host.close()


def _rates(copiers: Sequence[_Copier]) -> list[LinkRates]:
    """Of each copier while all of them copy the same; they are equal, as the slowest ends the measurement."""
    up = _seconds_per_byte(copiers, lambda copier: copier.start(up=True, down=False))
    down = _seconds_per_byte(copiers, lambda copier: copier.start(up=False, down=True)) if len(copiers) == 1 else None
    duplex = _seconds_per_byte(copiers, lambda copier: copier.start(up=True, down=True))
    rates = LinkRates(1 / up, None if down is None else 1 / down, 1 / duplex)
    return [rates for _ in copiers]


def _seconds_per_byte(copiers: Sequence[_Copier], start: Callable[[_Copier], int]) -> float:
    for copier in copiers:  # the link wakes up
        start(copier)
        copier.wait()
    copied_bytes, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _MEASURED_SECONDS:
        for _ in range(4):
            for copier in copiers:
                num_bytes = start(copier)
            copied_bytes += num_bytes
        for copier in copiers:
            copier.wait()
    return (time.perf_counter() - begin) / copied_bytes


def link_findings(survey: LinkSurvey, gpus: Sequence[Gpu]) -> list[Finding]:
    """What the rates mean. GPUs that CUDA does not show have none; `gpus` are those of the driver, in its order."""
    if survey.problem:
        return [
            Finding(
                "host link",
                Severity.BLOCKS,
                survey.problem,
                "host memory cannot be registered with a GPU and copied: no KV block can go home",
                "see locked memory and host memory above",
            )
        ]
    findings = [_alone(index, rates, _gpu(gpus, index)) for index, rates in enumerate(survey.alone)]
    if survey.together:
        findings.append(_together(survey))
    return findings


def _gpu(gpus: Sequence[Gpu], index: int) -> Gpu | None:
    return gpus[index] if index < len(gpus) else None


def _alone(index: int, rates: LinkRates, gpu: Gpu | None) -> Finding:
    found = (
        f"{rates.up / 1e9:.1f} GB/s up, {(rates.down or 0) / 1e9:.1f} down, {rates.duplex / 1e9:.1f} each way at once"
    )
    meaning = f"in a decode step of 25 ms, {rates.duplex * _STEP_SECONDS / 1024**3:.2f} GiB of KV can come back"
    subject = f"GPU {index} host link"
    lanes = None if gpu is None else gpu.pcie_lanes
    generation = None if gpu is None else gpu.max_pcie_generation
    if lanes and generation in _LANE_RATE and rates.up < _FAIR_SHARE * lanes * _LANE_RATE[generation]:
        return Finding(
            subject,
            Severity.COSTS,
            f"{found}; PCIe {generation} x{lanes} could carry {lanes * _LANE_RATE[generation] / 1e9:.0f}",
            meaning,
            "something else uses the link, or it does not come up to its generation: see PCIe above, and the BIOS",
        )
    return Finding(subject, Severity.GOOD, found, meaning)


def _together(survey: LinkSurvey) -> Finding:
    share = survey.together[0].up / min(rates.up for rates in survey.alone)
    rates = survey.together[0]
    found = f"{rates.up / 1e9:.1f} GB/s up a GPU ({share:.0%} of one alone), {rates.duplex / 1e9:.1f} each way at once"
    if share < _FAIR_TOGETHER:
        return Finding(
            "all host links together",
            Severity.COSTS,
            found,
            "the GPUs share a switch or the memory's bandwidth: that share is what a job has",
            "spread the cards over the CPUs' own PCIe ports; fill all memory channels",
        )
    return Finding("all host links together", Severity.GOOD, found, "the links do not get in each other's way")
