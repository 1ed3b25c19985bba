"""`TransferEngine`: block copies between device and home, beside compute, layer by layer.

Two streams, one a direction. Layer l of step k:

    compute   | enter(l) | append, attend | leave(l) | layers l+1 ...                | next step: enter(l)
                waits for home(k-1)          |                                           waits for both
                and refill(k-1) of l         |
    home                                     +--> copies of write_home(k) ---------->|
    refill                                   +--> after home(k-1) of l: refill(k) -->|

These are the orders of `plan.py` and no more: compute -> home -> next compute, compute -> refill -> next compute,
home -> next refill. In a COPY step nothing computes, so the streams wait for each other where compute would have
waited, and the caller goes on.

A few layers may share their copies (`layers_per_copy`): every fence then stands before the first or after the last of
them, and their blocks may lie side by side (`kv_store.py`), so that a piece of a copy serves them all. On a GPU a
fence, a call of the driver and each piece of a copy cost the issuing thread microseconds, a layer of decode not many.

Never here: which blocks to move (the control plane says), how bytes are moved (`device.py`), attention.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipemax.plan import CopyDirection, Int32Array, StepPlan
from pipemax.worker.copy_log import IssuedCopies
from pipemax.worker.device import BlockRuns, CopyMark, CopyStream, Device, Event, Stopwatch

# On a GPU: fences and calls for copies fall to a quarter, and a refill starts at most three layers later.
GPU_LAYERS_PER_COPY = 4


def layers_per_copy(device: torch.device) -> int:
    """How many layers share their copies on a device."""
    return GPU_LAYERS_PER_COPY if device.type == "cuda" else 1


def layers_sharing_copies(layers: range, layers_per_copy: int) -> list[range]:
    """The stage's layers in runs of `layers_per_copy`; the last may be shorter."""
    firsts = range(layers.start, layers.stop, layers_per_copy)
    return [range(first, min(first + layers_per_copy, layers.stop)) for first in firsts]


class KVPools(Protocol):
    """Both sides of a stage's KV; layers by global index."""

    def device_pool(self, layer: int) -> Tensor:
        """[num_device_blocks, 2, block_size, num_kv_heads, head_dim] on the device."""
        ...

    def home_pool(self, layer: int) -> Tensor:
        """[num_host_blocks, 2, block_size, num_kv_heads, head_dim] in host memory."""
        ...

    def copy_pools(self, layers: range) -> Sequence[tuple[Tensor, Tensor]]:
        """What to copy for layers that share their copies: (device, home) pools, each block contiguous in them."""
        ...


@dataclass(frozen=True, slots=True)
class StepTransfers:
    """What one step's copies came to."""

    window_wait: Stopwatch
    refill_bytes: int
    home_bytes: int
    issue_seconds: float
    copies: tuple[IssuedCopies, ...] = ()

    @property
    def window_wait_seconds(self) -> float:
        """How long compute waited for copies of the step before; blocks until it has passed the last wait."""
        return self.window_wait.seconds()


class TransferEngine:
    """Keeps compute and copies of one stage in order (`LayerFences` for the hook).

    A step is begin_step, then enter and leave of every layer in order, then finish_step; copies go on after it.
    """

    def __init__(self, *, device: Device, pools: KVPools, layers: range, layers_per_copy: int = 1) -> None:
        assert layers_per_copy >= 1
        # Events are kept under the first layer of those that share their copies.
        self._sharing = layers_sharing_copies(layers, layers_per_copy)
        self._sharing_of_layer = {layer: sharing for sharing in self._sharing for layer in sharing}
        self._copy_pools = {sharing.start: list(pools.copy_pools(sharing)) for sharing in self._sharing}
        self._device = device
        self._pools = pools
        self._layers = layers
        self._block_bytes = sum(pools.device_pool(layer)[0].nbytes for layer in layers)
        self._home_stream: CopyStream = device.copy_stream("home")
        self._refill_stream: CopyStream = device.copy_stream("refill")
        self._home_done: dict[int, Event] = {}
        self._refill_done: dict[int, Event] = {}
        self._home_runs: BlockRuns | None = None
        self._refill_runs: BlockRuns | None = None
        self._starts: dict[CopyDirection, CopyMark] = {}
        self._issued: list[IssuedCopies] = []
        self._issue_seconds = 0.0
        self._step_id = -1
        self._next_layer = layers.stop
        self._wait_clock = device.stopwatch()

    def begin_step(self, plan: StepPlan) -> None:
        """Takes up the plan's copies."""
        assert self._next_layer == self._layers.stop, "the step before has not left every layer"
        self._check(plan)
        self._home_runs = self._refill_runs = None
        self._starts, self._issued, self._issue_seconds, self._step_id = {}, [], 0.0, plan.step_id
        if len(plan.write_home):
            self._home_runs = BlockRuns.merge(plan.write_home.homes, plan.write_home.slots)
        if len(plan.refill):
            self._refill_runs = BlockRuns.merge(plan.refill.slots, plan.refill.homes)
        self._wait_clock = self._device.stopwatch()
        self._next_layer = self._layers.start

    def enter(self, layer: int) -> None:
        """Compute may use the layer's slots after this. Raises CopyError when a copy has failed."""
        assert layer == self._next_layer
        # Only the first of the layers that share their copies is found here.
        if layer in self._home_done or layer in self._refill_done:
            self._wait_clock.start()
            self._compute_waits_for_home(layer)
            self._compute_waits_for_refill(layer)
            self._wait_clock.stop()

    def leave(self, layer: int) -> None:
        """Compute is done with the layer's slots: its copies may start."""
        assert layer == self._next_layer
        self._next_layer = layer + 1
        sharing = self._sharing_of_layer[layer]
        if layer != sharing[-1] or (self._home_runs is None and self._refill_runs is None):
            return
        self._copies_wait_for_compute()
        self._refill_waits_for_home(sharing.start)
        self._copy(sharing)

    def finish_step(self) -> StepTransfers:
        """Ends the step; a step without rows issues its copies here. Does not wait for copies."""
        if self._next_layer == self._layers.start:
            self._copies_wait_for_compute()
            for sharing in self._sharing:
                self._home_waits_for_refill(sharing.start)
                self._refill_waits_for_home(sharing.start)
                self._copy(sharing)
            self._next_layer = self._layers.stop
        assert self._next_layer == self._layers.stop, "a layer was not left"
        refilled = len(self._refill_runs) if self._refill_runs else 0
        homed = len(self._home_runs) if self._home_runs else 0
        return StepTransfers(
            window_wait=self._wait_clock,
            refill_bytes=refilled * self._block_bytes,
            home_bytes=homed * self._block_bytes,
            issue_seconds=self._issue_seconds,
            copies=tuple(self._issued),
        )

    def drain(self) -> None:
        """Compute waits for every copy. Raises CopyError when one has failed."""
        self._home_stream.record().wait()
        self._refill_stream.record().wait()

    def close(self) -> None:
        """Ends the streams after what is queued. Never raises."""
        self._home_stream.close()
        self._refill_stream.close()

    def _compute_waits_for_home(self, layer: int) -> None:
        if (event := self._home_done.pop(layer, None)) is not None:
            event.wait()

    def _compute_waits_for_refill(self, layer: int) -> None:
        if (event := self._refill_done.pop(layer, None)) is not None:
            event.wait()

    def _copies_wait_for_compute(self) -> None:
        computed = self._device.record_compute()
        if self._home_runs is not None:
            self._home_stream.wait(computed)
        if self._refill_runs is not None:
            self._refill_stream.wait(computed)

    def _refill_waits_for_home(self, layer: int) -> None:
        # Of the steps before: this step's is not queued yet. After enter, compute has waited for it already.
        if (event := self._home_done.get(layer)) is not None:
            self._refill_stream.wait(event)

    def _home_waits_for_refill(self, layer: int) -> None:
        # Of the steps before, as above.
        if (event := self._refill_done.get(layer)) is not None:
            self._home_stream.wait(event)

    def _copy(self, sharing: range) -> None:
        pairs, began_seconds = self._copy_pools[sharing.start], time.monotonic()
        if self._refill_runs is not None:
            self._mark_start(CopyDirection.REFILL, self._refill_stream)
            self._refill_stream.copy_layers(pairs, self._refill_runs)
            self._mark_end(CopyDirection.REFILL, self._refill_stream, self._refill_runs, sharing)
            self._refill_done[sharing.start] = self._refill_stream.record()
        if self._home_runs is not None:
            self._mark_start(CopyDirection.HOME, self._home_stream)
            self._home_stream.copy_layers([(home, device) for device, home in pairs], self._home_runs)
            self._mark_end(CopyDirection.HOME, self._home_stream, self._home_runs, sharing)
            self._home_done[sharing.start] = self._home_stream.record()
        self._issue_seconds += time.monotonic() - began_seconds

    def _mark_start(self, direction: CopyDirection, stream: CopyStream) -> None:
        if direction not in self._starts:
            self._starts[direction] = stream.mark()

    def _mark_end(self, direction: CopyDirection, stream: CopyStream, runs: BlockRuns, sharing: range) -> None:
        if sharing.stop == self._layers.stop:
            num_bytes = len(runs) * self._block_bytes
            start, end = self._starts[direction], stream.mark()
            self._issued.append(IssuedCopies(self._step_id, direction, len(runs), num_bytes, start, end))

    def _check(self, plan: StepPlan) -> None:
        first = self._layers.start
        num_slots, num_homes = len(self._pools.device_pool(first)), len(self._pools.home_pool(first))
        home, refill, step = plan.write_home, plan.refill, f"step {plan.step_id}"
        for name, copies in (("write_home", home), ("refill", refill)):
            assert len(copies.slots) == len(copies.homes), f"{step}: {name} has not a home for each slot"
            assert _in_range(copies.slots, num_slots), f"{step}: a slot of {name} is not in [0, {num_slots})"
            assert _in_range(copies.homes, num_homes), f"{step}: a home of {name} is not in [0, {num_homes})"
        assert _distinct(home.homes), f"{step} writes a home twice"
        assert _distinct(refill.slots), f"{step} refills a slot twice"
        assert _disjoint(home.slots, refill.slots), f"{step} refills a slot that it writes home"
        assert _disjoint(home.homes, refill.homes), f"{step} refills from a home that it writes"


def _in_range(ids: Int32Array, num_blocks: int) -> bool:
    return not len(ids) or bool(ids.min() >= 0 and ids.max() < num_blocks)


def _distinct(ids: Int32Array) -> bool:
    return len(np.unique(ids)) == len(ids)


def _disjoint(ids: Int32Array, others: Int32Array) -> bool:
    return not len(ids) or not len(others) or not np.isin(ids, others).any()
