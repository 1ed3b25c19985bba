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
from pipemax.kv.block_table import BlockTable
from pipemax.plan import Int32Array


@dataclass(frozen=True, slots=True)
class WindowCopies:
    """Blocks that must be brought in: slots and homes, int32 [n]."""

    slots: Int32Array
    homes: Int32Array


class Window:
    """Slots of the window, and the tables whose absent blocks it will hold when the step staged last begins."""

    def __init__(self, *, device: BlockPool, num_blocks: int) -> None:
        self._device = device
        self._slots = np.array([device.allocate() for _ in range(num_blocks)], dtype=np.int32)
        self._holds: dict[BlockTable, Int32Array] = {}  # which of its blocks, sorted; slots in the table's window row

    @property
    def num_blocks(self) -> int:
        return len(self._slots)

    def assign(self, tables: Sequence[BlockTable]) -> WindowCopies:
        """Gives every absent block of the tables a slot (`BlockTable.window_slots`), and says what must be copied."""
        # In most steps most tables have none: they cost nothing here.
        wanted = [(table, table.absent_blocks()) for table in tables if table.num_absent]
        assert sum(len(blocks) for _, blocks in wanted) <= len(self._slots), "more absent blocks than window slots"
        taken = np.zeros(len(self._slots), dtype=np.bool_)
        missing = []
        for table, blocks in wanted:
            held = self._holds.get(table)
            if held is None:
                missing.append((table, blocks))
                continue
            here = np.isin(blocks, held)
            taken[np.searchsorted(self._slots, table.window_slots[blocks[here]])] = True
            missing.append((table, blocks[~here]))
        free, used = self._slots[~taken], 0
        slots, homes = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int32)]
        for table, blocks in missing:
            slots.append(free[used : used + len(blocks)])
            homes.append(table.homes[blocks])
            table.window_slots[blocks] = slots[-1]
            used += len(blocks)
        self._holds = dict(wanted)
        return WindowCopies(np.concatenate(slots), np.concatenate(homes))

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
            in_use = [table.window_slots[blocks] for table, blocks in self._holds.items()]
            idle = np.setdiff1d(self._slots, np.concatenate([np.empty(0, dtype=np.int32), *in_use]))
            leaving = idle[max(0, len(idle) + num_blocks - len(self._slots)) :]
            for slot in leaving.tolist():
                self._device.free(slot)
            self._slots = np.setdiff1d(self._slots, leaving)

    def forget(self, table: BlockTable) -> None:
        """The table's blocks are no longer what they were: never count them as being there."""
        self._holds.pop(table, None)
