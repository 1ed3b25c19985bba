"""Block copies on a CUDA stream: many pieces in one call to the driver, or one `copy_` a run.

`cuMemcpyBatchAsync` takes arrays of addresses, so a copy of n runs costs one call and about a microsecond a run, where
a `copy_` costs ten. The call comes from `cuGetProcAddress` with the interface of CUDA 12.8: one binary interface on
every driver that has it (570 and later). Where it is missing or switched off, the plain loop does the same.

Never here: which blocks, on which stream, after what (`transfer.py`, `cuda_device.py`).
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.worker.chosen_path import chosen_path
from pipemax.worker.device import BlockRuns

# The call of the driver has hung and crashed with tens of thousands of pieces; a layer of a step has hundreds.
MAX_PIECES_PER_CALL = 1024
METHOD_VARIABLE = "PIPEMAX_BLOCK_COPY"

_ENTRY = b"cuMemcpyBatchAsync"
_ENTRY_CUDA_VERSION = 12080
# The source is read in stream order: a home's copy may still be on its way when the copy out of it is queued.
_SOURCE_IN_STREAM_ORDER = 1


class CopyMethod(enum.StrEnum):
    """AUTO: BATCH where the driver has it, else LOOP."""

    AUTO = "auto"
    BATCH = "batch"
    LOOP = "loop"


class BlockCopier(Protocol):
    def copy(self, stream: torch.cuda.Stream, pools: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> None:
        """Queues destination[d] = source[s] for every (destination, source) of `pools` and every pair of `runs`.

        Pools [n, ...], contiguous; both of a pair have blocks of one size.
        """
        ...


class LoopCopier:
    """One asynchronous copy a run."""

    def copy(self, stream: torch.cuda.Stream, pools: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> None:
        with torch.cuda.stream(stream):
            for destination, source in pools:
                for to, of in runs.slices():
                    destination[to].copy_(source[of], non_blocking=True)


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source_location", _Location),
        ("destination_location", _Location),
        ("flags", ctypes.c_uint),
    ]


class BatchCopier:
    """All runs of some layers in one call. Host memory has to be registered or pinned. One copier a stream."""

    def __init__(self) -> None:
        """Raises OSError when the driver has no such call."""
        self._call = _driver_entry()
        self._attributes = _Attributes(source_access_order=_SOURCE_IN_STREAM_ORDER)
        self._attributes_from = ctypes.c_size_t(0)

    def copy(self, stream: torch.cuda.Stream, pools: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> None:
        assert stream.cuda_stream != 0, "the default stream is refused by the driver"
        pieces = CopyPieces.of(pools, runs)
        for first in range(0, len(pieces.sizes), MAX_PIECES_PER_CALL):
            end = min(first + MAX_PIECES_PER_CALL, len(pieces.sizes))
            failed_piece = ctypes.c_size_t(0)
            code = self._call(
                pieces.destinations[first:end].ctypes.data,
                pieces.sources[first:end].ctypes.data,
                pieces.sizes[first:end].ctypes.data,
                end - first,
                ctypes.byref(self._attributes),
                ctypes.byref(self._attributes_from),
                1,
                ctypes.byref(failed_piece),
                stream.cuda_stream,
            )
            if code != 0:
                raise RuntimeError(
                    f"cuMemcpyBatchAsync failed with CUDA error {code} at piece {failed_piece.value} of {end - first}; "
                    f"set {METHOD_VARIABLE}=loop to copy without it"
                )


@dataclass(frozen=True, slots=True)
class CopyPieces:
    """Addresses and sizes in bytes, uint64 [pieces] each: every run in every pair of pools."""

    destinations: NDArray[np.uint64]
    sources: NDArray[np.uint64]
    sizes: NDArray[np.uint64]

    @classmethod
    def of(cls, pools: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> CopyPieces:
        """Both pools of a pair have blocks of one size; another pair may have others (layer groups)."""
        bases = np.array([(to.data_ptr(), of.data_ptr()) for to, of in pools], dtype=np.uint64)
        block_bytes = np.array([[_block_bytes(to)] for to, _ in pools], dtype=np.uint64)
        assert all(_block_bytes(of) == _block_bytes(to) for to, of in pools), "a block and its home differ in size"
        firsts = runs.starts[:-1]
        return cls(
            (bases[:, :1] + block_bytes * runs.destinations[firsts].astype(np.uint64)).reshape(-1),
            (bases[:, 1:] + block_bytes * runs.sources[firsts].astype(np.uint64)).reshape(-1),
            (block_bytes * np.diff(runs.starts).astype(np.uint64)).reshape(-1),
        )


def _block_bytes(pool: Tensor) -> int:
    assert pool.is_contiguous(), "blocks of a run do not lie side by side"
    return pool.stride(0) * pool.element_size()


def open_copier(method: CopyMethod | None = None) -> BlockCopier:
    """The copier of this machine; `method` None: what the environment variable PIPEMAX_BLOCK_COPY says, or auto.

    Raises ConfigError for a value of the variable that is none, or for `batch` where the driver lacks it.
    """
    if method is None:
        method = chosen_path(METHOD_VARIABLE, CopyMethod.AUTO)
    if method is CopyMethod.LOOP:
        return LoopCopier()
    try:
        return BatchCopier()
    except OSError as error:
        if method is CopyMethod.BATCH:
            raise ConfigError(f"{METHOD_VARIABLE}=batch needs an NVIDIA driver of 570 or later: {error}") from error
        return LoopCopier()


def _driver_entry() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_void_p()
    code = driver.cuGetProcAddress(
        ctypes.c_char_p(_ENTRY), ctypes.byref(address), ctypes.c_int(_ENTRY_CUDA_VERSION), ctypes.c_uint64(0)
    )
    if code != 0 or not address.value:
        raise OSError(f"{_ENTRY.decode()} is not in this driver (CUDA error {code})")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signature = ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer
    )
    return signature(address.value)
