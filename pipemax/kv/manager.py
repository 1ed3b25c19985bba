"""`KVManager`: the books of KV residency: home, resident, window, absent.

What lives here: both block pools, every request's block table, the window, and the verbs that keep them consistent.
What never does: which request deserves memory (`scheduling/`), bytes and copies (`worker/`).

Two ways for a block to be on the device during a step: resident (its table names the slot) or in the window. Every
block has a home from the start, so leaving the device is a drop. A copy home that plan k carries counts from plan k+1
on:

    schedule(k)    compose write_home(k), stage step k+1, compose refill(k)     copies of k are "going home"
    schedule(k+1)  commit_homes(): they are home; their slots may be dropped and refilled from now on

which is what makes invariant 1 (no slot reused before its home copy is valid) hold without any talk with the workers:
they keep the order of `plan.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pipemax.config import KVOffload
from pipemax.kv.block_pool import BlockPool
from pipemax.kv.block_table import ABSENT, BlockTable
from pipemax.kv.home_pool import HomePool
from pipemax.kv.window import Placement, Window
from pipemax.plan import BlockCopies, Capacity


def _copies(pairs: Sequence[tuple[int, int]]) -> BlockCopies:
    array = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return BlockCopies(slots=array[:, 0].copy(), homes=array[:, 1].copy())


class KVManager:
    """Residency of every live request's KV. All counts are blocks."""

    def __init__(self, *, capacity: Capacity, offload: KVOffload) -> None:
        assert capacity.num_window_blocks < capacity.num_device_blocks
        assert offload is KVOffload.ON or not capacity.num_window_blocks
        self.offload = offload
        self.block_size = capacity.block_size
        self.device = BlockPool(capacity.num_device_blocks)
        # Without offloading homes are a formality: as many as there are slots.
        self.host = HomePool(capacity.num_host_blocks if offload is KVOffload.ON else capacity.num_device_blocks)
        self.window = Window(device=self.device, num_blocks=capacity.num_window_blocks)
        self._tables: dict[int, BlockTable] = {}
        self._going_home: list[tuple[BlockTable, int, int]] = []  # table, block, tokens
        self._home_copies: list[tuple[int, int]] = []  # slot, home of the plan being composed
        self._busy_slots: set[int] = set()  # slots that the last plan writes home
        self._deferred_slots: list[int] = []  # freed while busy
        self._promoted: dict[tuple[int, int], int] = {}  # (request, block): slot, for the step being staged

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def tables(self) -> Mapping[int, BlockTable]:
        """Block tables by request."""
        return self._tables

    def missing_blocks(self, request_id: int, num_tokens: int) -> int:
        """Blocks to allocate before the request's KV can hold `num_tokens`."""
        return max(0, self.blocks_for(num_tokens) - self._tables[request_id].num_blocks)

    @property
    def num_promoted(self) -> int:
        """Blocks that the refill being composed brings to slots of their own."""
        return len(self._promoted)

    # -- life of a request ---------------------------------------------------------------------------------------------

    def add(self, request_id: int) -> None:
        assert request_id not in self._tables
        self._tables[request_id] = BlockTable(block_size=self.block_size)

    def grow(self, request_id: int, num_tokens: int) -> int:
        """Allocates slots and homes up to `num_tokens`; gives how many. The caller has made room in both pools."""
        table = self._tables[request_id]
        num_missing = self.missing_blocks(request_id, num_tokens)
        for _ in range(num_missing):
            last_home = int(table.homes[-1]) if table.num_blocks else None
            table.append(slot=self.device.allocate(), home=self.host.allocate(after=last_home))
        return num_missing

    def release(self, request_id: int) -> None:
        """The request is over (or starts anew): all its blocks are free.

        Steps submitted earlier may still touch them; they run before any step that could use them again. What the
        refill being composed was to bring for it stays at home.
        """
        table = self._tables.pop(request_id)
        for slot in table.slots.tolist():
            if slot != ABSENT:
                self._free_slot(slot)
        for home in table.homes.tolist():
            self.host.free(home)
        self.window.forget(table)
        self._going_home = [entry for entry in self._going_home if entry[0] is not table]
        if self._promoted:
            self._promoted = {key: slot for key, slot in self._promoted.items() if key[0] != request_id}

    # -- going home ----------------------------------------------------------------------------------------------------

    def commit_homes(self) -> None:
        """Start of a new plan: what the last plan sends home is home for all that this plan does."""
        assert not self._home_copies and not self._promoted, "the last plan was not taken"
        for table, block, num_tokens in self._going_home:
            table.home_tokens[block] = num_tokens
        self._going_home.clear()
        self._busy_slots.clear()
        for slot in self._deferred_slots:
            self.device.free(slot)
        self._deferred_slots.clear()

    def write_home(self, request_id: int, *, first_token: int, num_tokens: int, partial_too: bool) -> None:
        """Sends home the blocks that tokens `[first_token, num_tokens)` filled, and the unfilled tail if asked.

        A block whose home copy is complete already is not sent again. Without offloading nothing is sent, and so
        nothing is ever dropped.
        """
        if self.offload is KVOffload.OFF:
            return
        table = self._tables[request_id]
        last = self.blocks_for(num_tokens) if partial_too else num_tokens // self.block_size
        for block in range(first_token // self.block_size, last):
            held = min(self.block_size, num_tokens - block * self.block_size)
            slot, home, valid = int(table.slots[block]), int(table.homes[block]), int(table.home_tokens[block])
            if valid == held or slot in self._busy_slots:
                continue
            assert slot != ABSENT, "a block without a complete home copy is never dropped"
            self._home_copies.append((slot, home))
            self._going_home.append((table, block, held))
            self._busy_slots.add(slot)

    def take_write_home(self) -> BlockCopies:
        """The write_home of the plan being composed; the next plan starts empty."""
        copies = _copies(self._home_copies)
        self._home_copies.clear()
        return copies

    # -- dropping and coming back --------------------------------------------------------------------------------------

    def drop(self, request_id: int, *, num_tokens: int, at_most: int, tail_too: bool) -> int:
        """Drops up to `at_most` blocks with complete homes, first blocks first; gives how many."""
        table = self._tables[request_id]
        dropped = 0
        for block in table.droppable(num_tokens=num_tokens, tail_too=tail_too).tolist():
            if dropped == at_most:
                break
            if int(table.slots[block]) in self._busy_slots or (request_id, block) in self._promoted:
                continue
            self._free_slot(table.drop(block))
            dropped += 1
        return dropped

    def promote(self, request_id: int, block: int) -> None:
        """An absent block gets a slot of its own; the plan being composed refills it."""
        slot = self.device.allocate()
        self._tables[request_id].place(block, slot)
        self._promoted[(request_id, block)] = slot

    def place(self, request_ids: Iterable[int]) -> Placement:
        """Slots of every block of the given rows: resident ones, and the window for the rest."""
        placement = self.window.place([self._tables[request_id] for request_id in request_ids])
        if not self._promoted:
            return placement
        refill = placement.refill
        promoted = _copies([(s, int(self._tables[rid].homes[b])) for (rid, b), s in self._promoted.items()])
        self._promoted.clear()
        both = BlockCopies(
            np.concatenate([refill.slots, promoted.slots]), np.concatenate([refill.homes, promoted.homes])
        )
        return dataclasses.replace(placement, refill=both)

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _free_slot(self, slot: int) -> None:
        # A slot that the plan being composed writes home must not become a target of that plan's refill.
        if slot in self._busy_slots:
            self._deferred_slots.append(slot)
        else:
            self.device.free(slot)
