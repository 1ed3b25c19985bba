"""`CopyLog`: the copies of a stage that are under way, until they have ended and somebody has been told when they ran.

    step k     issue copies(k) ......... report k: what has ended of earlier steps' copies, seldom of its own
    step k+1   waits for copies(k) ..... report k+1: copies(k)

A report never waits for copies. Used by one thread, the one that reports. Never here: copying, clocks (`device.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pipemax.plan import CopyDirection, CopyTiming
from pipemax.worker.device import CopyMark


@dataclass(frozen=True, slots=True)
class IssuedCopies:
    """All copies of one direction of a step: `start` lies before the first layer's, `end` after the last one's."""

    step_id: int
    direction: CopyDirection
    num_blocks: int
    num_bytes: int
    start: CopyMark
    end: CopyMark

    def timing(self) -> CopyTiming | None:
        """None while they are under way."""
        end_seconds = self.end.passed_seconds()
        start_seconds = None if end_seconds is None else self.start.passed_seconds()
        if end_seconds is None or start_seconds is None:
            return None
        return CopyTiming(self.step_id, self.direction, self.num_blocks, self.num_bytes, start_seconds, end_seconds)


class CopyLog:
    """See the module."""

    def __init__(self) -> None:
        self._under_way: deque[IssuedCopies] = deque()

    def add(self, copies: Sequence[IssuedCopies]) -> None:
        """Copies of the latest step."""
        self._under_way.extend(copies)

    def take_ended(self) -> tuple[CopyTiming, ...]:
        """When those ran that have ended since the last call; never blocks."""
        ended: list[CopyTiming] = []
        for _ in range(len(self._under_way)):
            copies = self._under_way.popleft()
            timing = copies.timing()
            if timing is None:
                self._under_way.append(copies)
            else:
                ended.append(timing)
        return tuple(ended)
