"""`PrefetchBudget`: how many blocks may travel to the device during one step.

DESIGN section 2, point 3: what the link moves while a step runs is free; more than that, and compute waits. The
budget is a number of blocks, so the planner needs no bytes and no seconds; a cost model that knows both sets it.
"""

from __future__ import annotations


class PrefetchBudget:
    """Blocks in one refill. A lone request may pass it: it must be able to come back, however long it is."""

    def __init__(self, *, blocks_per_step: int) -> None:
        assert blocks_per_step >= 0
        self.blocks_per_step = blocks_per_step

    def allows(self, refill_blocks: int, *, num_rows: int) -> bool:
        """Whether a refill of that size may serve a step of that many rows."""
        return num_rows <= 1 or refill_blocks <= self.blocks_per_step
