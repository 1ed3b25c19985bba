"""The ring of a shared link between two mappings of its memory, with threads in the place of streams: what is sent
arrives whole and in order, whoever is ahead, and nothing is overwritten that was not read."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

from pipemax.worker.link import LinkError
from pipemax.worker.shared_link import RingAddress, RingShape, SharedReceiver, SharedRing, SharedSender

CPU = torch.device("cpu")
SHAPE = RingShape(place_bytes=64, num_places=3)


class HostCounters:
    """What streams do, done by the calling thread."""

    def __init__(self) -> None:
        self.num_waits = 0

    def write(self, address: int, value: int) -> None:
        ctypes.c_uint32.from_address(address).value = value % 2**32

    def wait(self, address: int, value: int) -> None:
        self.num_waits += 1
        number = ctypes.c_uint32.from_address(address)
        deadline_seconds = time.monotonic() + 20
        while (number.value - value) % 2**32 >= 2**31:
            assert time.monotonic() < deadline_seconds, "nobody wrote that number"
            time.sleep(1e-5)


class Ends:
    """Both ends in this process, over two mappings."""

    def __init__(self, shape: RingShape = SHAPE) -> None:
        self.rings = [SharedRing.create(shape, CPU)]
        self.rings.append(SharedRing.open(self.rings[0].address, CPU))
        self.counters = HostCounters()
        self.sender = SharedSender(self.rings[0], self.counters)
        self.receiver = SharedReceiver(self.rings[1], HostCounters())

    def receive(self, like: Tensor) -> Tensor:
        self.receiver.expect(lambda: torch.empty_like(like))
        return self.receiver.receive()


MESSAGES = [
    torch.arange(7, dtype=torch.int32),
    torch.full((3, 5), float("nan"), dtype=torch.bfloat16),  # 30 bytes: not a multiple of 4
    torch.randn(2, 8),  # one place exactly
    torch.randn(41, 3).to(torch.bfloat16),  # four places: more than there are
    torch.randn(50, 9, dtype=torch.float64),
    torch.zeros(1, dtype=torch.uint8),
]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def behind(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("late", ["sender", "receiver", "neither"])
def test_messages_of_all_sizes_arrive_whole_and_in_order(late: str) -> None:
    ends = Ends()

    def send_all() -> None:
        for message in MESSAGES * 20:
            if late == "sender":
                time.sleep(1e-3)
            ends.sender.send(message)

    sending = behind(send_all)
    for message in MESSAGES * 20:
        if late == "receiver":
            time.sleep(1e-3)
        received = ends.receive(message)
        assert received.dtype == message.dtype and received.shape == message.shape and same_bytes(received, message)
    sending.join(20)
    assert not sending.is_alive() and ends.sender.keeps_messages == 0


def test_a_sender_waits_for_a_place_and_only_then() -> None:
    ends = Ends()
    message = torch.zeros(4, dtype=torch.int32)
    for number in range(SHAPE.num_places):
        ends.sender.send(message + number)
    assert ends.counters.num_waits == 0
    sending = behind(lambda: ends.sender.send(message + SHAPE.num_places))
    time.sleep(0.05)
    assert sending.is_alive() and ends.counters.num_waits == 1
    assert [int(ends.receive(message)[0]) for _ in range(SHAPE.num_places + 1)] == [0, 1, 2, 3]
    sending.join(20)
    ends.sender.send(message)
    assert ends.counters.num_waits == 1


def test_counters_may_wrap() -> None:
    ends = Ends()
    almost = 2**32 - 2
    for address in (ends.rings[0].sent_address, ends.rings[0].taken_address):
        ctypes.c_uint32.from_address(address).value = almost
    ends.sender._num_sent = ends.receiver._num_taken = almost
    for number in range(9):
        message = torch.full((9,), number, dtype=torch.int16)
        ends.sender.send(message)
        assert torch.equal(ends.receive(message), message)
    assert ends.counters.num_waits == 0 and ends.rings[1].num_taken == 7


def count_descriptors(inode: int) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found += os.stat(f"/proc/self/fd/{name}").st_ino == inode
    return found


def test_closed_rings_leave_nothing_open() -> None:
    ends = Ends()
    inode = os.stat(ends.rings[0].address.file_descriptor).st_ino
    assert count_descriptors(inode) >= 2
    for ring in ends.rings * 2:
        ring.close()
    assert count_descriptors(inode) == 0


def holds_a_ring(pipe: Connection) -> None:
    ring = SharedRing.create(SHAPE, CPU)
    SharedSender(ring, HostCounters()).send(torch.arange(5))
    pipe.send(ring.address)
    pipe.recv()


def test_the_memory_is_found_through_its_process_and_outlives_it() -> None:
    context = multiprocessing.get_context("fork")
    pipe, child_pipe = context.Pipe()
    process = context.Process(target=holds_a_ring, args=(child_pipe,), daemon=True)
    process.start()
    address: RingAddress = pipe.recv()
    ring = SharedRing.open(address, CPU)
    process.kill()
    process.join()
    receiver = SharedReceiver(ring, HostCounters())
    receiver.expect(lambda: torch.empty(5, dtype=torch.int64))
    assert receiver.receive().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(LinkError, match=f"cannot share memory with process {address.process_id}: No such file"):
        SharedRing.open(address, CPU)


class BrokenCounters(HostCounters):
    def write(self, address: int, value: int) -> None:
        raise OSError("a stream memory operation failed with CUDA error 700")


def test_a_refused_operation_is_a_broken_link() -> None:
    sender = SharedSender(SharedRing.create(SHAPE, CPU), BrokenCounters())
    with pytest.raises(LinkError, match="CUDA error 700"):
        sender.send(torch.zeros(1))


def test_the_host_sees_whether_a_message_has_come() -> None:
    ends = Ends()
    long, short = torch.arange(40, dtype=torch.int32), torch.zeros(1, dtype=torch.uint8)  # three places, and one
    for _ in range(5):
        assert not ends.receiver.has_come()
        ends.sender.send(long)
        assert ends.receiver.has_come()
        assert torch.equal(ends.receive(long), long) and not ends.receiver.has_come()
        ends.sender.send(short)
        ends.sender.send(short)
        ends.receive(short)
        assert ends.receiver.has_come()
        ends.receive(short)


class RunAhead(HostCounters):
    """As a GPU's stream is seen by its host: a wait is issued, and nobody waits."""

    def wait(self, address: int, value: int) -> None:
        pass


def test_a_message_behind_one_that_is_awaited_has_not_come() -> None:
    ends = Ends()
    ahead = SharedReceiver(ends.rings[1], RunAhead())
    for _ in range(2):
        ahead.expect(lambda: torch.empty(3))
        ahead.receive()
    for has_come in (False, False, True):
        ends.sender.send(torch.zeros(3))
        assert ahead.has_come() is has_come
