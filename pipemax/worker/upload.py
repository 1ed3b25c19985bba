"""Small host arrays to the device, in stream order, without a wait and without a copy engine.

A GPU has one copy engine for each direction of its link, and the window's refill keeps the upward one busy. What a step
needs before it can start must not stand in that queue (measured on two H200: steps of 24 ms became as long as the
refill before them, 75 ms and more). So the host writes into pinned memory and a kernel reads it from there, over the
link but past the queue:

    host     | write | launch |
    compute            | ... the step before ... | kernel reads the array | step
    refill           |======================================================|   the engine never stands between

Also copies inside the device that are kernels, since the library's may be an engine's. With PIPEMAX_UPLOAD=engine in
the environment the engine copies what comes from the host, to be compared. Never here: KV blocks (`block_copy.py`),
activations (`transport.py`).
"""

from __future__ import annotations

import enum
import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipemax.worker.chosen_path import chosen_path

METHOD_VARIABLE = "PIPEMAX_UPLOAD"

_RING_BYTES = 32 * 1024**2
_NUM_SECTIONS = 8
_ALIGNMENT_BYTES = 16


class UploadMethod(enum.StrEnum):
    """See the module."""

    KERNEL = "kernel"
    ENGINE = "engine"


@functools.cache
def upload_method() -> UploadMethod:
    """What the environment says, for good. Raises ConfigError for a value that is none."""
    return chosen_path(METHOD_VARIABLE, UploadMethod.KERNEL)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`, in stream order; a CPU tensor may share its memory."""
    array = np.ascontiguousarray(array)
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    if not array.size:
        return torch.empty(host.shape, dtype=host.dtype, device=device)
    words = _ring(device).write(array) if upload_method() is UploadMethod.KERNEL else None
    if words is None:  # or there are megabytes: they wait for their turn on the engine
        return host.pin_memory().to(device, non_blocking=True)
    uploaded: Tensor = torch.bitwise_or(words, 0).view(host.dtype)[: array.size].view(host.shape)
    return uploaded


def upload_into(destination: Tensor, array: NDArray[Any]) -> None:
    """Overwrites an int32 tensor on a GPU with an array of its size, in stream order."""
    assert destination.dtype == torch.int32 and destination.is_contiguous() and array.dtype == np.int32
    array = np.ascontiguousarray(array)
    words = _ring(destination.device).write(array) if upload_method() is UploadMethod.KERNEL else None
    if words is None:
        destination.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)
    else:
        torch.bitwise_or(words[: array.size], 0, out=destination.view(-1))


def copy_by_kernel(destination: Tensor, source: Tensor) -> None:
    """destination[...] = source, of one shape and dtype; both on one GPU, or `source` is `mapped` memory."""
    if source.device == destination.device:
        torch.mul(source, 1, out=destination)
    else:
        destination.copy_(source, non_blocking=True)


def mapped(pinned: Tensor, device: torch.device) -> Tensor:
    """Pinned host memory as kernels of that GPU see it: int32 on the device, sharing it.

    Copies of it (`copy_`, `to`, `clone`) are a copy engine's; arithmetic is a kernel's. With the engine as the method
    it is the host's tensor.
    """
    if upload_method() is UploadMethod.ENGINE:
        return pinned.view(-1).view(torch.int32)
    return device_view(pinned, device)


def device_view(pinned: Tensor, device: torch.device) -> Tensor:
    """Pinned or registered host memory, a multiple of 4 bytes, as int32 that kernels of that GPU read and write."""
    assert pinned.is_pinned() and pinned.is_contiguous() and device.type == "cuda"
    view: Tensor = torch.as_tensor(_HostMemory(pinned), device=device)
    assert view.data_ptr() == pinned.data_ptr(), "host and GPU do not share one address space"
    return view


class _HostMemory:
    """What torch makes a tensor of without a copy; keeps the memory alive."""

    def __init__(self, pinned: Tensor) -> None:
        self._pinned = pinned
        self.__cuda_array_interface__ = {
            "shape": (pinned.numel() * pinned.element_size() // 4,),
            "typestr": "<i4",
            "data": (pinned.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


class _Ring:
    """Pinned memory that is written from end to end, over and over; a section only once what read it has run."""

    def __init__(self, device: torch.device) -> None:
        pinned = torch.empty(_RING_BYTES, dtype=torch.uint8, pin_memory=True)
        self._bytes = pinned.numpy()
        self._words = mapped(pinned, device)
        self._section_bytes = _RING_BYTES // _NUM_SECTIONS
        self._read: list[torch.cuda.Event | None] = [None] * _NUM_SECTIONS
        self._section = 0
        self._offset = 0

    def write(self, array: NDArray[Any]) -> Tensor | None:
        """A contiguous array where the device can read it: int32 words, with anything behind its end. To be read by
        what is issued next on the current stream. None: it is larger than a section."""
        padded_bytes = math.ceil(array.nbytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if padded_bytes > self._section_bytes:
            return None
        if self._offset + padded_bytes > self._section_bytes:
            self._next_section()
        first = self._section * self._section_bytes + self._offset
        self._bytes[first : first + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._offset += padded_bytes
        return self._words[first // 4 : (first + padded_bytes) // 4]

    def _next_section(self) -> None:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._read[self._section] = event
        self._section, self._offset = (self._section + 1) % _NUM_SECTIONS, 0
        if (before := self._read[self._section]) is not None:
            before.synchronize()


_rings: dict[torch.device, _Ring] = {}


def _ring(device: torch.device) -> _Ring:
    """One for each GPU, since a process issues its steps from one thread on one stream."""
    if device not in _rings:
        _rings[device] = _Ring(device)
    return _rings[device]
