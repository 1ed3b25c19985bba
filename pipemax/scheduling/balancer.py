"""`Balancer`: how much each batch in flight should hold.

The batches must take equally long on every stage, or the pipeline bubbles. Two measures, because a step's time has
two parts: rows (weights are read once for all of them) and KV blocks (attention reads each). Blocks are shared out by
what memory can hold alive, `R + N*W` for N batches (DESIGN section 1): every batch may fill an Nth of it.
"""

from __future__ import annotations


class Balancer:
    """Equal shares over `num_batches`; at most `max_rows` rows each."""

    def __init__(self, *, num_batches: int, max_rows: int) -> None:
        self._num_batches = num_batches
        self._max_rows = max_rows

    def target_rows(self, *, num_ready: int, num_running: int) -> int:
        """Members that a batch should have when all of them share what is there."""
        share = -(-(num_ready + num_running) // self._num_batches)
        return min(share, self._max_rows)

    def may_join(self, *, batch_blocks: int, request_blocks: int, live_blocks: int) -> bool:
        """Whether a batch that holds `batch_blocks` should take a request on. An empty batch always may.

        live_blocks   KV blocks that all batches together may hold: resident ones, and the window once for each batch
        """
        return batch_blocks == 0 or batch_blocks + request_blocks <= live_blocks // self._num_batches
