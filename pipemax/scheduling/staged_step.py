"""`StagedStep`: the rows of a step and where their blocks will be, decided one call before its plan is made.

Never here: who gets a row (`scheduler.py`), the plan that comes of it (`plan.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipemax.kv.window import Placement
from pipemax.plan import NO_BATCH, BlockCopies, Phase
from pipemax.scheduling.request_state import RequestState, Status

_NO_BLOCKS = np.empty(0, dtype=np.int32)


class Chunk(NamedTuple):
    """A row of prefill."""

    request: RequestState
    num_new: int
    samples: bool  # whether it is the last one, that yields a token: with it, every token that exists has its KV


@dataclass(frozen=True, slots=True)
class StagedStep:
    """Rows in the order of the plan: one new token, and one sampled, for each of `members`; then `chunks`.

    Members are hundreds of rows that are all alike, so they are treated as a whole wherever that is possible.
    """

    batch_id: int
    members: list[RequestState]
    chunks: list[Chunk]
    placement: Placement

    @property
    def requests(self) -> list[RequestState]:
        return [*self.members, *[chunk.request for chunk in self.chunks]]

    @property
    def phase(self) -> Phase:
        if not self.members and not self.chunks:
            return Phase.COPY
        return Phase.MIXED if self.members and self.chunks else Phase.DECODE if self.members else Phase.PREFILL

    def still_live(self) -> StagedStep:
        """Without the rows of requests that have finished meanwhile. The refill stays: it is on its way already."""
        is_live = np.array([request.status is not Status.FINISHED for request in self.requests], dtype=np.bool_)
        if is_live.all():
            return self
        lengths = np.diff(self.placement.indptr)
        indptr = np.zeros(np.count_nonzero(is_live) + 1, dtype=np.int32)
        np.cumsum(lengths[is_live], out=indptr[1:])
        return StagedStep(
            self.batch_id,
            [request for request in self.members if request.status is not Status.FINISHED],
            [chunk for chunk in self.chunks if chunk.request.status is not Status.FINISHED],
            Placement(indptr, self.placement.indices[np.repeat(is_live, lengths)], self.placement.refill),
        )


NO_ROWS = StagedStep(
    NO_BATCH, [], [], Placement(np.zeros(1, dtype=np.int32), _NO_BLOCKS, BlockCopies(_NO_BLOCKS, _NO_BLOCKS))
)
