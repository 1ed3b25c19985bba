"""Registered host memory: what copy engines read and write at full speed, without the allocator that is slow at it.

    map anonymous memory -> touch every page, many threads at once -> cudaHostRegister, in pieces

The usual pinned allocator touches pages with one thread and rounds sizes up to a power of two; a job's homes are tens
of gigabytes. Never here: what the memory is for, how much is wanted (`executor/sizing.py`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.executor.sizing import free_host_bytes

GIB = 1024**3
# One registration of half a terabyte has failed and left a sticky error behind.
MAX_REGISTERED_BYTES = 64 * GIB
_MAX_TOUCHING_THREADS = 16
_TOUCHED_AT_ONCE_BYTES = 256 * 1024**2


class HostMemory:
    """`tensor`: uint8 [num_bytes] of host memory, zeros, registered with CUDA until `close`.

    Raises ConfigError when the machine has less than that to give or CUDA refuses to register it.
    """

    def __init__(self, num_bytes: int) -> None:
        free = free_host_bytes()
        if num_bytes > free:
            raise ConfigError(
                f"{num_bytes / GIB:.1f} GiB of host memory for KV homes or weights is more than the {free / GIB:.1f} "
                "GiB that this process may still take (free memory, cut by its control group's limit): lower "
                "host_memory_gib"
            )
        self._mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            # Pages of 2 MiB: 512 times fewer to touch, to register and, at the end, to give back.
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        touch_pages(self._mapping)
        self.tensor: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._registered: list[int] = []
        address = self.tensor.data_ptr()
        for first in range(0, num_bytes, MAX_REGISTERED_BYTES):
            size = min(MAX_REGISTERED_BYTES, num_bytes - first)
            code = int(_cudart().cudaHostRegister(address + first, size, 0))
            if code != 0:
                self.close()
                raise ConfigError(
                    f"CUDA cannot register {size / GIB:.1f} GiB of host memory (error {code}): lower host_memory_gib, "
                    "or raise the limit on locked memory (ulimit -l)"
                )
            self._registered.append(address + first)

    def close(self) -> None:
        """Unregisters. No copy may be under way. Idempotent; the pages go when the last tensor of them does."""
        while self._registered:
            _cudart().cudaHostUnregister(self._registered.pop())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def touch_pages(mapping: mmap.mmap) -> None:
    """Writes one byte of every page, in threads: NumPy lets go of the interpreter lock for it."""
    pages = np.frombuffer(mapping, dtype=np.uint8)
    num_threads = min(_MAX_TOUCHING_THREADS, len(os.sched_getaffinity(0)))

    def touch(first: int) -> None:
        pages[first : first + _TOUCHED_AT_ONCE_BYTES : mmap.PAGESIZE] = 0

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(touch, range(0, len(pages), _TOUCHED_AT_ONCE_BYTES)))
