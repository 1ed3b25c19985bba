"""`host_findings`: what this machine gives a process, in memory, cores and limits, and what that means for a job.

Reads the kernel's files below `root` and this process's resource limits. Sizes as the engine sizes itself
(`executor/sizing.py`), so that what is said here is what a job will find.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipemax.doctor.finding import Finding, Severity
from pipemax.executor.sizing import available_cores, free_host_bytes

GIB = 1024**3
MIB = 1024**2
# Less would hold a few hundred tokens of a large model's KV: nothing to offload to.
_LITTLE_HOST_GIB = 8
_FILES_A_STAGE = 64
# Buffers of links between stages of one machine lie there (NCCL takes some MiB a link, gloo none).
_LITTLE_SHARED_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """This process's limits; None: unlimited."""

    locked_bytes: int | None
    open_files: int | None

    @classmethod
    def read(cls) -> ProcessLimits:
        def soft(which: int) -> int | None:
            limit = resource.getrlimit(which)[0]
            return None if limit == resource.RLIM_INFINITY else limit

        return cls(locked_bytes=soft(resource.RLIMIT_MEMLOCK), open_files=soft(resource.RLIMIT_NOFILE))


def host_findings(
    *, limits: ProcessLimits, num_gpus: int, shared_memory_bytes: int | None, root: Path = Path("/")
) -> Iterator[Finding]:
    """`shared_memory_bytes`: free in /dev/shm, None where there is none."""
    yield _memory(num_gpus, root)
    if num_gpus:
        yield _locked(limits.locked_bytes)
    yield _cores(num_gpus, root)
    yield _files(limits.open_files, num_gpus)
    if num_gpus > 1:
        yield _shared_memory(shared_memory_bytes)
    yield from _numa(root)


def shared_memory_free_bytes(folder: Path = Path("/dev/shm")) -> int | None:
    """Free bytes of the shared memory file system; None where there is none."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _memory(num_gpus: int, root: Path) -> Finding:
    meminfo = (root / "proc/meminfo").read_text()
    total_bytes = int(meminfo.split("MemTotal:", 1)[1].split()[0]) * 1024
    free_bytes = free_host_bytes(root)
    found = f"{free_bytes / GIB:.1f} GiB free to this process, of {total_bytes / GIB:.1f} GiB in the machine"
    if free_bytes < _LITTLE_HOST_GIB * GIB and num_gpus:
        return Finding(
            "host memory",
            Severity.COSTS,
            found,
            "KV blocks have their homes here: with so little, batches stay as small as the GPUs' memory makes them",
            "free memory, raise the container's limit, or name what it may take with --host-memory-gib",
        )
    meaning = "KV homes take a quarter of it unless --host-memory-gib says otherwise"
    return Finding("host memory", Severity.GOOD if num_gpus else Severity.NOTE, found, meaning)


def _locked(locked_bytes: int | None) -> Finding:
    if locked_bytes is None or os.geteuid() == 0:
        found = "unlimited" if locked_bytes is None else f"{locked_bytes / MIB:,.0f} MiB, not applied to root"
        return Finding("locked memory (ulimit -l)", Severity.GOOD, found, "KV homes can be registered with the GPUs")
    return Finding(
        "locked memory (ulimit -l)",
        Severity.NOTE,
        f"{locked_bytes / MIB:,.0f} MiB",
        "NVIDIA's driver registers memory without counting it here on most systems; if starting fails to register "
        "host memory, this is the limit",
        "ulimit -l unlimited, or docker run --ulimit memlock=-1",
    )


def _cores(num_gpus: int, root: Path) -> Finding:
    cores = available_cores(root)
    found = f"{cores} for this process"
    if num_gpus and cores < num_gpus + 1:
        return Finding(
            "CPU cores",
            Severity.COSTS,
            found,
            f"{num_gpus} stages and the scheduler are a process each: they wait for one another",
            f"allow at least {num_gpus + 1} cores (cgroup cpu.max, taskset, docker --cpus)",
        )
    return Finding("CPU cores", Severity.GOOD, found, "one a stage and one for the scheduler are enough on GPUs")


def _files(open_files: int | None, num_gpus: int) -> Finding:
    needed = _FILES_A_STAGE * max(1, num_gpus)
    found = "unlimited" if open_files is None else f"{open_files:,}"
    if open_files is not None and open_files < needed:
        return Finding(
            "open files (ulimit -n)",
            Severity.BLOCKS,
            found,
            f"pipes, sockets and weight files of the stages need about {needed}",
            f"ulimit -n {needed}",
        )
    return Finding("open files (ulimit -n)", Severity.GOOD, found, "enough for pipes, sockets and weight files")


def _shared_memory(free_bytes: int | None) -> Finding:
    if free_bytes is None or free_bytes < _LITTLE_SHARED_BYTES:
        return Finding(
            "shared memory (/dev/shm)",
            Severity.BLOCKS,
            "none" if free_bytes is None else f"{free_bytes / MIB:,.0f} MiB free",
            "NCCL keeps the buffers between stages there when GPUs cannot reach each other",
            "docker run --shm-size=1g, or remount /dev/shm larger",
        )
    return Finding(
        "shared memory (/dev/shm)", Severity.GOOD, f"{free_bytes / GIB:.1f} GiB free", "enough for links between stages"
    )


def _numa(root: Path) -> Iterator[Finding]:
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) > 1:
        yield Finding(
            "NUMA",
            Severity.NOTE,
            f"{len(nodes)} memory nodes",
            "copies from the far node are slower; the measured rates below show by how much",
            "compare the GPUs' rates; numactl can bind a job to a node",
        )
