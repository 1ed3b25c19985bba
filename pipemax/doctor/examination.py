"""`examine`: every check, in the order in which a person would look. The composition root of the doctor."""

from __future__ import annotations

from collections.abc import Iterator

from pipemax.doctor.finding import Finding
from pipemax.doctor.gpus import gpu_findings, read_gpus
from pipemax.doctor.host import ProcessLimits, host_findings, shared_memory_free_bytes
from pipemax.doctor.links import link_findings, measure_links
from pipemax.doctor.software import software_findings


def examine(*, measure: bool) -> Iterator[Finding]:
    """Findings as they come. `measure`: also copy on the GPUs for a few seconds, if there are any."""
    survey = read_gpus()
    yield from gpu_findings(survey)
    yield from host_findings(
        limits=ProcessLimits.read(), num_gpus=len(survey.gpus), shared_memory_bytes=shared_memory_free_bytes()
    )
    yield from software_findings(survey)
    if measure and survey.gpus and _cuda_starts():
        yield from link_findings(measure_links(), survey.gpus)


def _cuda_starts() -> bool:
    import torch

    return torch.cuda.is_available()
