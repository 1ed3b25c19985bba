"""`PrefetchBudget`: how many blocks may travel to the device during one step, and who of them may take the window.

DESIGN section 2, point 3: what the link moves while a step runs is free; more than that, and compute waits. The
budget is a number of blocks, set before each step from the forecast. A share of it is kept from the window for
requests that come back from host memory: with none left, nobody could ever join.

    budget      |------------ window: blocks that travel every turn ------------|-- joining --|
"""

from __future__ import annotations

_JOINING_SHARE = 0.1


class PrefetchBudget:
    """Blocks in one refill. A step of one row may pass it: a request must be able to run, however long it is."""

    def __init__(self, *, blocks_per_step: int) -> None:
        assert blocks_per_step >= 0
        self.blocks_per_step = blocks_per_step

    @property
    def window_blocks(self) -> int:
        """Absent blocks that a batch should have at most."""
        return self.blocks_per_step - round(_JOINING_SHARE * self.blocks_per_step)

    def left(self, refill_blocks: int) -> int:
        """Blocks that may still be added to a refill."""
        return max(0, self.blocks_per_step - refill_blocks)

    def allows(self, refill_blocks: int, *, num_rows: int) -> bool:
        """Whether a refill of that size may serve a step of that many rows."""
        return num_rows <= 1 or refill_blocks <= self.blocks_per_step
