"""`BlockPool`: which blocks of one memory (device slots, or host homes) are free.

Books only: no bytes, no owners. Lowest ids are handed out first, so that blocks allocated together tend to lie together
and copies merge. Invariant 4 of the design: free + held = total, checked on every call by construction and assertion.
"""

from __future__ import annotations

import heapq


class BlockPool:
    """Free list over block ids `0 ... num_blocks - 1`."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))  # a sorted list is a heap
        self._held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """The lowest free block. The caller has made sure that there is one."""
        assert self._free, "allocate() on an empty pool: the caller must check num_free"
        block = heapq.heappop(self._free)
        assert not self._held[block]
        self._held[block] = 1
        return block

    def free(self, block: int) -> None:
        """Gives a held block back."""
        assert self._held[block], f"block {block} is not held"
        self._held[block] = 0
        heapq.heappush(self._free, block)
