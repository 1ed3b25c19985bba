"""`BlockTable`: where the blocks of one request are, on the device and at home.

    block            0      1      2      3 (tail)
    slots            7     -1     12     31          device slot, or ABSENT
    homes            4      5      6      9          host block, reserved from the start
    home_tokens     16     16     16      0          tokens of the block whose home copy is valid

A block may be dropped from the device when its home copy covers every token in it. The tail changes with each token, so
it is dropped only when its request leaves the batch, after a copy of what it holds has gone home.
"""

from __future__ import annotations

import numpy as np

from pipemax.plan import Int32Array

ABSENT = -1
_NO_BLOCKS = np.empty(0, dtype=np.int32)


class BlockTable:
    """Blocks of one request. `slots`, `homes`, `home_tokens` are int32 [num_blocks]: views that `append` replaces."""

    __slots__ = ("_arrays", "block_size", "home_tokens", "homes", "num_absent", "num_blocks", "slots")

    slots: Int32Array
    homes: Int32Array
    home_tokens: Int32Array

    def __init__(self, *, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = 0
        self.num_absent = 0
        self._arrays = np.empty((3, 8), dtype=np.int32)
        self.slots, self.homes, self.home_tokens = self._arrays[:, :0]

    def append(self, *, slot: int, home: int) -> None:
        """One more block at the end, resident, with an empty home copy."""
        capacity = self._arrays.shape[1]
        if self.num_blocks == capacity:
            grown = np.empty((3, 2 * capacity), dtype=np.int32)
            grown[:, :capacity] = self._arrays
            self._arrays = grown
        arrays, block = self._arrays, self.num_blocks
        self.num_blocks += 1
        # Views are made here and not when asked for: every step reads the slots of every row, few rows get a block.
        self.slots = arrays[0, : self.num_blocks]
        self.homes = arrays[1, : self.num_blocks]
        self.home_tokens = arrays[2, : self.num_blocks]
        self.slots[block], self.homes[block], self.home_tokens[block] = slot, home, 0

    def place(self, block: int, slot: int) -> None:
        """An absent block becomes resident in `slot`."""
        assert self.slots[block] == ABSENT and slot >= 0
        self.slots[block] = slot
        self.num_absent -= 1

    def drop(self, block: int) -> int:
        """A resident block becomes absent; gives the slot that it leaves."""
        slot = int(self.slots[block])
        assert slot != ABSENT
        self.slots[block] = ABSENT
        self.num_absent += 1
        return slot

    def droppable(self, *, num_tokens: int, tail_too: bool) -> Int32Array:
        """Resident blocks whose home copy is complete, for a request with `num_tokens` in KV.

        Without `tail_too`, the last block and one that is not full stay out: they are, or will be, written to.
        """
        held = np.full(self.num_blocks, self.block_size, dtype=np.int32)
        if self.num_blocks:
            held[-1] = num_tokens - (self.num_blocks - 1) * self.block_size
        complete = (self.slots != ABSENT) & (self.home_tokens == held) & (held > 0)
        if not tail_too and self.num_blocks and held[-1] < self.block_size:
            complete[-1] = False
        return np.flatnonzero(complete).astype(np.int32)

    def absent_blocks(self) -> Int32Array:
        if not self.num_absent:
            return _NO_BLOCKS
        return np.flatnonzero(self.slots == ABSENT).astype(np.int32)
