"""Hand-made plans: a small planner that tests drive an executor with, one request a row, blocks given by the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipemax.plan import BlockCopies, NewRequest, Phase, StepPlan
from pipemax.request import SamplingParams

NOTHING = BlockCopies(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))


def copies(pairs: Sequence[tuple[int, int]]) -> BlockCopies:
    """Of (slot, home) pairs."""
    if not pairs:
        return NOTHING
    slots, homes = zip(*pairs, strict=True)
    return BlockCopies(np.array(slots, dtype=np.int32), np.array(homes, dtype=np.int32))


@dataclass
class Row:
    """`num_new` tokens of a request after `num_computed`; `slots` are its blocks, in order."""

    request_id: int
    num_computed: int
    num_new: int
    slots: list[int] = field(default_factory=list)
    samples: bool = True


def new_request(request_id: int, prompt: Sequence[int], **sampling: object) -> NewRequest:
    params = SamplingParams(**{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return NewRequest(request_id, np.array(prompt, dtype=np.int32), params, 0, ())


def make_plan(
    step_id: int,
    rows: Sequence[Row],
    *,
    batch_id: int = 0,
    write_home: Sequence[tuple[int, int]] = (),
    refill: Sequence[tuple[int, int]] = (),
    new: Sequence[NewRequest] = (),
    finished: Sequence[int] = (),
    sampled_through: int | None = None,
) -> StepPlan:
    """`sampled_through` defaults to the step before."""
    return StepPlan(
        step_id=step_id,
        batch_id=batch_id,
        phase=Phase.MIXED if rows else Phase.COPY,
        request_ids=np.array([row.request_id for row in rows], dtype=np.int64),
        num_computed_tokens=np.array([row.num_computed for row in rows], dtype=np.int32),
        num_new_tokens=np.array([row.num_new for row in rows], dtype=np.int32),
        samples=np.array([row.samples for row in rows], dtype=np.bool_),
        block_table_indptr=np.cumsum([0, *(len(row.slots) for row in rows)], dtype=np.int32),
        block_table_indices=np.array([slot for row in rows for slot in row.slots], dtype=np.int32),
        write_home=copies(write_home),
        refill=copies(refill),
        new_requests=tuple(new),
        finished_request_ids=tuple(finished),
        sampled_through_step=step_id - 1 if sampled_through is None else sampled_through,
    )
