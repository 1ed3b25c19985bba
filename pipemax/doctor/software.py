"""`software_findings`: whether the libraries that a job needs are here, in versions that work, and can use the GPUs.

Imports torch, which takes seconds. Never here: the GPUs themselves (`gpus.py`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from pipemax.doctor.finding import Finding, Severity
from pipemax.doctor.gpus import GpuSurvey, stages_for


def software_findings(survey: GpuSurvey) -> Iterator[Finding]:
    """Python and libraries; with GPUs also the driver, CUDA in torch, FlashInfer."""
    yield _packages()
    if survey.gpus:
        yield _driver(survey)
        yield _torch_cuda(survey)
        yield _flashinfer(survey)


def _packages() -> Finding:
    """The package's own requirements against what is installed."""
    versions, wrong = [f"python {sys.version.split()[0]}"], []
    try:
        requirements = importlib.metadata.requires("pipemax") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "libraries",
            Severity.NOTE,
            "PipeMax runs from a folder and is not installed",
            "nothing says which versions of its libraries it needs",
            "install it: pip install -e FOLDER",
        )
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in ("torch", "transformers"):
            versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding(
            "libraries",
            Severity.BLOCKS,
            "; ".join(wrong),
            "PipeMax is written against other versions",
            "install it again: pip install -U pipemax",
        )
    return Finding("libraries", Severity.GOOD, ", ".join(versions), "in the range that PipeMax is written against")


def _driver(survey: GpuSurvey) -> Finding:
    return Finding(
        "NVIDIA driver",
        Severity.GOOD,
        f"{survey.driver_version}, for CUDA up to {survey.cuda_version}",
        "torch's own CUDA must not be newer by a major version",
    )


def _torch_cuda(survey: GpuSurvey) -> Finding:
    import torch

    if torch.version.cuda is None:
        return Finding(
            "CUDA in torch",
            Severity.BLOCKS,
            f"torch {torch.__version__} is a build for CPUs",
            "the GPUs cannot be used",
            "install torch from PyPI (without the CPU index)",
        )
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen == 0:
        return Finding(
            "CUDA in torch",
            Severity.BLOCKS,
            f"CUDA {torch.version.cuda} does not start; the driver is for {survey.cuda_version}",
            "the GPUs cannot be used",
            "update the driver, or install a torch build for its CUDA; check CUDA_VISIBLE_DEVICES",
        )
    if seen < len(survey.gpus):
        return Finding(
            "CUDA in torch",
            Severity.NOTE,
            f"CUDA {torch.version.cuda}, {seen} of {len(survey.gpus)} GPUs visible",
            stages_for(seen),
            "CUDA_VISIBLE_DEVICES chooses",
        )
    return Finding(
        "CUDA in torch",
        Severity.GOOD,
        f"CUDA {torch.version.cuda}, {seen} of {len(survey.gpus)} GPUs visible",
        "usable",
    )


def _flashinfer(survey: GpuSurvey) -> Finding:
    action = "pip install 'pipemax[flashinfer]'"
    if importlib.util.find_spec("flashinfer") is None:
        return Finding(
            "FlashInfer",
            Severity.COSTS,
            "not installed",
            "attention runs in plain torch: right, and several times slower",
            action,
        )
    version = importlib.metadata.version("flashinfer-python")
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # whatever its own imports raise: the job would find it unusable too
        lines = str(error).splitlines() or [repr(error)]
        return Finding(
            "FlashInfer",
            Severity.COSTS,
            f"{version} does not import: {lines[0]}",
            "attention runs in plain torch: right, and several times slower",
            action,
        )
    if min(gpu.compute_capability for gpu in survey.gpus) < (8, 0):
        return Finding(
            "FlashInfer", Severity.COSTS, version, "its kernels need compute capability 8.0; torch serves these GPUs"
        )
    return Finding("FlashInfer", Severity.GOOD, version, "serves attention in bfloat16 and float16")
