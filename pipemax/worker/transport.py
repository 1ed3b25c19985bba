"""`StageLinks`: what stages send each other: activations down the pipeline, sampled tokens from its end to its start.

    stage 0 --hidden--> stage 1 --hidden--> ... --hidden--> stage N-1
       ^                                                       |
       +------------------------ tokens -----------------------+

One process group a link, so nothing on one link waits for another. Both ends of a link handle steps in plan order and
know every shape from the plan: messages carry no metadata. A step without rows sends no activations, one without
samples samples no tokens.

Two media. NCCL, where every stage has a GPU of its own: messages go from GPU to GPU in stream order, no host waits for
them, and receiving makes later compute wait. HOST (gloo): messages are in host memory; a GPU's are copied there, and a
thread sends them once the copy is done, so that the thread which issues steps does not wait for the GPU. Links are of
one medium. Where both can be, a stage has links of each at first, and those that are slower are closed.

Why any number of plans may be in flight: take the oldest step that some stage has not run. All older steps have run
everywhere; its stage waits only for the stage before, which has run it, and for tokens of older steps.

Over NCCL a receive is posted when its message is needed, never ahead. It is a kernel that holds its part of the GPU
until the message comes. One that waits for a message of the future slows everything beside it (measured on two H100s,
while tokens were awaited a step ahead: decode steps 15 to 70 % longer), and calls of the driver that wait for the whole
GPU, such as loading a kernel at its first use, wait for it: two stages have stood still like that, each with a receive
posted for what the other had yet to issue. In host memory receives are posted ahead and cost nothing.

Here live groups, buffers in flight, timeouts. Never here: what the tensors mean, requests, plans, which medium is the
faster one (`link_probe.py`).
"""

from __future__ import annotations

import enum
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipemax.config import ConfigError

# A peer that is not there by then has died or hangs; processes start together and connect before they load anything.
CONNECT_TIMEOUT = timedelta(seconds=60)
# No step takes this long; a dead peer is noticed at once, by its closed connection and by the parent.
STEP_TIMEOUT = timedelta(hours=2)
# Of activations and of tokens: buffers that live until they are gone, receives posted ahead in host memory.
MAX_UNFINISHED_SENDS = 2
MAX_UNFINISHED_TOKEN_SENDS = 64
MAX_POSTED_HIDDEN = 2
MAX_POSTED_TOKENS = 64
MEDIUM_VARIABLE = "PIPEMAX_STAGE_LINK"
_CPU = torch.device("cpu")


class LinkMedium(enum.StrEnum):
    """See the module."""

    HOST = "host"
    NCCL = "nccl"

    @property
    def torch_backend(self) -> str:
        return "gloo" if self is LinkMedium.HOST else "nccl"


def possible_media(device: torch.device, *, shares_devices: bool) -> tuple[LinkMedium, ...]:
    """What links can be of: NCCL and HOST for stages that have a GPU each, else HOST.

    Where the environment variable PIPEMAX_STAGE_LINK is set, what it says. Raises ConfigError for a value that is none,
    or that cannot be.
    """
    can_be_nccl = device.type == "cuda" and not shares_devices
    wanted = os.environ.get(MEDIUM_VARIABLE)
    if wanted is None:
        return (LinkMedium.NCCL, LinkMedium.HOST) if can_be_nccl else (LinkMedium.HOST,)
    if wanted not in list(LinkMedium):
        raise ConfigError(f"{MEDIUM_VARIABLE} must be host or nccl, got {wanted!r}")
    if wanted == LinkMedium.NCCL and not can_be_nccl:
        raise ConfigError(f"{MEDIUM_VARIABLE}=nccl needs a GPU for each stage: unset it")
    return (LinkMedium(wanted),)


class LinkError(RuntimeError):
    """The stage at the other end of a link is gone. Its own error says why."""


@dataclass(slots=True)
class Transfer:
    """A tensor on its way and the handle to wait for it; the tensor must live that long."""

    tensor: Tensor
    work: dist.Work
    medium: LinkMedium = LinkMedium.HOST

    def wait(self) -> Tensor:
        """The tensor, once it is there (received) or free to be written again (sent). Raises LinkError.

        Over NCCL it is compute that waits: what is issued from here on.
        """
        try:
            if self.medium is LinkMedium.NCCL:
                self.work.wait()  # with a timeout the host would wait
            else:
                self.work.wait(timeout=STEP_TIMEOUT)
        except RuntimeError as error:
            raise LinkError(f"a stage link broke: {error}") from error
        return self.tensor


def wait_for_device(device: torch.device) -> None:
    """Blocks until the device is through with what this thread has issued, for CONNECT_TIMEOUT at most. Not on a CPU.

    For the start, where a medium may turn out not to work: a message that never comes would hold the whole GPU, and
    whoever waits for that waits for ever. Raises LinkError.
    """
    if device.type == "cpu":
        return
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    deadline_seconds = time.monotonic() + CONNECT_TIMEOUT.total_seconds()
    while not done.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline_seconds:
            raise LinkError(
                f"a message between GPUs did not come within {CONNECT_TIMEOUT.total_seconds():g} s: set "
                f"NCCL_P2P_DISABLE=1, or {MEDIUM_VARIABLE}=host"
            )
        time.sleep(0)  # other threads of this process may have to send something


class _Inbox:
    """Messages that come over one link, in order: expected once a plan tells of them, received when they are needed."""

    def __init__(self, post: Callable[[Tensor], Transfer], *, most_posted: int) -> None:
        """`post` starts to receive into a buffer. Of expected messages, that many are posted ahead of being needed."""
        self._post = post
        self._most_posted = most_posted
        self._buffers: deque[Callable[[], Tensor]] = deque()
        self._posted: deque[Transfer] = deque()

    def expect(self, make_buffer: Callable[[], Tensor]) -> None:
        """One more message, of the buffer's shape and dtype."""
        self._buffers.append(make_buffer)
        self._post_ahead()

    def receive(self) -> Tensor:
        """The oldest expected message; see `Transfer.wait`. Raises LinkError."""
        if not self._posted:
            self._posted.append(self._post(self._buffers.popleft()()))
        oldest = self._posted.popleft()
        self._post_ahead()
        return oldest.wait()

    def _post_ahead(self) -> None:
        while self._buffers and len(self._posted) < self._most_posted:
            self._posted.append(self._post(self._buffers.popleft()()))


class _StagedSends:
    """Sends of what a GPU is still computing, in order: each waits for its copy to the host on a thread."""

    def __init__(self, send: Callable[[Tensor], Transfer]) -> None:
        self._send = send
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="link", daemon=True)
        self._thread.start()

    def put(self, tensor: Tensor) -> None:
        """Raises LinkError when an earlier one could not be sent."""
        if self._error is not None:
            raise LinkError(str(self._error)) from self._error
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        on_host = tensor.to("cpu", non_blocking=True)
        copied.record()
        self._queue.put((on_host, copied))

    def close(self) -> None:
        """Returns once all that was put is sent, and the thread is gone."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                tensor, copied = item
                copied.synchronize()
                self._send(tensor).wait()
                del item, tensor  # the next one may be long in coming
        except BaseException as error:
            self._error = error


class StageLinks:
    """The links of one stage. Shapes: T tokens of a step, H hidden size, S sampled rows."""

    def __init__(
        self,
        *,
        stage: int,
        num_stages: int,
        rendezvous: Path,
        device: torch.device = _CPU,
        medium: LinkMedium = LinkMedium.HOST,
    ) -> None:
        """Connects to the stages beside this one; all stages must be in this call. A single stage has no links.

        `rendezvous` is an empty place in a private folder, the same for all stages; they meet there once, whatever
        number of links over other media they make after that. Sockets stay on the loopback interface. `device` is
        where tensors to send are. Raises LinkError when a peer does not come.
        """
        self._device = device
        self._medium = medium
        self._stage = stage
        self._num_stages = num_stages
        self._hidden_shape: tuple[int, torch.dtype] | None = None
        self._unfinished_sends: deque[Transfer] = deque()
        self._unfinished_tokens: deque[Transfer] = deque()
        self._hidden_inbox: _Inbox | None = None
        self._token_inbox: _Inbox | None = None
        self._groups: list[dist.ProcessGroup] = []  # that this stage is in
        self._behind: dist.ProcessGroup | None = None
        self._tokens: dist.ProcessGroup | None = None
        self._staged_hidden: _StagedSends | None = None
        self._staged_tokens: _StagedSends | None = None
        if num_stages == 1:
            return
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # nobody outside this machine may connect
            os.environ.setdefault(variable, "lo")
        try:
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(str(rendezvous), num_stages),  # type: ignore[attr-defined]
                    rank=stage,
                    world_size=num_stages,
                    timeout=CONNECT_TIMEOUT,
                )
            # Every stage makes every group, in one order, also those that it is not in: the order numbers them.
            links = [self._new_group(sender, sender + 1) for sender in range(num_stages - 1)]
            tokens = self._new_group(num_stages - 1, 0)
        except RuntimeError as error:  # dist.DistError is one
            raise LinkError(f"stage {stage} could not connect to the other stages: {error}") from error
        before = links[stage - 1] if stage > 0 else None
        behind = links[stage] if stage < num_stages - 1 else None
        self._behind, self._tokens = behind, tokens
        nccl = medium is LinkMedium.NCCL
        if before is not None:
            self._hidden_inbox = _Inbox(
                lambda buffer: self._receive(buffer, stage - 1, before), most_posted=0 if nccl else MAX_POSTED_HIDDEN
            )
        if stage == 0:
            self._token_inbox = _Inbox(
                lambda buffer: self._receive(buffer, num_stages - 1, tokens),
                most_posted=0 if nccl else MAX_POSTED_TOKENS,
            )
        if device.type == "cuda" and medium is LinkMedium.HOST:
            if behind is not None:
                self._staged_hidden = _StagedSends(lambda tensor: self._send(tensor, stage + 1, behind))
            else:
                self._staged_tokens = _StagedSends(lambda tensor: self._send(tensor, 0, tokens))

    def set_hidden(self, hidden_size: int, dtype: torch.dtype) -> None:
        """What activations look like; known once the model is."""
        self._hidden_shape = (hidden_size, dtype)

    def expect_hidden(self, num_tokens: int) -> None:
        """The plan of a coming step is known, in plan order: it brings activations of that many tokens."""
        assert self._hidden_inbox is not None and self._hidden_shape is not None
        hidden_size, dtype = self._hidden_shape
        self._hidden_inbox.expect(lambda: self._buffer(num_tokens, hidden_size, dtype=dtype))

    def receive_hidden(self) -> Tensor:
        """Activations [T, H] of the oldest expected step; see `Transfer.wait`. Raises LinkError."""
        assert self._hidden_inbox is not None
        return self._hidden_inbox.receive()

    def send_hidden(self, hidden_TH: Tensor) -> None:
        """Sends activations on; blocks while MAX_UNFINISHED_SENDS older ones are on their way. Raises LinkError."""
        assert self._behind is not None and self._hidden_shape is not None
        assert (hidden_TH.shape[1], hidden_TH.dtype) == self._hidden_shape
        if self._staged_hidden is not None:
            self._staged_hidden.put(hidden_TH)
            return
        if self._medium is LinkMedium.NCCL:
            hidden_TH = hidden_TH.clone()  # the next step may write over it before it has left
        while len(self._unfinished_sends) >= MAX_UNFINISHED_SENDS:
            self._unfinished_sends.popleft().wait()
        self._unfinished_sends.append(self._send(hidden_TH.contiguous(), self._stage + 1, self._behind))

    def send_tokens(self, token_ids_S: Tensor) -> None:
        """Last stage: sends a step's sampled tokens, int32 [S], S > 0, to the first. Does not wait for it."""
        assert self._tokens is not None and self._stage == self._num_stages - 1 and token_ids_S.dtype == torch.int32
        if self._staged_tokens is not None:
            self._staged_tokens.put(token_ids_S)
            return
        # The first stage receives a step's tokens a few plans later at most, so this old a message is gone by now.
        while len(self._unfinished_tokens) >= MAX_UNFINISHED_TOKEN_SENDS:
            self._unfinished_tokens.popleft().wait()
        self._unfinished_tokens.append(self._send(token_ids_S, 0, self._tokens))

    def expect_tokens(self, num_tokens: int) -> None:
        """First stage, right after handing a step on: its sampled tokens are to come."""
        assert self._token_inbox is not None
        self._token_inbox.expect(lambda: self._buffer(num_tokens, dtype=torch.int32))

    def receive_tokens(self) -> Tensor:
        """First stage: tokens of the oldest expected step, int32 [S]; see `Transfer.wait`. Raises LinkError."""
        assert self._token_inbox is not None
        return self._token_inbox.receive()

    def finish_sends(self) -> None:
        """Waits for what is on its way, as `Transfer.wait` does, and lets go of it. Raises LinkError."""
        for unfinished in (self._unfinished_sends, self._unfinished_tokens):
            while unfinished:
                unfinished.popleft().wait()

    def close(self) -> None:
        """Gives back groups and threads, and the GPU memory that NCCL's communicators hold. Idempotent.

        All stages must be in this call, with nothing expected and nothing on its way that is not received.
        """
        self.finish_sends()
        for staged in (self._staged_hidden, self._staged_tokens):
            if staged is not None:
                staged.close()
        self._staged_hidden = self._staged_tokens = self._hidden_inbox = self._token_inbox = None
        self._behind = self._tokens = None
        while self._groups:  # in the order in which they were made, since both ends wait for each other
            dist.destroy_process_group(self._groups.pop(0))

    def _buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """For a receive. Over NCCL it is on the GPU, else in host memory, pinned if a GPU copies from there."""
        if self._medium is LinkMedium.NCCL:
            return torch.empty(*shape, dtype=dtype, device=self._device)
        return torch.empty(*shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _new_group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """The group of one link. NCCL connects at the first message, which both ends have to take part in: now."""
        timeout = STEP_TIMEOUT if self._medium is LinkMedium.NCCL else CONNECT_TIMEOUT
        group: dist.ProcessGroup = dist.new_group(
            [sender, receiver], backend=self._medium.torch_backend, timeout=timeout
        )
        if self._stage not in (sender, receiver):
            return group
        self._groups.append(group)
        if self._medium is LinkMedium.NCCL:
            greeting = torch.zeros(1, dtype=torch.int32, device=self._device)
            if self._stage == sender:
                self._send(greeting, receiver, group).wait()
            else:
                self._receive(greeting, sender, group).wait()
            wait_for_device(self._device)
        return group

    def _send(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Transfer:
        try:
            work = dist.isend(tensor, dst=peer, group=group)
        except RuntimeError as error:
            raise LinkError(f"stage {self._stage} could not send to stage {peer}: {error}") from error
        assert work is not None
        return Transfer(tensor, work, self._medium)

    def _receive(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Transfer:
        try:
            work = dist.irecv(tensor, src=peer, group=group)
        except RuntimeError as error:
            raise LinkError(f"stage {self._stage} could not receive from stage {peer}: {error}") from error
        assert work is not None
        return Transfer(tensor, work, self._medium)
