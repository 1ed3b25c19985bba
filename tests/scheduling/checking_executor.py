"""An Executor that runs plans on symbolic memory and checks every promise of the seam.

A slot or a home holds, per layer-less block, the list of (request, position) whose KV lies there. Plans run one after
the other in the order of `plan.py`: compute, then write_home, then refill. Reading anything but the right tokens is
an AssertionError. Tokens are a fixed function of (request, output index), so that every schedule must give the same
outputs.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from pipemax.plan import NO_BATCH, Capacity, StepPlan, StepResult

Cell = tuple[int, int]  # request id, position


def expected_token(request_id: int, index: int) -> int:
    return (request_id * 7919 + index * 104729) % 50000 + 10


class CheckingExecutor:
    """Symbolic stages; one result a wait().

    `endings[request_id]` is the number of outputs after which a stop token comes (unknown to the scheduler).
    """

    STOP_TOKEN = 3

    def __init__(self, capacity: Capacity, *, max_plans_per_batch: int, endings: dict[int, int]) -> None:
        self.capacity = capacity
        self._max_plans_per_batch = max_plans_per_batch
        self._endings = endings
        self._slots: list[list[Cell]] = [[] for _ in range(capacity.num_device_blocks)]
        self._homes: list[list[Cell]] = [[] for _ in range(capacity.num_host_blocks)]
        self._prompts: dict[int, int] = {}
        self._outputs: dict[int, int] = {}
        self._sampled_at: dict[int, int] = {}
        self._finished: set[int] = set()
        self._queue: deque[StepPlan] = deque()
        self._next_step = 0
        self._copies_allowed = True
        self.plans: list[StepPlan] = []

    def refuse_copies(self) -> None:
        """Without offloading, no plan may move a block."""
        self._copies_allowed = False

    def submit(self, plan: StepPlan) -> None:
        assert plan.step_id == self._next_step
        assert self._copies_allowed or not (len(plan.write_home) or len(plan.refill))
        self._next_step += 1
        self.plans.append(plan)
        self._queue.append(plan)
        in_flight = [p.batch_id for p in self._queue if p.batch_id != NO_BATCH]
        for batch_id in set(in_flight):
            assert in_flight.count(batch_id) <= self._max_plans_per_batch, "too many plans in flight for a batch"

    def now(self) -> float:
        return float(self._next_step)

    def wait(self) -> list[StepResult]:
        assert self._queue, "wait() with nothing in flight"
        return [self._run(self._queue.popleft())]

    def shutdown(self) -> None:
        pass

    def _run(self, plan: StepPlan) -> StepResult:
        size = self.capacity.block_size
        for request_id in plan.finished_request_ids:
            assert request_id in self._prompts, "finished before it was announced"
            self._finished.add(request_id)
        for new in plan.new_requests:
            assert new.request_id not in self._prompts, "announced twice"
            self._prompts[new.request_id] = len(new.prompt_token_ids)
            self._outputs[new.request_id] = 0
        ids = plan.request_ids.tolist()
        assert len(set(ids)) == len(ids)
        written: set[int] = set()
        sampled_ids, tokens = [], []
        for row, request_id in enumerate(ids):
            assert request_id in self._prompts and request_id not in self._finished
            computed, new = int(plan.num_computed_tokens[row]), int(plan.num_new_tokens[row])
            known = self._prompts[request_id] + self._outputs[request_id]
            assert new >= 1 and computed + new <= known, "a token that does not exist yet"
            assert bool(plan.samples[row]) == (computed + new == known)
            assert self._sampled_at.get(request_id, -1) <= plan.sampled_through_step < plan.step_id
            begin, end = plan.block_table_indptr[row], plan.block_table_indptr[row + 1]
            slots = plan.block_table_indices[begin:end].tolist()
            assert len(slots) == -(-(computed + new) // size)
            for position in range(computed):
                block, offset = divmod(position, size)
                cells = self._slots[slots[block]]
                assert len(cells) > offset and cells[offset] == (request_id, position), "attention reads a wrong block"
            for position in range(computed, computed + new):
                block, offset = divmod(position, size)
                assert slots[block] not in written or self._slots[slots[block]][0][0] == request_id
                written.add(slots[block])
                del self._slots[slots[block]][offset:]
                assert len(self._slots[slots[block]]) == offset
                self._slots[slots[block]].append((request_id, position))
            if plan.samples[row]:
                index = self._outputs[request_id]
                self._outputs[request_id] += 1
                self._sampled_at[request_id] = plan.step_id
                sampled_ids.append(request_id)
                ending = self._endings.get(request_id)
                tokens.append(self.STOP_TOKEN if index + 1 == ending else expected_token(request_id, index))
        home_slots, refill_slots = set(plan.write_home.slots.tolist()), plan.refill.slots.tolist()
        assert len(home_slots) == len(plan.write_home) and len(set(refill_slots)) == len(refill_slots)
        assert not home_slots & set(refill_slots), "a slot is written home and refilled in one plan"
        assert not set(plan.write_home.homes.tolist()) & set(plan.refill.homes.tolist())
        for slot, home in zip(plan.write_home.slots.tolist(), plan.write_home.homes.tolist(), strict=True):
            assert self._slots[slot], "an empty block is written home"
            self._homes[home] = list(self._slots[slot])
        for slot, home in zip(refill_slots, plan.refill.homes.tolist(), strict=True):
            self._slots[slot] = list(self._homes[home])
        return StepResult(
            step_id=plan.step_id,
            batch_id=plan.batch_id,
            request_ids=np.array(sampled_ids, dtype=np.int64),
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=None,
            row_errors={},
            finished_seconds=float(plan.step_id),
            timings=(),
        )
