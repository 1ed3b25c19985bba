"""`CheckedSimulation`: the simulator's times, and every plan's contents checked on symbolic memory.

Tokens are those of the symbolic stages; results come when the simulator's clock says.
"""

from __future__ import annotations

import dataclasses

from pipemax.executor.simulator import SimExecutor
from pipemax.plan import Capacity, StepPlan, StepResult
from tests.scheduling.checking_executor import CheckingExecutor


class CheckedSimulation:
    """Implements `Executor` over both."""

    def __init__(self, *, simulator: SimExecutor, checker: CheckingExecutor) -> None:
        assert simulator.capacity == checker.capacity
        self._simulator = simulator
        self._checker = checker

    @property
    def capacity(self) -> Capacity:
        return self._simulator.capacity

    def submit(self, plan: StepPlan) -> None:
        self._checker.submit(plan)
        self._simulator.submit(plan)

    def wait(self) -> list[StepResult]:
        results = []
        for timed in self._simulator.wait():
            (checked,) = self._checker.wait()
            assert (checked.step_id, checked.batch_id) == (timed.step_id, timed.batch_id)
            assert checked.request_ids.tolist() == timed.request_ids.tolist()
            results.append(dataclasses.replace(timed, token_ids=checked.token_ids))
        return results

    def now(self) -> float:
        return self._simulator.now()

    def shutdown(self) -> None:
        self._simulator.shutdown()
