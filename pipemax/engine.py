"""`Engine`: the loop between scheduler and executor. It holds no policy and no clock.

while (plan := scheduler.schedule()): executor.submit(plan)
for result in executor.wait():        scheduler.update(result)

Observers are told of every plan and result (`observer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipemax.cost.load import StepLoad
from pipemax.executor.base import Executor
from pipemax.observer import EngineGauges, EngineObserver
from pipemax.plan import StepPlan, StepResult, TokenLogprobs
from pipemax.scheduling.request_state import RequestState, RequestUpdate
from pipemax.scheduling.scheduler import Scheduler


@dataclass(slots=True)
class EngineUpdate:
    """One request's news with the logprobs that came along. Like `RequestUpdate` never changed, and not frozen."""

    update: RequestUpdate
    logprobs: TokenLogprobs | None


class Engine:
    """Drives one pipeline."""

    def __init__(self, *, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._observers: list[EngineObserver] = []

    def observe(self, observer: EngineObserver) -> None:
        """From now on `observer` is told of plans and results."""
        self._observers.append(observer)

    def stop_observing(self, observer: EngineObserver) -> None:
        """From now on it is not."""
        self._observers.remove(observer)

    def add_request(self, request: RequestState) -> None:
        self.scheduler.add_request(request)

    def finish_request(self, request_id: int, *, is_complete: bool) -> None:
        """See `Scheduler.finish_request`."""
        self.scheduler.finish_request(request_id, is_complete=is_complete)

    def step(self) -> list[EngineUpdate]:
        """Submits all that can be planned and takes in what is done. Blocks for at least one result if any is out.

        Raises ExecutorError when a stage has failed.
        """
        scheduler = self.scheduler
        while (plan := scheduler.schedule()) is not None:
            self.executor.submit(plan)
            if self._observers:
                self._tell(plan)
        if not scheduler.num_plans_in_flight:
            assert not scheduler.population.requests, "requests are left and nothing can be planned"
            return []
        return [update for result in self.executor.wait() for update in self._take(result)]

    def _take(self, result: StepResult) -> list[EngineUpdate]:
        logprobs = {}
        if result.logprobs is not None:
            logprobs = dict(zip(result.request_ids.tolist(), result.logprobs, strict=True))
        updates = self.scheduler.update(result)
        for observer in self._observers:
            observer.on_result(result, updates)
        return [EngineUpdate(u, logprobs.get(u.request_id)) for u in updates]

    def _tell(self, plan: StepPlan) -> None:
        population, kv = self.scheduler.population, self.scheduler.kv
        gauges = EngineGauges(
            num_waiting=len(population.waiting),
            num_ready=len(population.ready),
            num_running=population.num_running,
            resident_blocks=kv.device.num_held - kv.window.num_blocks,
            window_blocks=kv.window.num_blocks,
            home_blocks=kv.host.num_held,
            expected_seconds=self.scheduler.forecast.step_seconds(StepLoad.of_plan(plan)) if plan.num_rows else 0.0,
        )
        now_seconds = self.executor.now()
        for observer in self._observers:
            observer.on_submit(plan, now_seconds=now_seconds, gauges=gauges)
