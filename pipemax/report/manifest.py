"""`run_manifest`: what ran, with what, on what, when: enough to run it again. JSON values only.

Never here: results; the environment's variables, which may hold secrets.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipemax.doctor.gpus import GpuSurvey, read_gpus
from pipemax.executor.sizing import available_cores, free_host_bytes

GIB = 1024**3
_PACKAGES = ("pipemax", "torch", "transformers", "flashinfer-python", "tokenizers", "safetensors", "numpy")


def run_manifest(*, command: Sequence[str], settings: Mapping[str, Any], capacity: Mapping[str, int]) -> dict[str, Any]:
    """`command` as typed, `settings` of the engine as given, `capacity` as it came out."""
    return {
        "command": shlex.join(command),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": {
            name: value if isinstance(value, int | float | None) else str(value) for name, value in settings.items()
        },
        "capacity": dict(capacity),
        "versions": {"python": platform.python_version(), **installed_versions(_PACKAGES)},
        "commit": source_commit(Path(__file__).parent),
        "host": _host(),
        "gpus": _gpus(read_gpus()),
    }


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def source_commit(folder: Path) -> str:
    """The git commit of the source in `folder`, with "+changes" if files differ; "" if it is no checkout."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        return ran.stdout.strip() if ran.returncode == 0 else ""

    try:
        # A checkout around an installed package (a virtual environment within it) says nothing of the package.
        if not git("ls-files", "--", str(folder)):
            return ""
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _host() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": available_cores(),
        "memory": f"{pages / GIB:.1f} GiB, {free_host_bytes() / GIB:.1f} GiB free",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _gpus(survey: GpuSurvey) -> dict[str, Any]:
    if not survey.gpus:
        return {}
    return {
        "driver": survey.driver_version,
        "CUDA of the driver": survey.cuda_version,
        **{
            f"GPU {gpu.index}": f"{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB, "
            f"PCIe {gpu.max_pcie_generation} x{gpu.pcie_lanes}"
            for gpu in survey.gpus
        },
    }
