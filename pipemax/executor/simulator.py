"""`SimExecutor`: stages and links as servers on a virtual clock: what a pipeline would do, without GPUs and waiting.

    stage s   compute   | step k: l0 l1 l2 ...    | step k+1: l0 l1 l2 ...
              down            l0 l1 l2 ...  homes of k, each layer once computed
              up              l0 l1 l2 ...  refill of k, each layer once left; each layer of k+1 waits for it
    link      s -> s+1                            | k |        one message after the other
    tokens    last -> first                                    needed by a later step's plan

All of a step's times follow from those of earlier steps, so they are known when it is submitted; `wait` only moves the
clock. Each server takes the steps in the order of `step_id` and the layers of a stage in equal times; the order of
`plan.py` holds for every layer, exactly (`layer_times.py`). What is approximate:

* Layers of a stage take equal times, head and embedding spread over them.
* Copies both ways slow each other as if they had started together, and every GPU has its share of host memory's
  bandwidth whether the others copy or not (a plan moves the same blocks on every stage, and in the steady state they
  all copy at once).
* A byte that is copied costs the compute beside it `HostLink.compute_seconds_per_byte`, whatever that computes.
* The host's own work takes no time.

The true cost model is given here and may differ from the scheduler's (`cost/perturbed.py`). Never here: policies,
estimates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipemax.cost.hardware import HostLink, ServerProfile, StageLink
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.model import CostModel
from pipemax.executor.layer_times import LayerTimes, at_layer, highest, serve
from pipemax.model_spec import ModelSpec
from pipemax.plan import Capacity, CopyDirection, CopyTiming, StageTiming, StepPlan, StepResult


@dataclass(slots=True)
class StageTotals:
    """Sums of one stage's timings, in seconds and bytes. Time in none of them: no plan was there."""

    compute_seconds: float = 0.0
    window_wait_seconds: float = 0.0
    activation_wait_seconds: float = 0.0
    up_seconds: float = 0.0
    down_seconds: float = 0.0
    refill_bytes: int = 0
    home_bytes: int = 0

    def add(self, timing: StageTiming) -> None:
        self.compute_seconds += timing.compute_seconds
        self.window_wait_seconds += timing.window_wait_seconds
        self.activation_wait_seconds += timing.activation_wait_seconds
        self.refill_bytes += timing.refill_bytes
        self.home_bytes += timing.home_bytes


@dataclass(slots=True)
class _Stage:
    """One stage's servers: when each is free, and what the next step's layers must wait for."""

    shape: StageShape
    block_bytes: int
    compute_free: float = 0.0
    up_free: float = 0.0
    down_free: float = 0.0
    link_free: float = 0.0
    left: LayerTimes = field(default_factory=list)
    gate: LayerTimes = field(default_factory=list)
    totals: StageTotals = field(default_factory=StageTotals)


@dataclass(frozen=True, slots=True)
class _Finished:
    seconds: float
    result: StepResult


class SimExecutor:
    """Implements `Executor`. See the module.

    stages                  layers of each stage, in order
    layer_block_bytes       bytes of a KV block in one layer
    cost                    how long steps really take
    host_link               of one GPU while all of them copy
    stage_link              from each stage to the next
    token_bytes             of one token's activations on that link
    token_seconds           from the last stage's end to the first stage (and the engine) knowing the sampled tokens
    output_lengths          by request id: tokens that it yields, the end token included, if nothing stops it before
    end_token_id            sampled as a request's last token ...
    token_id                ... and this one before; neither may be a stop token of a request by accident
    """

    def __init__(
        self,
        *,
        capacity: Capacity,
        stages: Sequence[StageShape],
        layer_block_bytes: int,
        cost: CostModel,
        host_link: HostLink,
        stage_link: StageLink,
        token_bytes: int,
        token_seconds: float,
        output_lengths: Mapping[int, int],
        end_token_id: int,
        token_id: int,
    ) -> None:
        assert len(stages) == capacity.num_stages
        assert end_token_id != token_id
        self._capacity = capacity
        self._stages = [_Stage(shape, layer_block_bytes * shape.num_layers) for shape in stages]
        assert max(stage.block_bytes for stage in self._stages) == capacity.block_bytes
        self._cost = cost
        self._host_link = host_link
        self._stage_link = stage_link
        self._token_bytes = token_bytes
        self._token_seconds = token_seconds
        self._output_lengths = output_lengths
        self._end_token_id = end_token_id
        self._token_id = token_id
        self._now = 0.0
        self._last_step = -1
        self._pending: deque[_Finished] = deque()
        self._tokens_known: dict[int, float] = {}
        self._last_known = 0.0
        self._end_position: dict[int, int] = {}
        self._num_steps = 0

    @classmethod
    def of_server(
        cls,
        *,
        model: ModelSpec,
        server: ServerProfile,
        capacity: Capacity,
        stages: Sequence[StageShape],
        cost: CostModel,
        output_lengths: Mapping[int, int],
        end_token_id: int,
        token_id: int,
        dtype_bytes: int = 2,
        kv_dtype_bytes: int = 2,
    ) -> SimExecutor:
        """A pipeline on a server, one stage a GPU; links from the profile, the rest as above."""
        geometry = model.kv_geometry(block_size=capacity.block_size, dtype_bytes=kv_dtype_bytes)
        return cls(
            capacity=capacity,
            stages=stages,
            layer_block_bytes=geometry.layer_block_bytes(0),
            cost=cost,
            host_link=server.host_link,
            stage_link=server.stage_link,
            token_bytes=model.hidden_size * dtype_bytes,
            token_seconds=server.stage_link.latency_seconds if len(stages) > 1 else 0.0,
            output_lengths=output_lengths,
            end_token_id=end_token_id,
            token_id=token_id,
        )

    @property
    def capacity(self) -> Capacity:
        """See `Executor`."""
        return self._capacity

    @property
    def num_steps(self) -> int:
        """Steps submitted so far."""
        return self._num_steps

    @property
    def stage_totals(self) -> tuple[StageTotals, ...]:
        """Sums since the start, in stage order, of all steps submitted."""
        return tuple(stage.totals for stage in self._stages)

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def wait(self) -> list[StepResult]:
        """Moves the clock to the end of the next step; gives all steps that are done then."""
        assert self._pending, "waiting for a step, and none is under way"
        self._now = max(self._now, self._pending[0].seconds)
        results = []
        while self._pending and self._pending[0].seconds <= self._now:
            results.append(self._pending.popleft().result)
            # Known by now: nothing waits for these tokens any more.
            del self._tokens_known[results[-1].step_id]
        return results

    def shutdown(self) -> None:
        """See `Executor`: there is nothing to end."""

    def submit(self, plan: StepPlan) -> None:
        """Works out when the step runs on every stage."""
        self._check(plan)
        for request in plan.new_requests:
            self._end_position[request.request_id] = (
                len(request.prompt_token_ids) + self._output_lengths[request.request_id] - 1
            )
        timings = self._run(plan) if plan.num_rows else self._copy(plan)
        end = timings[-1].end
        known = end + self._token_seconds if plan.num_rows else max(timing.end for timing in timings)
        # Results come back in step order, and so do tokens.
        self._last_known = max(self._last_known, known)
        self._tokens_known[plan.step_id] = self._last_known
        self._pending.append(_Finished(self._last_known, self._result(plan, timings)))
        for request_id in plan.finished_request_ids:
            self._end_position.pop(request_id, None)
        self._num_steps += 1

    def _run(self, plan: StepPlan) -> list[_Timed]:
        """A step with rows, from the first stage to the last."""
        load = StepLoad.of_plan(plan)
        link, message_bytes = self._stage_link, load.num_tokens * self._token_bytes
        ready = max(self._now, self._tokens_known.get(plan.sampled_through_step, 0.0))
        timings = []
        for stage in self._stages:
            timed = self._run_stage(stage, plan, load, ready)
            timings.append(timed)
            stage.link_free = max(timed.end, stage.link_free) + message_bytes / link.bytes_per_second
            ready = stage.link_free + link.latency_seconds
        return timings

    def _run_stage(self, stage: _Stage, plan: StepPlan, load: StepLoad, ready: float) -> _Timed:
        num_layers = stage.shape.num_layers
        refill_bytes, home_bytes = len(plan.refill) * stage.block_bytes, len(plan.write_home) * stage.block_bytes
        disturbed_seconds = self._host_link.compute_seconds_per_byte * (refill_bytes + home_bytes)
        seconds = self._cost.step_seconds(load, stage.shape) + disturbed_seconds
        came = max(stage.compute_free, self._now)
        start = max(stage.compute_free, ready)
        done = serve(stage.gate, free_seconds=start, layer_seconds=seconds / num_layers, num_layers=num_layers)
        end = at_layer(done, num_layers - 1)
        stage.compute_free = end
        stage.left = done
        copies = self._start_copies(stage, plan)
        stage.gate = copies.done
        # The difference of two sums may be off by a rounding below zero.
        window_wait = max(0.0, end - start - seconds)
        timing = StageTiming(start, seconds, window_wait, start - came, refill_bytes, home_bytes, copies.timings)
        stage.totals.add(timing)
        return _Timed(timing, end)

    def _copy(self, plan: StepPlan) -> list[_Timed]:
        """A step without rows: a layer's copies begin once it was left by earlier steps and their copies are done."""
        timings = []
        for stage in self._stages:
            refill_bytes, home_bytes = len(plan.refill) * stage.block_bytes, len(plan.write_home) * stage.block_bytes
            taken_up = max(stage.compute_free, self._now)
            before = highest([*stage.left, *stage.gate], num_layers=stage.shape.num_layers)
            stage.left = highest([*before, (self._now, 0.0)], num_layers=stage.shape.num_layers)
            copies = self._start_copies(stage, plan)
            stage.gate = copies.done or before
            timing = StageTiming(taken_up, 0.0, 0.0, 0.0, refill_bytes, home_bytes, copies.timings)
            stage.totals.add(timing)
            timings.append(_Timed(timing, taken_up))
        return timings

    def _start_copies(self, stage: _Stage, plan: StepPlan) -> _Copies:
        """Copies of a step whose layers have been left at `stage.left`."""
        num_layers = stage.shape.num_layers
        refill_bytes, home_bytes = len(plan.refill) * stage.block_bytes, len(plan.write_home) * stage.block_bytes
        lines: LayerTimes = []
        timings = []
        if refill_bytes:
            seconds = self._host_link.up_seconds(refill_bytes, home_bytes)
            up = serve(
                stage.left, free_seconds=stage.up_free, layer_seconds=seconds / num_layers, num_layers=num_layers
            )
            stage.up_free = at_layer(up, num_layers - 1)
            stage.totals.up_seconds += seconds
            lines += up
            start = at_layer(up, 0) - seconds / num_layers
            timings.append(
                CopyTiming(plan.step_id, CopyDirection.REFILL, len(plan.refill), refill_bytes, start, stage.up_free)
            )
        if home_bytes:
            seconds = self._host_link.down_seconds(refill_bytes, home_bytes)
            down = serve(
                stage.left, free_seconds=stage.down_free, layer_seconds=seconds / num_layers, num_layers=num_layers
            )
            stage.down_free = at_layer(down, num_layers - 1)
            stage.totals.down_seconds += seconds
            lines += down
            start = at_layer(down, 0) - seconds / num_layers
            timings.append(
                CopyTiming(plan.step_id, CopyDirection.HOME, len(plan.write_home), home_bytes, start, stage.down_free)
            )
        done = highest(lines, num_layers=num_layers) if refill_bytes and home_bytes else lines
        return _Copies(done, tuple(timings))

    def _result(self, plan: StepPlan, timings: list[_Timed]) -> StepResult:
        samples = plan.samples
        request_ids = plan.request_ids[samples]
        positions = (plan.num_computed_tokens[samples] + plan.num_new_tokens[samples]).tolist()
        token_ids = [
            self._end_token_id if position >= self._end_position[request_id] else self._token_id
            for request_id, position in zip(request_ids.tolist(), positions, strict=True)
        ]
        return StepResult(
            step_id=plan.step_id,
            batch_id=plan.batch_id,
            request_ids=request_ids,
            token_ids=np.array(token_ids, dtype=np.int32),
            logprobs=None,
            row_errors={},
            finished_seconds=self._last_known,
            timings=tuple(timed.timing for timed in timings),
        )

    def _check(self, plan: StepPlan) -> None:
        assert plan.step_id > self._last_step, "steps are submitted in the order of step_id"
        assert plan.sampled_through_step < plan.step_id
        self._last_step = plan.step_id
        lengths = np.diff(plan.block_table_indptr)
        tokens = plan.num_computed_tokens + plan.num_new_tokens
        assert len(lengths) == plan.num_rows
        assert bool(np.all(lengths == -(-tokens // self._capacity.block_size)))
        if len(plan.refill) and len(plan.write_home):
            refill, home = plan.refill, plan.write_home
            assert set(home.slots.tolist()).isdisjoint(refill.slots.tolist()), "refills a slot that it writes home"
            assert set(home.homes.tolist()).isdisjoint(refill.homes.tolist()), "reads a home that it writes"


@dataclass(frozen=True, slots=True)
class _Copies:
    """A step's copies: when each layer has all of its own, and when they run."""

    done: LayerTimes
    timings: tuple[CopyTiming, ...]


@dataclass(frozen=True, slots=True)
class _Timed:
    timing: StageTiming
    end: float
