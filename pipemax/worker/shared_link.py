"""A link between GPUs through host memory that both stages' processes map: a ring of places, written and read in stream
order on either side.

    sender's stream     | step k | kernel: to place | sent = c |          step k + 1 ...
    receiver's stream              wait: sent >= c ............ | kernel: from place | taken = c | step k

Kernels write and read, past the copy engines, of which the one up the link is busy with the window's refill. Nothing
waits on the host, no multiprocessor is held by a wait, and neither end needs memory of its GPU: NCCL takes 0.45 GiB,
most of it for good, and without P2P its messages go through host memory too. A large message goes in several parts, one
of them written while another is read. A sender that is a whole ring ahead of its receiver waits in stream order.

The memory has no name: the receiver opens it through the sender's process, and nothing is left behind if either is
killed. A peer that dies is noticed by the parent, as with NCCL: a wait on a stream ends for nothing else.

Here live the ring and its two ends. Never here: who is linked to whom (`transport.py`), the driver's calls
(`stream_values.py`).
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.worker.link import LinkError
from pipemax.worker.upload import device_view

# Of each counter, so that the two ends do not write into one line of a cache.
_COUNTER_BYTES = 1024
_HEADER_BYTES = mmap.PAGESIZE
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Counters(Protocol):
    """`stream_values.StreamValues`, or what stands in for it where there is no GPU."""

    def write(self, address: int, value: int) -> None: ...

    def wait(self, address: int, value: int) -> None: ...


@dataclass(frozen=True, slots=True)
class RingShape:
    """Places for parts of messages. As many parts as places may be on their way."""

    place_bytes: int
    num_places: int

    @property
    def num_bytes(self) -> int:
        return _HEADER_BYTES + self.place_bytes * self.num_places


@dataclass(frozen=True, slots=True)
class RingAddress:
    """Where another process finds the memory of a ring."""

    process_id: int
    file_descriptor: int
    shape: RingShape


class SharedRing:
    """The memory of one link, in one of its two processes; registered with CUDA until `close` if `device` is a GPU.

    sent       number of parts the sender has written, as the receiver's stream may read it
    taken      number of parts the receiver has read
    """

    def __init__(self, file_descriptor: int, shape: RingShape, device: torch.device) -> None:
        """Make one with `create` or `open`. Raises ConfigError when CUDA refuses to register it."""
        self.shape = shape
        self._file_descriptor: int | None = file_descriptor
        self._bytes = torch.frombuffer(mmap.mmap(file_descriptor, shape.num_bytes), dtype=torch.uint8)
        self._registered = device.type == "cuda"
        if self._registered:
            code = int(_cudart().cudaHostRegister(self._bytes.data_ptr(), shape.num_bytes, 0))
            if code != 0:
                os.close(file_descriptor)
                raise ConfigError(
                    f"CUDA cannot register {shape.num_bytes >> 20} MiB of host memory for a link between stages "
                    f"(error {code}): raise the limit on locked memory (ulimit -l)"
                )
        seen_by_device = device_view(self._bytes, device) if self._registered else self._bytes
        self._places = seen_by_device.view(torch.uint8)[_HEADER_BYTES:].view(shape.num_places, shape.place_bytes)
        # The driver loads a kernel when it is first used, and not while a stream waits: now, when none does.
        torch.bitwise_or(self._places[0, :4].view(torch.int32), 0)
        self.sent_address = self._bytes.data_ptr()
        self.taken_address = self.sent_address + _COUNTER_BYTES
        self._counters = self._bytes[: 2 * _COUNTER_BYTES].view(torch.int32)

    @classmethod
    def create(cls, shape: RingShape, device: torch.device) -> SharedRing:
        file_descriptor = os.memfd_create("pipemax-link", os.MFD_CLOEXEC)
        os.ftruncate(file_descriptor, shape.num_bytes)
        return cls(file_descriptor, shape, device)

    @classmethod
    def open(cls, address: RingAddress, device: torch.device) -> SharedRing:
        """Raises LinkError when its process is gone, or may not be looked into."""
        try:
            file_descriptor = os.open(f"/proc/{address.process_id}/fd/{address.file_descriptor}", os.O_RDWR)
        except OSError as error:
            raise LinkError(f"cannot share memory with process {address.process_id}: {error.strerror}") from error
        return cls(file_descriptor, address.shape, device)

    @property
    def address(self) -> RingAddress:
        assert self._file_descriptor is not None
        return RingAddress(os.getpid(), self._file_descriptor, self.shape)

    @property
    def num_sent(self) -> int:
        """As the host sees it now, modulo 2 ** 32; the GPU may be further."""
        return int(self._counters[0].item()) % 2**32

    @property
    def num_taken(self) -> int:
        """As `num_sent`."""
        return int(self._counters[_COUNTER_BYTES // 4].item()) % 2**32

    def place(self, part: int, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of the place for the part of that number, as kernels see it."""
        return self._places[part % self.shape.num_places][:num_bytes]

    def close(self) -> None:
        """Nothing may be on its way, and nothing is looked at after it. Idempotent; the memory goes when both ends have
        closed."""
        if self._file_descriptor is None:
            return
        if self._registered:
            _cudart().cudaHostUnregister(self._bytes.data_ptr())
        os.close(self._file_descriptor)
        self._file_descriptor = None
        del self._bytes, self._places, self._counters  # the mapping, which holds a descriptor of its own


class SharedSender:
    """LinkSender."""

    keeps_messages = 0

    def __init__(self, ring: SharedRing, counters: Counters) -> None:
        self._ring = ring
        self._counters = counters
        self._num_sent = 0

    def send(self, tensor: Tensor) -> None:
        for part in _parts(tensor, self._ring.shape.place_bytes):
            self._wait_for_place()
            place = self._ring.place(self._num_sent, part.nbytes).view(part.dtype)
            torch.bitwise_or(part, 0, out=place)
            self._num_sent += 1
            _count(self._counters.write, self._ring.sent_address, self._num_sent)

    def finish(self) -> None:
        """Nothing to wait for: what was sent is in the ring, in stream order."""

    def _wait_for_place(self) -> None:
        least_taken = self._num_sent + 1 - self._ring.shape.num_places
        # Mostly there is room, and the host can see it.
        if (self._num_sent - self._ring.num_taken) % 2**32 >= self._ring.shape.num_places:
            _count(self._counters.wait, self._ring.taken_address, least_taken)


class SharedReceiver:
    """LinkReceiver. Waits in the stream when a message is needed, never ahead: what is behind the wait waits too."""

    def __init__(self, ring: SharedRing, counters: Counters) -> None:
        self._ring = ring
        self._counters = counters
        self._num_taken = 0
        self._buffers: deque[Callable[[], Tensor]] = deque()

    def expect(self, make_buffer: Callable[[], Tensor]) -> None:
        self._buffers.append(make_buffer)

    def has_come(self) -> bool:
        """The first part is there; the others follow at once. Messages before it that the stream still waits for have
        to come first."""
        return 0 < (self._ring.num_sent - self._num_taken) % 2**32 < 2**31

    def receive(self) -> Tensor:
        tensor = self._buffers.popleft()()
        for part in _parts(tensor, self._ring.shape.place_bytes):
            _count(self._counters.wait, self._ring.sent_address, self._num_taken + 1)
            place = self._ring.place(self._num_taken, part.nbytes).view(part.dtype)
            torch.bitwise_or(place, 0, out=part)
            self._num_taken += 1
            _count(self._counters.write, self._ring.taken_address, self._num_taken)
        return tensor


def _parts(tensor: Tensor, part_bytes: int) -> tuple[Tensor, ...]:
    """Views of a contiguous tensor as integers, from its beginning to its end, since arithmetic may change a NaN."""
    assert tensor.is_contiguous()
    width = 4 if tensor.nbytes % 4 == 0 else tensor.element_size()
    integers = tensor.view(-1).view(_INTEGERS[width])
    return torch.split(integers, part_bytes // width)


def _count(call: Callable[[int, int], None], address: int, value: int) -> None:
    try:
        call(address, value)
    except OSError as error:
        raise LinkError(str(error)) from error


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
