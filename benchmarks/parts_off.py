"""Parts of the scheduler that do nothing: what a part is worth is measured by putting one of these in its place.

`unittest.mock.patch("pipemax.control_plane.Balancer", NoBalance)` and the like, around what builds an engine.
"""

from __future__ import annotations

from pipemax.scheduling.balancer import Balancer
from pipemax.scheduling.turns import Turns
from pipemax.scheduling.window_size import WindowSize


class NoBalance(Balancer):
    """Batches take whoever is ready, as long as there is room for it."""

    def target_rows(self, *, num_ready: int, num_running: int) -> int:
        return self._max_rows

    def may_join(self, *, batch_blocks: int, request_blocks: int, live_blocks: int) -> bool:
        return True


class NoTurns(Turns):
    """Whoever has joined a batch runs to its end, oldest first."""

    def are_taken(self, *, num_waiting: int, num_ready: int, free_homes: int, growth_blocks: int) -> bool:
        return False


class LargestWindow(WindowSize):
    """As large as the link allows, whatever its copies cost."""

    def blocks(self, most: int, *, held_blocks: int) -> int:
        return most
