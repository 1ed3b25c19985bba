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
from collections.abc import Iterator

_CHUNK_SIZES = (16, 8, 4, 2, 1)


class HomePool:
    """Free blocks among `0 ... num_blocks - 1`."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._held = bytearray(num_blocks)
        # By size of chunk: free blocks of each chunk; a heap of chunks that were free as a whole when they came in, and
        # which are in it.
        self._free_of = [self._chunks(size) for size in _CHUNK_SIZES]
        self._candidates = [
            [chunk for chunk, free in enumerate(counts) if free == size] for size, counts in self._levels()
        ]
        self._is_candidate = [bytearray(free == size for free in counts) for size, counts in self._levels()]

    def _levels(self) -> Iterator[tuple[int, list[int]]]:
        return zip(_CHUNK_SIZES, self._free_of, strict=True)

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
        for size, counts in self._levels():
            counts[block // size] -= 1
        return block

    def free(self, block: int) -> None:
        """Gives a held block back."""
        assert self._held[block], f"block {block} is not held"
        self._held[block] = 0
        self.num_free += 1
        for level, (size, counts) in enumerate(self._levels()):
            chunk = block // size
            counts[chunk] += 1
            if counts[chunk] == size and not self._is_candidate[level][chunk]:
                self._is_candidate[level][chunk] = 1
                heapq.heappush(self._candidates[level], chunk)

    def _first_of_largest(self) -> int:
        for level, (size, counts) in enumerate(self._levels()):
            candidates = self._candidates[level]
            while candidates:
                if counts[candidates[0]] == size:
                    return candidates[0] * size
                self._is_candidate[level][heapq.heappop(candidates)] = 0
        raise AssertionError("a free block is in no chunk")
