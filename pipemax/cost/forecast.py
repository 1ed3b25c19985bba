"""`Forecast`: what the scheduler expects of steps: seconds, blocks that may travel beside them, tokens that are free.

One cost model and one link, both corrected as steps finish. The slowest stage decides how long a step takes in a full
pipeline, so that is the one that is asked and watched. Never here: what to do about it (`scheduling/`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipemax.cost.calibrate import CalibratedCostModel
from pipemax.cost.hardware import HostLink
from pipemax.cost.link_rate import LinkRate
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.model import CostModel
from pipemax.plan import StepPlan, StepResult

# Which stage is the slowest is judged by a decode step like this.
_TYPICAL_LOAD = StepLoad.of_decode(num_rows=64, kv_tokens=64 * 512)
# Tokens are free as long as a step takes at most this much longer than one of a single token.
_FREE_SHARE = 1.15
_MOST_FREE_TOKENS = 8192
# Results between two counts of them.
_RECOUNT_STEPS = 64


class Forecast:
    """Estimates for one pipeline.

    block_bytes   a KV block on the slowest stage
    learn         correct the estimates by results; without it, plans depend on nothing that is measured
    """

    def __init__(
        self,
        *,
        cost: CostModel,
        stages: Sequence[StageShape],
        link: HostLink,
        block_bytes: int,
        learn: bool = True,
    ) -> None:
        self._index = max(range(len(stages)), key=lambda index: cost.step_seconds(_TYPICAL_LOAD, stages[index]))
        self._stage = stages[self._index]
        self._cost = CalibratedCostModel(model=cost, max_factor=100.0)
        self._link = LinkRate(link=link)
        self._copy_seconds_per_byte = link.compute_seconds_per_byte
        self._block_bytes = block_bytes
        self._learn = learn
        self._loads: dict[int, StepLoad] = {}
        self._num_finished = 0
        self.free_tokens = self._count_free_tokens()

    def step_seconds(self, load: StepLoad) -> float:
        """A step of that load on the slowest stage."""
        return self._cost.step_seconds(load, self._stage)

    def refill_blocks(self, step_seconds: float) -> int:
        """Blocks that the link brings up during a step of that length; at least one."""
        return max(1, self._link.prefetch_bytes(step_seconds) // self._block_bytes)

    def copy_seconds(self, num_blocks: int) -> float:
        """What a step loses by copies of so many blocks beside it, though it waits for none."""
        return num_blocks * self._block_bytes * self._copy_seconds_per_byte

    def submitted(self, plan: StepPlan) -> None:
        """A plan is on its way: its result will be compared with what it asks."""
        if self._learn:
            self._loads[plan.step_id] = StepLoad.of_plan(plan)

    def finished(self, result: StepResult) -> None:
        """Takes the timings in. Executors that measure nothing give none."""
        load = self._loads.pop(result.step_id, None)
        if load is not None and result.timings:
            self._cost.observe(load, self._stage, result.timings[self._index].compute_seconds)
            # One stage that waits for its window keeps the next from waiting for its own.
            self._link.observe(max(result.timings, key=lambda timing: timing.window_wait_seconds))
            self._num_finished += 1
            if not self._num_finished % _RECOUNT_STEPS:
                self.free_tokens = self._count_free_tokens()

    def _count_free_tokens(self) -> int:
        """The most tokens that a step computes in hardly more time than one token."""
        limit = _FREE_SHARE * self._tokens_seconds(1)
        low, high = 1, _MOST_FREE_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._tokens_seconds(middle) <= limit else (low, middle - 1)
        return low

    def _tokens_seconds(self, num_tokens: int) -> float:
        load = StepLoad(1, num_tokens, 0, 0, 1)
        return self._cost.step_seconds(load, self._stage)
