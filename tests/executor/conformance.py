"""What every Executor must do, as checks that take one: `test_conformance.py` runs them on all that there are.

The checks hand plans over and look at results only, so that they hold for stages of any kind. A `Session` numbers the
steps and requests of one executor over several checks; slots and homes start anew in each check.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from pipemax.executor.base import Executor
from pipemax.plan import NO_BATCH, Capacity, CopyDirection, StepPlan, StepResult
from tests.executor.plans import Row, make_plan, new_request

PROMPT = [5, 6, 7, 8, 9]
NUM_BLOCKS = 12  # that the executor's pools must have at least, of BLOCK_SIZE tokens, the window among them
BLOCK_SIZE = 4


class Session:
    """One executor, its next step and request."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._next_step = 0
        self._next_request = 0
        self._last_finished: tuple[int, ...] = ()

    def requests(self, count: int) -> list[int]:
        first, self._next_request = self._next_request, self._next_request + count
        return list(range(first, self._next_request))

    def submit(self, rows: Sequence[Row], **plan: object) -> StepPlan:
        """The next step. Requests that an earlier check left are finished with it."""
        finished = (*self._last_finished, *plan.pop("finished", ()))  # type: ignore[misc]
        self._last_finished = ()
        made = make_plan(self._next_step, rows, finished=finished, **plan)  # type: ignore[arg-type]
        self._next_step += 1
        self.executor.submit(made)
        return made

    def leave(self, request_ids: Sequence[int]) -> None:
        self._last_finished += tuple(request_ids)

    def collect(self, count: int) -> list[StepResult]:
        """That many results, one wait after the other."""
        results: list[StepResult] = []
        while len(results) < count:
            before = self.executor.now()
            more = self.executor.wait()
            assert more, "wait() came back with nothing"
            assert before <= self.executor.now(), "the clock went back"
            assert more[-1].finished_seconds <= self.executor.now(), "a result from the future"
            results += more
        assert len(results) == count, "more results than plans"
        return results


def check_capacity(session: Session) -> None:
    capacity = session.executor.capacity
    assert isinstance(capacity, Capacity)
    assert capacity.block_size == BLOCK_SIZE
    assert 0 <= capacity.num_window_blocks < capacity.num_device_blocks
    assert min(capacity.num_device_blocks, capacity.num_host_blocks) >= NUM_BLOCKS
    assert capacity.num_stages >= 1 and capacity.block_bytes >= 1
    assert session.executor.capacity == capacity


def check_results_match_plans_in_order(session: Session) -> None:
    """Two batches, four steps out before the first wait."""
    a, b, c = session.requests(3)
    plans = [
        session.submit(
            [Row(a, 0, 5, [0, 1]), Row(b, 0, 3, [2])], new=[new_request(a, PROMPT), new_request(b, PROMPT[:3])]
        ),
        session.submit([Row(c, 0, 4, [3])], batch_id=1, new=[new_request(c, PROMPT[:4])]),
        session.submit([Row(b, 3, 1, [2]), Row(a, 5, 1, [0, 1])]),
        session.submit([Row(c, 4, 1, [3, 4])], batch_id=1),
    ]
    results = session.collect(4)
    assert [result.step_id for result in results] == [plan.step_id for plan in plans]
    assert [result.batch_id for result in results] == [0, 1, 0, 1]
    assert [result.request_ids.tolist() for result in results] == [[a, b], [c], [b, a], [c]]
    finished = [result.finished_seconds for result in results]
    assert finished == sorted(finished)
    for plan, result in zip(plans, results, strict=True):
        check_result(plan, result, num_stages=session.executor.capacity.num_stages)
    session.leave([a, b, c])


def check_result(plan: StepPlan, result: StepResult, *, num_stages: int) -> None:
    """The form of any result."""
    assert result.request_ids.dtype == np.int64 and result.token_ids.dtype == np.int32
    assert result.request_ids.tolist() == plan.request_ids[plan.samples].tolist()
    assert result.token_ids.shape == result.request_ids.shape
    assert set(result.row_errors) == set(result.request_ids[result.token_ids == -1].tolist())
    assert result.logprobs is None or len(result.logprobs) == len(result.request_ids)
    assert len(result.timings) in (0, num_stages), "timings are of all stages, or of none where nothing is measured"
    starts = [timing.start_seconds for timing in result.timings]
    assert not plan.num_rows or starts == sorted(starts), "a stage cannot start before the one in front of it"
    for timing in result.timings:
        parts = (timing.compute_seconds, timing.window_wait_seconds, timing.activation_wait_seconds)
        assert all(math.isfinite(part) and part >= 0 for part in parts)
        # Every stage moves the same blocks; how large one is depends on its layers.
        assert (timing.refill_bytes > 0) == (len(plan.refill) > 0)
        assert (timing.home_bytes > 0) == (len(plan.write_home) > 0)


def check_only_rows_that_sample_give_tokens(session: Session) -> None:
    a, b = session.requests(2)
    first = session.submit(
        [Row(a, 0, 2, [0], samples=False), Row(b, 0, 5, [1, 2])], new=[new_request(a, PROMPT), new_request(b, PROMPT)]
    )
    second = session.submit([Row(a, 2, 2, [0], samples=False)])
    third = session.submit([Row(a, 4, 1, [0, 3])])
    results = session.collect(3)
    assert [result.request_ids.tolist() for result in results] == [[b], [], [a]]
    for plan, result in zip((first, second, third), results, strict=True):
        check_result(plan, result, num_stages=session.executor.capacity.num_stages)
    session.leave([a, b])


def check_blocks_travel(session: Session) -> None:
    """A full block goes home, its slot serves another, it comes back for the step that follows."""
    a, b = session.requests(2)
    plans = [
        session.submit([Row(a, 0, 5, [0, 1])], write_home=[(0, 7)], new=[new_request(a, PROMPT)]),
        session.submit([Row(b, 0, 4, [0])], new=[new_request(b, PROMPT[:4])]),
        session.submit([Row(b, 4, 1, [0, 2])], write_home=[(0, 8)], refill=[(3, 7)]),
        session.submit([Row(a, 5, 1, [3, 1])], refill=[(0, 8)]),
    ]
    results = session.collect(4)
    for plan, result in zip(plans, results, strict=True):
        check_result(plan, result, num_stages=session.executor.capacity.num_stages)
    session.leave([a, b])


def check_steps_without_rows(session: Session) -> None:
    """They only move blocks; their results have no rows and keep their place in the order."""
    (a,) = session.requests(1)
    plans = [
        session.submit([Row(a, 0, 5, [0, 1])], write_home=[(0, 7)], new=[new_request(a, PROMPT)]),
        session.submit([], batch_id=NO_BATCH, refill=[(4, 7)]),
        session.submit([Row(a, 5, 1, [4, 1])]),
        session.submit([], batch_id=NO_BATCH, write_home=[(1, 9)], finished=[a]),
    ]
    results = session.collect(4)
    assert [result.batch_id for result in results] == [0, NO_BATCH, 0, NO_BATCH]
    assert [len(result.token_ids) for result in results] == [1, 0, 1, 0]
    for plan, result in zip(plans, results, strict=True):
        check_result(plan, result, num_stages=session.executor.capacity.num_stages)


def check_copies_are_told_of_with_their_times(session: Session) -> None:
    """Once on every stage; between the step that they belong to and the end of the next one with rows, on all clocks.

    Copies that the last step brings up are waited for by nobody: they may be told of or not.
    """
    (a,) = session.requests(1)
    plans = [
        session.submit([Row(a, 0, 5, [0, 1])], write_home=[(0, 7)], new=[new_request(a, PROMPT)]),
        session.submit([Row(a, 5, 1, [0, 1])], refill=[(4, 7)]),
        session.submit([Row(a, 6, 1, [4, 1])], write_home=[(4, 9)]),
        session.submit([Row(a, 7, 1, [4, 1])], refill=[(5, 9)]),
    ]
    results = session.collect(4)
    session.leave([a])
    wanted = {
        (plans[0].step_id, CopyDirection.HOME),
        (plans[1].step_id, CopyDirection.REFILL),
        (plans[2].step_id, CopyDirection.HOME),
    }
    by_step = {result.step_id: result for result in results}
    for stage in range(min(len(result.timings) for result in results)):
        told = [copy for result in results for copy in result.timings[stage].copies if copy.step_id in by_step]
        keys = [(copy.step_id, copy.direction) for copy in told]
        assert len(set(keys)) == len(keys) and wanted <= set(keys) <= {*wanted, (plans[3].step_id, "refill")}
        for copy in told:
            here = by_step[copy.step_id].timings[stage]
            assert copy.num_blocks == 1
            assert copy.num_bytes == (here.home_bytes if copy.direction is CopyDirection.HOME else here.refill_bytes)
            assert here.start_seconds <= copy.start_seconds <= copy.end_seconds
            if copy.step_id != plans[3].step_id:
                after = by_step[copy.step_id + 1].timings[stage]
                next_end_seconds = after.start_seconds + after.window_wait_seconds + after.compute_seconds
                assert copy.end_seconds <= next_end_seconds + 1e-9


CHECKS: tuple[Callable[[Session], None], ...] = (
    check_capacity,
    check_results_match_plans_in_order,
    check_only_rows_that_sample_give_tokens,
    check_blocks_travel,
    check_steps_without_rows,
    check_copies_are_told_of_with_their_times,
)


class OneResultAWait:
    """An executor whose results come one by one, however fast they are: what is planned depends on nothing else."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []

    @property
    def capacity(self) -> Capacity:
        return self._executor.capacity

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._executor.submit(plan)

    def wait(self) -> list[StepResult]:
        if not self._results:
            self._results.extend(self._executor.wait())
        return [self._results.popleft()]

    def now(self) -> float:
        return self._executor.now()

    def shutdown(self) -> None:
        self._executor.shutdown()
