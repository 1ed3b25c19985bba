"""Numbers in memory that a CUDA stream writes, and waits for: the driver's stream memory operations.

    stream of one process     | kernel | write 7 |
    stream of another                | wait for 7 ........ | kernel: sees what the other one wrote

The wait holds no multiprocessor and no host thread. Memory is host memory that is registered with CUDA in both
processes. Numbers are compared as 32-bit counters that may wrap.

Never here: what is counted (`shared_link.py`).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: of the difference, as a signed number
_AFTER_ALL_BEFORE = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: with a barrier, so earlier writes are seen by whoever sees it
_WRAP = 2**32


class StreamValues:
    """On the current stream of this thread."""

    def __init__(self) -> None:
        """Raises OSError when the driver has no such calls."""
        driver = ctypes.CDLL("libcuda.so.1")
        self._write = _entry(driver, "cuStreamWriteValue32_v2")
        self._wait = _entry(driver, "cuStreamWaitValue32_v2")

    def write(self, address: int, value: int) -> None:
        """Once everything before it on the stream is done. Raises OSError."""
        self._check(self._write(_stream(), address, value % _WRAP, _AFTER_ALL_BEFORE))

    def wait(self, address: int, value: int) -> None:
        """Everything behind it on the stream, until the number there is that or has passed it. Raises OSError."""
        self._check(self._wait(_stream(), address, value % _WRAP, _AT_LEAST))

    @staticmethod
    def _check(code: int) -> None:
        if code != 0:
            raise OSError(f"a stream memory operation failed with CUDA error {code}")


def _entry(driver: Any, name: str) -> Any:
    try:
        call = getattr(driver, name)
    except AttributeError:
        raise OSError(f"{name} is not in this driver") from None
    call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    call.restype = ctypes.c_int
    return call


def _stream() -> int:
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


@functools.cache
def streams_can_wait(device: torch.device) -> bool:
    """Whether that GPU and its driver do it: tried once, with a number of no importance."""
    number = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    try:
        with torch.cuda.device(device):
            values = StreamValues()
            values.write(number.data_ptr(), 1)
            values.wait(number.data_ptr(), 1)
            torch.cuda.current_stream().synchronize()
    except OSError:
        return False
    return bool(number.item() == 1)
