"""`size_kv`: how many KV blocks each stage gets, on the device and at home; and what this machine has to give.

Reads memory and cores as this process may use them: the kernel's numbers, cut by control groups (version 1 or 2), so
that a container's limit counts. Never here: allocation (`worker/kv_store.py`), what blocks are used for (`kv/`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipemax.config import ConfigError, OffloadChoice
from pipemax.plan import Capacity

GIB = 1024**3
# Of host memory that is free once weights are loaded: for homes, and on CPUs as much again for "device" pools. The rest
# is for activations and for everything else on the host.
HOST_SHARE = 0.4
HOST_SHARE_OF_CPUS = 0.25
# Of device blocks, for those that are refilled before their batch runs.
WINDOW_SHARE = 1 / 8
# A CPU's "device" pool is host memory too: no more than its batches fill with requests of this many tokens.
_TOKENS_A_ROW = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class KVWishes:
    """What the user has asked for; None means: choose. `max_model_len` (tokens) None: whatever fits."""

    block_size: int
    max_model_len: int | None
    max_num_seqs: int
    num_batches: int
    num_device_blocks: int | None
    num_window_blocks: int | None
    host_memory_gib: float | None
    offload: OffloadChoice = OffloadChoice.AUTO


def size_kv(
    wishes: KVWishes,
    *,
    stage_block_bytes: Sequence[int],
    free_device_bytes: Sequence[int] | None,
    free_host_bytes: int,
) -> Capacity:
    """Blocks for stages with these sizes of a block; none at home, and no window, where KV stays on the device.

    `free_device_bytes` is what each stage's device has left for KV; None where devices are host memory.

    Raises ConfigError when one request of `max_model_len` does not fit, or when more is asked for than is free.
    """
    block_bytes = sum(stage_block_bytes)
    host_share = HOST_SHARE_OF_CPUS if free_device_bytes is None else HOST_SHARE
    device_blocks = wishes.num_device_blocks
    if device_blocks is None and free_device_bytes is not None:
        pairs = zip(free_device_bytes, stage_block_bytes, strict=True)
        device_blocks = min(free // stage_bytes for free, stage_bytes in pairs)
    elif device_blocks is None:
        wanted = wishes.num_batches * wishes.max_num_seqs * -(-_TOKENS_A_ROW // wishes.block_size)
        device_blocks = min(wanted, int(free_host_bytes * host_share) // block_bytes)
    host_gib = wishes.host_memory_gib
    host_blocks = int(free_host_bytes * host_share if host_gib is None else host_gib * GIB) // block_bytes
    window_blocks = wishes.num_window_blocks
    offloads = _offloads(wishes, device_blocks=device_blocks, host_blocks=host_blocks)
    if not offloads:
        if window_blocks:
            raise ConfigError("num_window_blocks is for blocks that travel: set it to 0, or kv_offload to on")
        host_blocks = window_blocks = 0
    elif window_blocks is None:
        window_blocks = int(device_blocks * WINDOW_SHARE) if wishes.num_batches > 1 else 0
    _check(
        wishes,
        device_blocks=device_blocks,
        window_blocks=window_blocks,
        host_blocks=host_blocks,
        block_bytes=block_bytes,
        offloads=offloads,
        free_host_bytes=free_host_bytes,
        devices_are_host=free_device_bytes is None,
    )
    return Capacity(
        num_stages=len(stage_block_bytes),
        block_size=wishes.block_size,
        num_device_blocks=device_blocks,
        num_window_blocks=window_blocks,
        num_host_blocks=host_blocks,
        block_bytes=max(stage_block_bytes),
    )


def _offloads(wishes: KVWishes, *, device_blocks: int, host_blocks: int) -> bool:
    """Whoever wants a window wants blocks to travel."""
    if wishes.offload is OffloadChoice.AUTO:
        return host_blocks >= device_blocks or bool(wishes.num_window_blocks)
    return wishes.offload is OffloadChoice.ON


def _check(
    wishes: KVWishes,
    *,
    device_blocks: int,
    window_blocks: int,
    host_blocks: int,
    block_bytes: int,
    offloads: bool,
    free_host_bytes: int,
    devices_are_host: bool,
) -> None:
    needed = 1 if wishes.max_model_len is None else -(-wishes.max_model_len // wishes.block_size)
    request = f"one request of {wishes.max_model_len or 1} tokens (max_model_len) needs {needed} KV blocks"
    if device_blocks < needed:
        if device_blocks < 1:
            raise ConfigError("weights leave no room for KV blocks on the device: raise pipeline_parallel_size")
        how = "raise num_device_blocks" if wishes.num_device_blocks is not None else "the free memory sets that number"
        fitting = device_blocks * wishes.block_size
        raise ConfigError(
            f"{request} and the device holds {device_blocks}: {how}, or set max_model_len to at most {fitting}"
        )
    if offloads and host_blocks < needed:
        needed_gib = needed * block_bytes / GIB
        raise ConfigError(
            f"{request} and host memory holds {host_blocks}: set host_memory_gib to at least {needed_gib:.3g}, "
            f"or max_model_len to at most {host_blocks * wishes.block_size}"
        )
    if window_blocks >= device_blocks:
        raise ConfigError(
            f"num_window_blocks ({window_blocks}) must be below the {device_blocks} blocks of the device: lower it"
        )
    asked_bytes = (host_blocks + (device_blocks if devices_are_host else 0)) * block_bytes
    if asked_bytes > free_host_bytes:
        which = "host_memory_gib or num_device_blocks" if devices_are_host else "host_memory_gib"
        raise ConfigError(
            f"the KV cache would take {asked_bytes / GIB:.1f} GiB of host memory and {free_host_bytes / GIB:.1f} GiB "
            f"are free: lower {which}"
        )


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take without swapping, in bytes. `root` is the file system that is read."""
    meminfo = (root / "proc/meminfo").read_text()
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder in _control_groups(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used + _reclaimable_bytes(folder)))
    return free


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: its affinity, cut by control groups' time quotas; at least 1."""
    cores = len(os.sched_getaffinity(0))
    for folder in _control_groups(root, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if (folder / "cpu.max").is_file():
            words = (folder / "cpu.max").read_text().split()
            quota, period = (None if words[0] == "max" else int(words[0])), int(words[1])
        if quota is not None and quota > 0 and period:
            cores = min(cores, -(-quota // period))
    return max(1, cores)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those above it; limits of all of them hold."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the group's path may be the host's, of which only the mount point itself is to be seen.
        inner = Path(group.lstrip("/"))
        for folder in (inner, *inner.parents):
            if (mount / folder).is_dir():
                yield mount / folder


def _number(file: Path) -> int | None:
    """The number in a control file; None where there is no file, or no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable_bytes(folder: Path) -> int:
    """File cache that counts as used and that the kernel gives up under pressure."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in lines)
    return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)
