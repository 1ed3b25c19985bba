"""`StageLinks`: what stages send each other: activations down the pipeline, sampled tokens from its end to its start.

    stage 0 --hidden--> stage 1 --hidden--> ... --hidden--> stage N-1
       ^                                                       |
       +------------------------ tokens -----------------------+

One process group a link, so nothing on one link waits for another. Both ends of a link handle steps in plan order and
know every shape from the plan: messages carry no metadata. A step without rows sends no activations, one without
samples samples no tokens.

Two media. NCCL, when every stage has a GPU of its own: messages go from GPU to GPU in stream order, no host waits for
them, and `wait` makes later compute wait. HOST (gloo): messages are in host memory; a GPU's are copied there, and a
thread sends them once the copy is done, so that the thread which issues steps does not wait for the GPU.

Why any number of plans may be in flight: take the oldest step that some stage has not run. All older steps have run
everywhere, so every older message has been received; its stage waits only for the stage before, which has run it. Token
receives are posted as soon as the first stage has handed a step on, so the last stage never waits for the first.

Here live groups, buffers in flight, timeouts. Never here: what the tensors mean, requests, plans.
"""

from __future__ import annotations

import enum
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

# A peer that is not there by then has died or hangs; processes start together and connect before they load anything.
CONNECT_TIMEOUT = timedelta(seconds=60)
# No step takes this long; a dead peer is noticed at once, by its closed connection and by the parent.
STEP_TIMEOUT = timedelta(hours=2)
MAX_UNFINISHED_SENDS = 2
MAX_POSTED_RECEIVES = 2
_CPU = torch.device("cpu")


class LinkMedium(enum.Enum):
    HOST = "gloo"
    NCCL = "nccl"


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


class _Late:
    def __init__(self, make): self.make = make
    def wait(self): return self.make().wait()


class _StagedSends:
    """Sends of what a GPU is still computing, in order: each waits for its copy to the host on a thread."""

    def __init__(self, send: Callable[[Tensor], Transfer]) -> None:
        self._send = send
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="link", daemon=True).start()

    def put(self, tensor: Tensor) -> None:
        """Raises LinkError when an earlier one could not be sent."""
        if self._error is not None:
            raise LinkError(str(self._error)) from self._error
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        on_host = tensor.to("cpu", non_blocking=True)
        copied.record()
        self._queue.put((on_host, copied))

    def _work(self) -> None:
        try:
            while True:
                tensor, copied = self._queue.get()
                copied.synchronize()
                self._send(tensor).wait()
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

        `rendezvous` is an empty place in a private folder, the same for all stages. Sockets stay on the loopback
        interface. `device` is where tensors to send are. Raises LinkError when a peer does not come.
        """
        self._device = device
        self._medium = medium
        self._stage = stage
        self._num_stages = num_stages
        self._hidden_shape: tuple[int, torch.dtype] | None = None
        self._unfinished_sends: deque[Transfer] = deque()
        self._posted_receives: deque[Transfer] = deque()
        self._unfinished_tokens: deque[Transfer] = deque()
        self._expected: deque[int] = deque()  # tokens of coming messages whose receive is not posted yet
        if num_stages == 1:
            return
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # nobody outside this machine may connect
            os.environ.setdefault(variable, "lo")
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(rendezvous), num_stages),  # type: ignore[attr-defined]
                rank=stage,
                world_size=num_stages,
                timeout=CONNECT_TIMEOUT,
            )
            # Every stage makes every group, in one order, also those that it is not in: the order numbers them.
            links = [self._new_group(sender, sender + 1) for sender in range(num_stages - 1)]
            self._tokens = self._new_group(num_stages - 1, 0)
        except RuntimeError as error:  # dist.DistError is one
            raise LinkError(f"stage {stage} could not connect to the other stages: {error}") from error
        self._before = links[stage - 1] if stage > 0 else None
        self._behind = links[stage] if stage < num_stages - 1 else None
        self._staged_hidden: _StagedSends | None = None
        self._staged_tokens: _StagedSends | None = None
        if device.type == "cuda" and medium is LinkMedium.HOST:
            behind, tokens = self._behind, self._tokens
            if behind is not None:
                self._staged_hidden = _StagedSends(lambda tensor: self._send(tensor, stage + 1, behind))
            else:
                self._staged_tokens = _StagedSends(lambda tensor: self._send(tensor, 0, tokens))

    def set_hidden(self, hidden_size: int, dtype: torch.dtype) -> None:
        """What activations look like; known once the model is."""
        self._hidden_shape = (hidden_size, dtype)

    def post_hidden(self, num_tokens: int) -> bool:
        """Gets ready to receive the next step's activations; False when enough receives are posted already."""
        if self._medium is LinkMedium.NCCL:
            self._expected.append(num_tokens)
            return True
        if len(self._posted_receives) == MAX_POSTED_RECEIVES:
            return False
        self._posted_receives.append(self._receive_next_hidden(num_tokens))
        return True

    def receive_hidden(self) -> Tensor:
        """Activations [T, H] of the oldest posted receive. Blocks until they are there. Raises LinkError."""
        if self._medium is LinkMedium.NCCL:
            self._posted_receives.append(self._receive_next_hidden(self._expected.popleft()))
        return self._posted_receives.popleft().wait()

    def _receive_next_hidden(self, num_tokens: int) -> Transfer:
        assert self._before is not None and self._hidden_shape is not None
        hidden_size, dtype = self._hidden_shape
        hidden_TH = self._buffer(num_tokens, hidden_size, dtype=dtype)
        return self._receive(hidden_TH, self._stage - 1, self._before)

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
        assert self._stage == self._num_stages - 1 and token_ids_S.dtype == torch.int32
        if self._staged_tokens is not None:
            self._staged_tokens.put(token_ids_S)
            return
        # The first stage posts a receive for every step right after it has run it, so older messages are gone by now.
        while len(self._unfinished_tokens) >= MAX_UNFINISHED_SENDS:
            self._unfinished_tokens.popleft().wait()
        self._unfinished_tokens.append(self._send(token_ids_S, 0, self._tokens))

    def post_tokens(self, num_tokens: int) -> Transfer:
        """First stage: the receive of the next step with samples, int32 [S]; to be waited for by the caller."""
        assert self._stage == 0
        if self._medium is LinkMedium.NCCL and os.environ.get("PIPEMAX_X") == "late":
            return _Late(lambda: self._receive(self._buffer(num_tokens, dtype=torch.int32), self._num_stages - 1, self._tokens))
        return self._receive(self._buffer(num_tokens, dtype=torch.int32), self._num_stages - 1, self._tokens)

    def _buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """For a receive. Over NCCL it is on the GPU, else in host memory, pinned if a GPU copies from there."""
        if self._medium is LinkMedium.NCCL:
            return torch.empty(*shape, dtype=dtype, device=self._device)
        return torch.empty(*shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _new_group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """The group of one link. NCCL connects at the first message, which both ends have to take part in: now."""
        timeout = STEP_TIMEOUT if self._medium is LinkMedium.NCCL else CONNECT_TIMEOUT
        group: dist.ProcessGroup = dist.new_group([sender, receiver], backend=self._medium.value, timeout=timeout)
        if self._medium is LinkMedium.NCCL and self._stage in (sender, receiver):
            greeting = torch.zeros(1, dtype=torch.int32, device=self._device)
            if self._stage == sender:
                self._send(greeting, receiver, group).wait()
            else:
                self._receive(greeting, sender, group).wait()
            torch.cuda.synchronize(self._device)
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
