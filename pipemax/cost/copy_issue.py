"""`CopyIssue`: how many blocks a stage's host may queue for copying in a step, learnt from the steps as they finish.

A piece of a copy costs the thread that issues a step microseconds, however small it is, and blocks that do not lie
together are a piece each in every few layers. While that thread is ahead of its GPU it costs nothing. Once it is
behind, steps get longer, a longer step has a larger budget of the link, and so more to issue: on two H200, steps of
24 ms became 75 ms and stayed there. So a share of the step bounds it, whatever the link could bring:

    step      |------------------ compute ------------------|
    host      |-- layers --|-- copies --|  at most a third   |

Never here: the link's rate (`link_rate.py`), how copies are issued (`worker/transfer.py`).
"""

from __future__ import annotations

from collections import deque
from statistics import median

_STEP_SHARE = 1 / 3
# Of fewer blocks the cost of the calls is most.
_MIN_BLOCKS = 32


class CopyIssue:
    """The slowest stage's seconds a block; 0 until there is something to go by.

    window_steps   steps whose median is the estimate
    """

    def __init__(self, *, window_steps: int = 8) -> None:
        assert window_steps >= 1
        self._seconds_per_block: deque[float] = deque(maxlen=window_steps)
        self._estimate = 0.0

    def most_blocks(self, step_seconds: float) -> int | None:
        """Blocks that may be queued during a step of that length; None: no bound is known."""
        return int(_STEP_SHARE * step_seconds / self._estimate) if self._estimate > 0 else None

    def observe(self, *, num_blocks: int, copy_issue_seconds: float) -> None:
        """A step has queued that many blocks, both ways together, in that time."""
        if num_blocks >= _MIN_BLOCKS:
            self._seconds_per_block.append(copy_issue_seconds / num_blocks)
            self._estimate = median(self._seconds_per_block)
