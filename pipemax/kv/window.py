"""`Window`: the device slots that belong to nobody for longer than a step.

    step          k (batch A)        k+1 (batch B)      k+2 (batch A)
    window holds  absent blocks of A absent blocks of B absent blocks of A
    refilled      for B, as A leaves for A, as B leaves ...
                  each layer         each layer

All batches in flight share the same slots: layer by layer, each batch's blocks replace those of the batch before.
When the same batch runs twice in a row, what it left there is still there and is not copied again. The size follows
the link: slots come from the device pool and go back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipemax.kv.block_pool import BlockPool
from pipemax.kv.block_table import ABSENT, BlockTable
from pipemax.plan import BlockCopies, Int32Array

_NONE = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Placement:
    """Device slots of a step's rows, CSR: `indices[indptr[i]:indptr[i + 1]]` are row i's; and the refill for them."""

    indptr: Int32Array
    indices: Int32Array
    refill: BlockCopies


@dataclass(frozen=True, slots=True)
class _Held:
    """What the window holds when the step staged last begins: parallel arrays [n], in the order of the tables.

    owners   index of the table; `blocks`: its block; `slots`: the window slot
    """

    owners: np.ndarray
    blocks: np.ndarray
    slots: Int32Array


class Window:
    """Slots of the window, and the tables whose absent blocks it will hold when the step staged last begins."""

    def __init__(self, *, device: BlockPool, num_blocks: int) -> None:
        self._device = device
        self._slots = np.array([device.allocate() for _ in range(num_blocks)], dtype=np.int32)
        self._tables: dict[BlockTable, int] = {}  # whose absent blocks are held: index among the owners
        self._held = _Held(_NONE, _NONE, _NONE)

    @property
    def num_blocks(self) -> int:
        return len(self._slots)

    def place(self, tables: Sequence[BlockTable]) -> Placement:
        """Gives every absent block of the tables a slot, and says what must be copied into it."""
        indptr = np.zeros(len(tables) + 1, dtype=np.int32)
        np.cumsum(np.array([table.num_blocks for table in tables], dtype=np.int32), out=indptr[1:])
        slots = np.concatenate([_NONE, *(table.slots for table in tables)])
        absent = np.flatnonzero(slots == ABSENT)
        assert len(absent) <= len(self._slots), "more absent blocks than window slots"
        if not len(absent):
            self._tables, self._held = {}, _Held(_NONE, _NONE, _NONE)
            return Placement(indptr, slots, BlockCopies(_NONE, _NONE))
        owners = np.searchsorted(indptr, absent, side="right") - 1
        blocks = absent - indptr[owners]
        mine = self._held_slots(tables, owners, blocks)
        missing = mine == ABSENT
        if missing.all():
            mine = self._slots[: len(absent)]
        else:
            free = np.setdiff1d(self._slots, mine)
            mine[missing] = free[: np.count_nonzero(missing)]
        slots[absent] = mine
        homes = np.concatenate([table.homes for table in tables])[absent[missing]]
        self._tables = {table: index for index, table in enumerate(tables) if table.num_absent}
        self._held = _Held(owners, blocks, mine)
        return Placement(indptr, slots, BlockCopies(mine[missing], homes))

    def _held_slots(self, tables: Sequence[BlockTable], owners: np.ndarray, blocks: np.ndarray) -> Int32Array:
        """For each absent block the window slot that has it already, or ABSENT."""
        found = np.full(len(blocks), ABSENT, dtype=np.int32)
        if self._tables.keys().isdisjoint(tables):
            return found  # another batch was here, as in most steps of a pipeline
        for index, table in enumerate(tables):
            before = self._tables.get(table)
            if before is None:
                continue
            first, end = np.searchsorted(self._held.owners, (before, before + 1))
            held, held_slots = self._held.blocks[first:end], self._held.slots[first:end]
            first, end = np.searchsorted(owners, (index, index + 1))
            here = np.isin(blocks[first:end], held)
            found[first:end][here] = held_slots[np.searchsorted(held, blocks[first:end][here])]
        return found

    def resize(self, num_blocks: int) -> None:
        """Takes free device slots in, or gives slots back that the step staged last does not use.

        Reaches the wanted size as far as there are such slots. Earlier steps may still read slots that leave: they run
        before any step that could be given them.
        """
        more = min(num_blocks - len(self._slots), self._device.num_free)
        if more > 0:
            added = np.array([self._device.allocate() for _ in range(more)], dtype=np.int32)
            self._slots = np.sort(np.concatenate([self._slots, added]))
        elif more < 0:
            idle = np.setdiff1d(self._slots, self._held.slots)
            leaving = idle[max(0, len(idle) + num_blocks - len(self._slots)) :]
            for slot in leaving.tolist():
                self._device.free(slot)
            self._slots = np.setdiff1d(self._slots, leaving)

    def forget(self, table: BlockTable) -> None:
        """The table's blocks are no longer what they were: never count them as being there."""
        self._tables.pop(table, None)
