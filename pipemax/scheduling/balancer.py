"""`Balancer`: how many members each batch in flight should have.

The batches must take equally long on every stage, or the pipeline bubbles. This one equalises request counts: members that a batch
has too many leave for READY, and the batch that is short draws from there, oldest first.
"""

from __future__ import annotations


class Balancer:
    """Equal counts over `num_batches`, at most `max_rows` each."""

    def __init__(self, *, num_batches: int, max_rows: int) -> None:
        self._num_batches = num_batches
        self._max_rows = max_rows

    def target_rows(self, *, num_ready: int, num_running: int) -> int:
        """Members that a batch should have when all of them share what is there."""
        share = -(-(num_ready + num_running) // self._num_batches)
        return min(share, self._max_rows)
