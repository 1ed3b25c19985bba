"""`StageLinks`: what stages send each other: activations down the pipeline, sampled tokens from its end to its start.

    stage 0 --hidden--> stage 1 --hidden--> ... --hidden--> stage N-1
       ^                                                       |
       +------------------------ tokens -----------------------+
              (or hidden states and half of their logits)

A link each, so nothing on one waits for another. Both ends of a link handle steps in plan order and know every shape
from the plan: messages carry no metadata. A step without rows sends no activations, one without samples samples no
tokens.

Two media. HOST: through host memory that both stages share, in stream order (`shared_link.py`); between CPUs gloo.
NCCL, where every stage has a GPU of its own and these reach each other: from GPU to GPU (`group_link.py`). Where they
do not, NCCL goes through host memory as well, by a longer way, so it is not tried. Links are of one medium. Where both
can be, a stage has links of each at first, and those that are slower are closed.

Why any number of plans may be in flight: take the oldest step that some stage has not run. All older steps have run
everywhere; its stage waits only for the stage before, which has run it, for tokens of older steps, and for the stage
behind to have taken messages of older steps.

Here live who is linked to whom, shapes, and what can be tried. Never here: how messages travel, which medium is the
faster one (`link_probe.py`).
"""

from __future__ import annotations

import enum
import functools
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.worker.group_link import STEP_TIMEOUT, GroupPeer, GroupReceiver, GroupSender
from pipemax.worker.link import LinkError, LinkReceiver, LinkSender
from pipemax.worker.shared_link import RingShape, SharedReceiver, SharedRing, SharedSender
from pipemax.worker.stream_values import StreamValues, streams_can_wait

# A peer that is not there by then has died or hangs; processes start together and connect before they load anything.
CONNECT_TIMEOUT = timedelta(seconds=60)
# Of activations and of tokens in groups: buffers that live until they are gone, receives posted ahead over gloo.
_MOST_UNFINISHED_HIDDEN = 2
_MOST_UNFINISHED_TOKENS = 64
_MOST_POSTED_HIDDEN = 2
_MOST_POSTED_TOKENS = 64
# Of activations in shared memory: a decode step of 64 rows of 8,192 elements takes 1 MiB, a large prefill step 32.
_HIDDEN_RING = RingShape(place_bytes=4 * 1024**2, num_places=16)
# The first stage receives a step's tokens a few plans later at most.
_TOKEN_RING = RingShape(place_bytes=64 * 1024, num_places=64)
MEDIUM_VARIABLE = "PIPEMAX_STAGE_LINK"
_CPU = torch.device("cpu")


class LinkMedium(enum.StrEnum):
    """See the module."""

    HOST = "host"
    NCCL = "nccl"


def possible_media(device: torch.device, *, gpus: Sequence[int]) -> tuple[LinkMedium, ...]:
    """What links can be of; `gpus`: the index of each stage's GPU, where `device` is one.

    Where the environment variable PIPEMAX_STAGE_LINK is set, what it says. Raises ConfigError for a value that is none,
    or that cannot be, and where nothing can.
    """
    wanted = os.environ.get(MEDIUM_VARIABLE)
    if wanted is not None and wanted not in list(LinkMedium):
        raise ConfigError(f"{MEDIUM_VARIABLE} must be host or nccl, got {wanted!r}")
    if device.type == "cpu":
        can_be_nccl, can_be_host = False, True
    else:
        can_be_nccl, can_be_host = len(set(gpus)) == len(gpus), streams_can_wait(device)
    if wanted == LinkMedium.NCCL and not can_be_nccl:
        raise ConfigError(f"{MEDIUM_VARIABLE}=nccl needs a GPU for each stage: unset it")
    if wanted == LinkMedium.HOST and not can_be_host:
        raise ConfigError(f"{MEDIUM_VARIABLE}=host needs a driver with stream memory operations: unset it")
    if wanted is not None:
        return (LinkMedium(wanted),)
    if can_be_nccl and can_be_host:
        return (LinkMedium.NCCL, LinkMedium.HOST) if reach_each_other(gpus) else (LinkMedium.HOST,)
    if not can_be_nccl and not can_be_host:
        raise ConfigError(
            "stages that share a GPU need a driver with stream memory operations: give every stage a GPU of its own"
        )
    return (LinkMedium.NCCL,) if can_be_nccl else (LinkMedium.HOST,)


def reach_each_other(gpus: Sequence[int]) -> bool:
    """Whether each of these GPUs, and the first from the last, can write into the next one's memory, and NCCL may."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return False
    following = [*gpus[1:], gpus[0]]
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in zip(gpus, following, strict=True))


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
                f"{MEDIUM_VARIABLE}=host, or nccl and NCCL_P2P_DISABLE=1"
            )
        time.sleep(0)  # other threads of this process may have to send something


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
        returns_halves: bool = False,
    ) -> None:
        """Connects to the stages beside this one; all stages must be in this call. A single stage has no links.

        `rendezvous` is an empty place in a private folder, the same for all stages; they meet there once, whatever
        number of links over other media they make after that. Sockets stay on the loopback interface. `device` is
        where tensors to send are, and where those that come will be. `returns_halves`: what goes from the last stage
        to the first is what that one samples from, rather than tokens. Raises LinkError when a peer does not come,
        and ConfigError when there is no memory to share.
        """
        self._device = device
        self._medium = medium
        self._stage = stage
        self._num_stages = num_stages
        self._return_ring = _HIDDEN_RING if returns_halves else _TOKEN_RING
        self._hidden_shape: tuple[int, torch.dtype] | None = None
        self._half_shape: tuple[int, torch.dtype] | None = None
        # Of the link that begins at this stage, and of the one that ends here.
        self._sender: LinkSender | None = None
        self._receiver: LinkReceiver | None = None
        self._groups: list[dist.ProcessGroup] = []  # that this stage is in
        self._rings: list[SharedRing] = []
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
            if medium is LinkMedium.HOST and device.type == "cuda":
                self._share_rings()
            else:
                self._join_groups()
        except (RuntimeError, OSError) as error:  # dist.DistError is a RuntimeError
            is_nccls = medium is LinkMedium.NCCL and dist.is_initialized()  # not of a stage that never came
            remedy = f"; to go without NCCL, set {MEDIUM_VARIABLE}=host" if is_nccls else ""
            raise LinkError(f"stage {stage} could not connect to the other stages: {error}{remedy}") from error

    def set_hidden(self, hidden_size: int, dtype: torch.dtype) -> None:
        """What activations look like; known once the model is."""
        self._hidden_shape = (hidden_size, dtype)

    @property
    def kept_hidden(self) -> int:
        """Of how many steps activations may be in memory of this stage's device after they were sent."""
        return 0 if self._is_last or self._sender is None else self._sender.keeps_messages

    def expect_hidden(self, num_tokens: int) -> None:
        """The plan of a coming step is known, in plan order: it brings activations of that many tokens."""
        assert self._receiver is not None and self._stage > 0 and self._hidden_shape is not None
        hidden_size, dtype = self._hidden_shape
        self._receiver.expect(lambda: torch.empty(num_tokens, hidden_size, dtype=dtype, device=self._device))

    def receive_hidden(self) -> Tensor:
        """Activations [T, H] of the oldest expected step. Raises LinkError.

        Over gloo the host waits for them, else what is issued from here on.
        """
        assert self._receiver is not None and self._stage > 0
        return self._receiver.receive()

    def send_hidden(self, hidden_TH: Tensor) -> None:
        """Sends activations on. In a group, blocks while too many are on their way. Raises LinkError."""
        assert self._sender is not None and not self._is_last and self._hidden_shape is not None
        assert (hidden_TH.shape[1], hidden_TH.dtype) == self._hidden_shape
        if self._medium is LinkMedium.NCCL:
            hidden_TH = hidden_TH.clone()  # the next step may write over it before it has left
        self._sender.send(hidden_TH.contiguous())

    def send_tokens(self, token_ids_S: Tensor) -> None:
        """Last stage: sends a step's sampled tokens, int32 [S], S > 0, to the first. Does not wait for it."""
        assert self._sender is not None and self._is_last and token_ids_S.dtype == torch.int32
        self._sender.send(token_ids_S)

    def expect_tokens(self, num_tokens: int) -> None:
        """First stage, right after handing a step on: its sampled tokens are to come."""
        assert self._receiver is not None and self._stage == 0
        self._receiver.expect(lambda: torch.empty(num_tokens, dtype=torch.int32, device=self._device))

    def receive_tokens(self) -> Tensor:
        """First stage: tokens of the oldest expected step, int32 [S]; as `receive_hidden`. Raises LinkError."""
        assert self._receiver is not None and self._stage == 0
        return self._receiver.receive()

    def set_half(self, num_logits: int, dtype: torch.dtype) -> None:
        """First stage: what the last one's part of a row's logits looks like."""
        self._half_shape = (num_logits, dtype)

    def send_half(self, hidden_SH: Tensor, logits_Sv: Tensor) -> None:
        """Last stage, in the place of tokens: hidden states of a step's rows that sample, S > 0, and its part of their
        logits; both must not change any more. Raises LinkError."""
        assert self._sender is not None and self._is_last
        for tensor in (hidden_SH, logits_Sv):
            self._sender.send(tensor.contiguous())

    def expect_half(self, num_rows: int) -> None:
        """First stage, right after handing a step on: what it samples from is to come."""
        assert self._receiver is not None and self._stage == 0
        for shape in (self._hidden_shape, self._half_shape):
            assert shape is not None
            width, dtype = shape
            self._receiver.expect(functools.partial(torch.empty, num_rows, width, dtype=dtype, device=self._device))

    def half_has_come(self) -> bool:
        """First stage: whether to `receive_half` now; as `LinkReceiver.has_come`."""
        assert self._receiver is not None and self._stage == 0
        return self._receiver.has_come()

    def receive_half(self) -> tuple[Tensor, Tensor]:
        """First stage: what `send_half` was given of the oldest step; as `receive_hidden`. Raises LinkError."""
        assert self._receiver is not None and self._stage == 0
        return self._receiver.receive(), self._receiver.receive()

    def finish_sends(self) -> None:
        """Waits for what is on its way, or makes later compute wait, and lets go of it. Raises LinkError."""
        if self._sender is not None:
            self._sender.finish()

    def close(self) -> None:
        """Gives back groups, shared memory, and what GPU memory NCCL's communicators hold. Idempotent.

        All stages must be in this call, with nothing expected and nothing on its way that is not received.
        """
        self.finish_sends()
        self._sender = self._receiver = None
        if self._rings:
            wait_for_device(self._device)
        while self._rings:
            self._rings.pop().close()
        while self._groups:  # in the order in which they were made, since both ends wait for each other
            dist.destroy_process_group(self._groups.pop(0))

    @property
    def _is_last(self) -> bool:
        return self._stage == self._num_stages - 1

    def _share_rings(self) -> None:
        """Every stage makes the memory of the link that begins at it, and opens that of the stage before."""
        own = SharedRing.create(self._return_ring if self._is_last else _HIDDEN_RING, self._device)
        self._rings.append(own)
        addresses: list[Any] = [None] * self._num_stages
        dist.all_gather_object(addresses, own.address)
        before = SharedRing.open(addresses[self._stage - 1], self._device)
        self._rings.append(before)
        counters = StreamValues()
        self._sender, self._receiver = SharedSender(own, counters), SharedReceiver(before, counters)

    def _join_groups(self) -> None:
        """Every stage makes every group, in one order, also those that it is not in: the order numbers them."""
        stage, last = self._stage, self._num_stages - 1
        is_nccl = self._medium is LinkMedium.NCCL
        groups = [self._new_group(sender, sender + 1) for sender in range(last)]
        groups.append(self._new_group(last, 0))
        self._sender = GroupSender(
            GroupPeer(groups[stage], 0 if self._is_last else stage + 1, is_nccl),
            most_unfinished=_MOST_UNFINISHED_TOKENS if self._is_last else _MOST_UNFINISHED_HIDDEN,
        )
        most_posted = _MOST_POSTED_TOKENS if stage == 0 else _MOST_POSTED_HIDDEN
        self._receiver = GroupReceiver(
            GroupPeer(groups[stage - 1], last if stage == 0 else stage - 1, is_nccl),
            most_posted=0 if is_nccl else most_posted,
        )

    def _new_group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """The group of one link. NCCL connects at the first message, which both ends have to take part in: now."""
        is_nccl = self._medium is LinkMedium.NCCL
        group: dist.ProcessGroup = dist.new_group(
            [sender, receiver],
            backend="nccl" if is_nccl else "gloo",
            timeout=STEP_TIMEOUT if is_nccl else CONNECT_TIMEOUT,
        )
        if self._stage not in (sender, receiver):
            return group
        self._groups.append(group)
        if is_nccl:
            greeting = torch.zeros(1, dtype=torch.int32, device=self._device)
            if self._stage == sender:
                dist.send(greeting, dst=receiver, group=group)
            else:
                dist.recv(greeting, src=sender, group=group)
            wait_for_device(self._device)
        return group
