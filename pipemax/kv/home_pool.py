"""`HomePool`: which home blocks in host memory are free, and which one a growing request gets.

Blocks that lie together travel together: a copy of many small pieces takes the link at half its rate, and each piece
costs the host a microsecond or more. A request grows by a block now and then, in turns with all others, so that lowest
first would scatter it. Here it grows where it is, and whoever starts does so where most is free behind him:

    first block        the lowest of the largest free chunks (16 blocks, aligned; else 8, 4, 2, 1)
    every further one  the block behind the one before, if it is free; else as the first

Nothing is held back for anyone: when memory is short every free block is given out. Books only: no bytes, no owners.
Invariant 4 of the design: free + held = total.
"""

from __future__ import annotations

import heapq

_CHUNK_SIZES = (16, 8, 4, 2, 1)


class HomePool:
    """Free blocks among `0 ... num_blocks - 1`."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._held = bytearray(num_blocks)
        # By size of chunk: free blocks of each chunk, and a heap of chunks that were free as a whole when they came in.
        self._free_of = [self._chunks(size) for size in _CHUNK_SIZES]
        self._candidates = [
            [chunk for chunk, free in enumerate(counts) if free == size]
            for size, counts in zip(_CHUNK_SIZES, self._free_of, strict=True)
        ]

    def _chunks(self, size: int) -> list[int]:
        whole, rest = divmod(self.num_blocks, size)
        return [size] * whole + ([rest] if rest else [])

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, *, after: int | None) -> int:
        """A free block for a request whose last one is `after`. The caller has made sure that there is one."""
        assert self.num_free, "allocate() on an empty pool: the caller must check num_free"
        block = after + 1 if after is not None else self.num_blocks
        if block >= self.num_blocks or self._held[block]:
            block = self._first_of_largest()
        self._held[block] = 1
        self.num_free -= 1
        for size, counts in zip(_CHUNK_SIZES, self._free_of, strict=True):
            counts[block // size] -= 1
        return block

    def free(self, block: int) -> None:
        """Gives a held block back."""
        assert self._held[block], f"block {block} is not held"
        self._held[block] = 0
        self.num_free += 1
        for size, counts, candidates in zip(_CHUNK_SIZES, self._free_of, self._candidates, strict=True):
            chunk = block // size
            counts[chunk] += 1
            if counts[chunk] == size:
                heapq.heappush(candidates, chunk)

    def _first_of_largest(self) -> int:
        for size, counts, candidates in zip(_CHUNK_SIZES, self._free_of, self._candidates, strict=True):
            while candidates:
                # It stays: whole again, it would come in again, and once it is not, it is passed over here.
                if counts[candidates[0]] == size:
                    return candidates[0] * size
                heapq.heappop(candidates)
        raise AssertionError("a free block is in no chunk")
