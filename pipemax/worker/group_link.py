"""Ends of a link whose messages a process group of torch carries: NCCL between GPUs, gloo between CPUs.

Over NCCL a receive is posted when its message is needed, never ahead. It is a kernel that holds its part of the GPU
until the message comes. One that waits for a message of the future slows everything beside it (measured on two H100s,
while tokens were awaited a step ahead: decode steps 15 to 70 % longer), and calls of the driver that wait for the whole
GPU, such as loading a kernel at its first use, wait for it: two stages have stood still like that, each with a receive
posted for what the other had yet to issue. Over gloo receives are posted ahead and cost nothing.

Here live messages on their way and their timeout. Never here: which groups there are (`transport.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipemax.worker.link import LinkError

# No step takes this long; a dead peer is noticed at once, by its closed connection and by the parent.
STEP_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class GroupPeer:
    """The stage at the other end of a group of two. `is_nccl`: compute waits for messages, not the host."""

    group: dist.ProcessGroup
    stage: int
    is_nccl: bool


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A tensor on its way and the handle to wait for it; the tensor must live that long."""

    tensor: Tensor
    work: dist.Work
    is_nccl: bool

    def wait(self) -> Tensor:
        """The tensor, once it is there (received) or free to be written again (sent). Raises LinkError."""
        try:
            if self.is_nccl:
                self.work.wait()  # with a timeout the host would wait
            else:
                self.work.wait(timeout=STEP_TIMEOUT)
        except RuntimeError as error:
            raise LinkError(f"a stage link broke: {error}") from error
        return self.tensor


class GroupSender:
    """LinkSender. Blocks while `most_unfinished` older messages are on their way."""

    def __init__(self, peer: GroupPeer, *, most_unfinished: int) -> None:
        self._peer = peer
        self._most_unfinished = most_unfinished
        self._unfinished: deque[_Transfer] = deque()

    @property
    def keeps_messages(self) -> int:
        return self._most_unfinished

    def send(self, tensor: Tensor) -> None:
        while len(self._unfinished) >= self._most_unfinished:
            self._unfinished.popleft().wait()
        peer = self._peer
        try:
            work = dist.isend(tensor, dst=peer.stage, group=peer.group)
        except RuntimeError as error:
            raise LinkError(f"cannot send to stage {peer.stage}: {error}") from error
        assert work is not None
        self._unfinished.append(_Transfer(tensor, work, peer.is_nccl))

    def finish(self) -> None:
        while self._unfinished:
            self._unfinished.popleft().wait()


class GroupReceiver:
    """LinkReceiver. Of expected messages, `most_posted` are posted ahead of being needed."""

    def __init__(self, peer: GroupPeer, *, most_posted: int) -> None:
        self._peer = peer
        self._most_posted = most_posted
        self._buffers: deque[Callable[[], Tensor]] = deque()
        self._posted: deque[_Transfer] = deque()

    def expect(self, make_buffer: Callable[[], Tensor]) -> None:
        self._buffers.append(make_buffer)
        self._post_ahead()

    def has_come(self) -> bool:
        """Neither kind of group tells. Over gloo the host waits in `receive`, and plans that come meanwhile wait with
        it. Over NCCL all that is issued behind it waits too, so only once the stream has nothing left."""
        return not self._peer.is_nccl or torch.cuda.current_stream().query()

    def receive(self) -> Tensor:
        if not self._posted:
            self._post()
        oldest = self._posted.popleft()
        self._post_ahead()
        return oldest.wait()

    def _post_ahead(self) -> None:
        while self._buffers and len(self._posted) < self._most_posted:
            self._post()

    def _post(self) -> None:
        peer, buffer = self._peer, self._buffers.popleft()()
        try:
            work = dist.irecv(buffer, src=peer.stage, group=peer.group)
        except RuntimeError as error:
            raise LinkError(f"cannot receive from stage {peer.stage}: {error}") from error
        assert work is not None
        self._posted.append(_Transfer(buffer, work, peer.is_nccl))
