"""How many blocks there are, and what the machine is thought to have."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipemax.config import ConfigError, OffloadChoice
from pipemax.executor.sizing import GIB, KVWishes, available_cores, free_host_bytes, size_kv

WISHES = KVWishes(
    block_size=16,
    max_model_len=1024,
    max_num_seqs=8,
    num_batches=2,
    num_device_blocks=None,
    num_window_blocks=None,
    host_memory_gib=None,
)
MIB = 1024**2


def size(wishes: KVWishes, free_gib: float = 8.0, free_device_bytes: list[int] | None = None) -> list[int]:
    """[device, window, host] blocks with blocks of 1 and 3 MiB on two stages."""
    capacity = size_kv(
        wishes,
        stage_block_bytes=[MIB, 3 * MIB],
        free_device_bytes=free_device_bytes,
        free_host_bytes=int(free_gib * GIB),
    )
    assert (capacity.num_stages, capacity.block_size, capacity.block_bytes) == (2, 16, 3 * MIB)
    return [capacity.num_device_blocks, capacity.num_window_blocks, capacity.num_host_blocks]


def test_a_cpu_gets_what_its_batches_fill_or_a_quarter_of_what_is_free() -> None:
    # 2 batches of 8 rows of 512 tokens; homes take a quarter of 8 GiB in blocks of 4 MiB over both stages.
    assert size(WISHES) == [512, 64, 512]
    assert size(WISHES, free_gib=4.0) == [256, 32, 256]


def test_gpus_get_what_the_fullest_one_has_left_for_kv() -> None:
    assert size(WISHES, free_device_bytes=[1000 * MIB, 1000 * MIB]) == [333, 41, 819]
    assert size(WISHES, free_device_bytes=[100 * MIB, 1000 * MIB]) == [100, 12, 819]


def test_a_gpu_that_the_weights_fill_is_said_so() -> None:
    with pytest.raises(ConfigError, match="weights leave no room for KV blocks on the device: raise pipeline_parallel"):
        size(WISHES, free_device_bytes=[0, 1000 * MIB])


def test_numbers_that_were_asked_for_are_kept() -> None:
    asked = replace(WISHES, num_device_blocks=100, num_window_blocks=30, host_memory_gib=1.0)
    assert size(asked) == [100, 30, 256]
    assert size(replace(WISHES, num_batches=1))[1] == 0


def test_kv_stays_on_the_device_where_host_memory_holds_less_of_it() -> None:
    gpus = [300 * MIB, 900 * MIB]
    few = replace(WISHES, host_memory_gib=1.0)
    assert size(few, free_device_bytes=gpus) == [300, 0, 0]
    assert size(replace(few, host_memory_gib=1.2), free_device_bytes=gpus) == [300, 37, 307]
    # Who says so, or asks for a window, has homes all the same.
    assert size(replace(few, offload=OffloadChoice.ON), free_device_bytes=gpus) == [300, 37, 256]
    assert size(replace(few, num_window_blocks=20), free_device_bytes=gpus) == [300, 20, 256]
    # And not even one request has to fit then.
    assert size(replace(few, host_memory_gib=0.1), free_device_bytes=gpus) == [300, 0, 0]


def test_without_homes_there_is_no_window() -> None:
    off = replace(WISHES, offload=OffloadChoice.OFF)
    assert size(off) == [512, 0, 0]
    with pytest.raises(ConfigError, match="num_window_blocks is for blocks that travel: set it to 0, or kv_offload"):
        size(replace(off, num_window_blocks=20))


@pytest.mark.parametrize(
    ("wishes", "free_gib", "what"),
    [
        (
            replace(WISHES, num_device_blocks=63),
            8.0,
            r"64 KV blocks and the device holds 63: raise num_device_blocks, or",
        ),
        (WISHES, 0.99, r"the device holds 63: the free memory sets that number, or set max_model_len to at most 1008"),
        (
            replace(WISHES, host_memory_gib=0.2, offload=OffloadChoice.ON),
            8.0,
            r"host memory holds 51: set host_memory_gib to at least 0.25, or max",
        ),
        (
            replace(WISHES, num_device_blocks=100, num_window_blocks=100),
            8.0,
            r"num_window_blocks \(100\) must be below",
        ),
        (
            replace(WISHES, host_memory_gib=7.0),
            8.0,
            r"9.0 GiB of host memory and 8.0 GiB are free: lower host_memory_gib",
        ),
    ],
)
def test_what_cannot_work_says_which_number_to_change(wishes: KVWishes, free_gib: float, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        size(wishes, free_gib=free_gib)
    assert "\n" not in str(caught.value)


def test_homes_are_not_counted_against_a_gpu() -> None:
    assert size(replace(WISHES, host_memory_gib=7.0), free_device_bytes=[10**9, 10**9])[2] == 1792


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  99 kB\nMemAvailable:   1000 kB\n"}


def test_free_memory_without_a_control_group(tmp_path: Path) -> None:
    assert free_host_bytes(write(tmp_path, MEMINFO)) == 1000 * 1024


@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({"": "max", "a/b": "max"}, 1024000),
        ({"": "max", "a/b": "500000"}, 500000 - 300000 + 50000),
        ({"": "max", "a": "400000", "a/b": "500000"}, 400000 - 300000 + 50000),
        ({"": "320000"}, 70000),  # in a container: the group's own path is not to be seen
        ({"": "100000"}, 0),
    ],
)
def test_free_memory_under_control_groups_2(limits: dict[str, str], free: int, tmp_path: Path) -> None:
    root = write(tmp_path, {**MEMINFO, "proc/self/cgroup": "0::/a/b\n"})
    for group, limit in limits.items():
        folder = f"sys/fs/cgroup/{group}/"
        files = {"memory.max": limit, "memory.current": "300000", "memory.stat": "anon 7\ninactive_file 50000"}
        write(root, {folder + name: text + "\n" for name, text in files.items()})
    assert free_host_bytes(root) == free


def test_free_memory_under_control_groups_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "600000\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "100000\n",
        },
    )
    assert free_host_bytes(root) == 500000


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ({}, None),
    ],
)
def test_cores_are_cut_by_time_quotas(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    assert available_cores(write(tmp_path, files)) == (cores or len(os.sched_getaffinity(0)))
