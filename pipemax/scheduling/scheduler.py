"""`Scheduler`: decides, step by step, which rows run, which blocks go home, which are brought for the step after.

Pure decisions: no clock, no tensor, no process, no randomness. The engine hands plans to an Executor and results
back. The same scheduler drives GPUs, CPUs and the simulator.

One call emits one step and stages the next, because the plan of step k carries the refill of step k+1:

    schedule()   ─►  emit step k: the rows staged before,      +   stage step k+1: its rows, their slots,
                     less those that finished meanwhile            its refill, which plan k carries

Batches take turns in a fixed order. With asynchronous scheduling a batch's next step is planned before the tokens of
its last one are known (they travel from the last stage to the first by themselves), and a row that turns out to have
finished is dropped one step late.

What memory is for whom is decided in `memory_pressure.py`; the books are `kv/manager.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from typing import NamedTuple

import numpy as np

from pipemax.config import KVOffload
from pipemax.cost.forecast import Forecast
from pipemax.cost.load import StepLoad
from pipemax.kv.manager import KVManager
from pipemax.kv.prefetch import PrefetchBudget
from pipemax.kv.window import Placement
from pipemax.plan import NO_BATCH, Capacity, NewRequest, Phase, StepPlan, StepResult
from pipemax.request import FinishReason
from pipemax.scheduling.balancer import Balancer
from pipemax.scheduling.memory_pressure import MemoryPressure
from pipemax.scheduling.output_length import OutputLengthEstimate
from pipemax.scheduling.phase import PhasePolicy, PhaseView
from pipemax.scheduling.population import Population
from pipemax.scheduling.request_state import RequestState, RequestUpdate, Status
from pipemax.scheduling.turns import Turns

# The window is changed when it is off by more than this share: a slot more or less is not worth a change.
_WINDOW_TOLERANCE = 0.05


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start."""

    steps: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    num_announced: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    blocks_sent_home: int = 0
    blocks_refilled: int = 0
    num_turns: int = 0  # that members of batches ended for others'


class _Row(NamedTuple):
    request: RequestState
    num_new: int
    samples: bool  # whether it yields a token: with it, every token that exists has its KV


@dataclass(frozen=True, slots=True)
class _StagedStep:
    batch_id: int
    rows: tuple[_Row, ...]
    placement: Placement


class Scheduler:
    """See the module. One instance a pipeline; not thread-safe.

    max_plans_per_batch   1: a batch's step is planned when its last result is in; 2: asynchronous, one ahead
    """

    def __init__(
        self,
        *,
        capacity: Capacity,
        num_batches: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_plans_per_batch: int,
        phase_policy: PhasePolicy,
        balancer: Balancer,
        turns: Turns,
        forecast: Forecast,
        output_length: OutputLengthEstimate,
        offload: KVOffload,
    ) -> None:
        self._capacity = capacity
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_plans_per_batch = max_plans_per_batch
        self._phase_policy = phase_policy
        self._balancer = balancer
        self._turns = turns
        self._forecast = forecast
        self._budget = PrefetchBudget(blocks_per_step=capacity.num_window_blocks)
        self._output_length = output_length
        self.stats = SchedulerStats()
        self.kv = KVManager(capacity=capacity, offload=offload)
        self._population = Population(num_batches=num_batches)
        self._memory = MemoryPressure(
            kv=self.kv, population=self._population, prefetch_budget=self._budget, output_length=output_length
        )
        self._in_flight = [0] * num_batches
        self._plans_in_flight = 0
        self._next_step = 0
        self._next_batch = 0
        self._staged: _StagedStep | None = None
        self._finished_ids: list[int] = []

    # -- requests ------------------------------------------------------------------------------------------------------

    def add_request(self, request: RequestState) -> None:
        """Queues a request. Its longest form must fit either pool alone (checked by the caller: a user's error)."""
        longest = self.kv.blocks_for(request.num_prompt + request.max_outputs)
        assert longest <= self.max_blocks_per_request
        assert request.num_prompt >= 1 and request.max_outputs >= 1
        self._population.add(request)

    @property
    def max_blocks_per_request(self) -> int:
        """KV blocks of the longest request that can ever run."""
        return min(self.kv.device.num_blocks, self.kv.host.num_blocks)

    @property
    def population(self) -> Population:
        """Who is waiting, ready, running: to be read, not changed."""
        return self._population

    @property
    def memory(self) -> MemoryPressure:
        return self._memory

    @property
    def forecast(self) -> Forecast:
        """What steps are expected to take: to be asked, not told."""
        return self._forecast

    @property
    def num_plans_in_flight(self) -> int:
        return self._plans_in_flight

    def finish_request(self, request_id: int, *, is_complete: bool) -> None:
        """Ends a request from outside. Unknown ids are over already.

        is_complete   its answer has come to an end by itself (a stop string was found), so that its length says what
                      to expect of others; else somebody gave it up
        """
        request = self._population.requests.get(request_id)
        if request is not None:
            if is_complete:
                self._output_length.observe(len(request.output_token_ids))
            self._memory.forget(request)
            self._population.remove(request)
            if request.announced:
                self._finished_ids.append(request_id)

    # -- results -------------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[RequestUpdate]:
        """Takes the tokens of a step in. Rows of requests that are over meanwhile are ignored."""
        self._forecast.finished(result)
        self._plans_in_flight -= 1
        if result.batch_id != NO_BATCH:
            self._in_flight[result.batch_id] -= 1
        assert self._plans_in_flight >= 0 and min(self._in_flight) >= 0
        updates = []
        for request_id, token_id in zip(result.request_ids.tolist(), result.token_ids.tolist(), strict=True):
            request = self._population.requests.get(request_id)
            if request is None:
                continue
            error = result.row_errors.get(request_id)
            if error is not None:
                self.finish_request(request_id, is_complete=False)
                updates.append(RequestUpdate(request_id, None, FinishReason.ERROR, error=error))
            else:
                updates.append(self._take_token(request, token_id))
        return updates

    def _take_token(self, request: RequestState, token_id: int) -> RequestUpdate:
        outputs = request.output_token_ids
        outputs.append(token_id)
        assert len(outputs) <= request.num_outputs <= request.max_outputs
        self.stats.output_tokens += 1
        reason, stop_reason = None, None
        if token_id in request.stop_token_ids and len(outputs) > request.sampling.min_tokens:
            reason, stop_reason = FinishReason.STOP, token_id
        elif len(outputs) == request.max_outputs:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.finish_request(request.request_id, is_complete=True)
        return RequestUpdate(request.request_id, token_id, reason, stop_reason)

    # -- planning ------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next plan, or None: nothing can be planned before another result comes in."""
        while True:
            staged = self._staged
            if staged is not None and self._in_flight[staged.batch_id] >= self._max_plans_per_batch:
                return None
            self.kv.commit_homes()
            plan = self._emit(staged)
            if plan.num_rows or len(plan.write_home) or len(plan.refill):
                self._submit(plan)
                return plan
            self._finished_ids = list(plan.finished_request_ids)
            if self._staged is None:
                return None

    def _emit(self, staged: _StagedStep | None) -> StepPlan:
        """Composes the plan of the staged step, staging the one that follows on the way.

        Without a staged step, or when all its rows are over, the plan has no rows: it only moves blocks.
        """
        batch_id, kept = (NO_BATCH, []) if staged is None else (staged.batch_id, self._live_rows(staged))
        rows = [] if staged is None else [staged.rows[index] for index in kept]
        if not rows:
            batch_id = NO_BATCH
        indptr, indices = self._block_tables(staged, kept)
        num_computed = np.array([row.request.num_computed for row in rows], dtype=np.int32)
        samples = np.array([row.samples for row in rows], dtype=np.bool_)
        depends_on = max([row.request.last_sample_step for row in rows], default=-1)
        phase = self._phase_of(rows)
        new_requests = self._announce(rows)
        finished_ids, self._finished_ids = tuple(self._finished_ids), []
        num_new = np.array([row.num_new for row in rows], dtype=np.int32)
        for row in rows:
            self._advance(row)
        self._plan_prefetch(StepLoad.of_rows(num_computed, num_new, int(samples.sum())))
        self._staged = self._stage()
        return StepPlan(
            step_id=self._next_step,
            batch_id=batch_id,
            phase=phase,
            request_ids=np.array([row.request.request_id for row in rows], dtype=np.int64),
            num_computed_tokens=num_computed,
            num_new_tokens=num_new,
            samples=samples,
            block_table_indptr=indptr,
            block_table_indices=indices,
            write_home=self.kv.take_write_home(),
            refill=(self._staged.placement if self._staged is not None else self.kv.place([])).refill,
            new_requests=new_requests,
            finished_request_ids=finished_ids,
            sampled_through_step=depends_on,
        )

    def _submit(self, plan: StepPlan) -> None:
        if plan.batch_id != NO_BATCH:
            self._in_flight[plan.batch_id] += 1
        self._plans_in_flight += 1
        self._next_step += 1
        self.stats.steps[plan.phase] += 1
        self.stats.blocks_sent_home += len(plan.write_home)
        self.stats.blocks_refilled += len(plan.refill)
        self._forecast.submitted(plan)

    def _live_rows(self, staged: _StagedStep) -> list[int]:
        requests = self._population.requests
        return [i for i, row in enumerate(staged.rows) if requests.get(row.request.request_id) is row.request]

    @staticmethod
    def _block_tables(staged: _StagedStep | None, kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
        if staged is None or not kept:
            return np.zeros(1, dtype=np.int32), np.empty(0, dtype=np.int32)
        indptr, indices = staged.placement.indptr, staged.placement.indices
        if len(kept) == len(staged.rows):
            return indptr, indices
        lengths = np.diff(indptr)[kept]
        cut = np.zeros(len(kept) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cut[1:])
        return cut, np.concatenate([indices[indptr[i] : indptr[i + 1]] for i in kept])

    @staticmethod
    def _phase_of(rows: list[_Row]) -> Phase:
        if not rows:
            return Phase.COPY
        decode = sum(row.request.status is Status.RUNNING for row in rows)
        return Phase.DECODE if decode == len(rows) else Phase.MIXED if decode else Phase.PREFILL

    def _announce(self, rows: list[_Row]) -> tuple[NewRequest, ...]:
        fresh = [request for request, _, _ in rows if not request.announced]
        for request in fresh:
            request.announced = True
            self.stats.num_announced += 1
            self.stats.prompt_tokens += request.num_prompt
        return tuple(request.announcement() for request in fresh)

    def _advance(self, row: _Row) -> None:
        """The row is submitted: counts move on, full blocks go home, states change."""
        request, num_new, samples = row
        prefill = request.status is Status.WAITING
        first_token = request.num_computed
        request.num_computed = num_computed = first_token + num_new
        if samples:
            request.num_outputs += 1
            request.last_sample_step = self._next_step
            if request.num_outputs >= request.max_outputs:
                # Nothing reads its KV again. Steps run in order, so its memory is free for the next ones right away.
                self._memory.forget(request)
                self._population.drain(request)
                return
        if prefill or not num_computed % self._capacity.block_size:  # else no block has become full
            self.kv.write_home(
                request.request_id, first_token=first_token, num_tokens=num_computed, partial_too=prefill
            )
        if prefill and samples:
            self._population.make_ready(request)

    # -- staging -------------------------------------------------------------------------------------------------------

    def _plan_prefetch(self, load: StepLoad) -> None:
        """What may travel while the step being emitted runs, and how large the window should be from now on."""
        decode = StepLoad.of_decode(
            num_rows=max(1, round(self._mean_rows())), kv_tokens=round(self._mean_kv_tokens()) + 1
        )
        decode_seconds = self._forecast.step_seconds(decode)
        # While nothing runs there is nothing to hide behind, and nobody to keep waiting either.
        step_seconds = self._forecast.step_seconds(load) if load.num_tokens else decode_seconds
        self._budget.blocks_per_step = self._forecast.refill_blocks(step_seconds)
        if self._capacity.num_window_blocks:
            usual = PrefetchBudget(blocks_per_step=self._forecast.refill_blocks(decode_seconds)).window_blocks
            wanted = min(usual, self._capacity.num_device_blocks // 2)
            if abs(wanted - self.kv.window.num_blocks) > _WINDOW_TOLERANCE * self.kv.window.num_blocks:
                self.kv.window.resize(wanted)

    def _stage(self) -> _StagedStep | None:
        population = self._population
        waiting = population.waiting
        choice = self._phase_policy.choose(self._view())
        for phase in choice.preference:
            for turn in range(len(self._in_flight) if phase is not Phase.PREFILL else 1):
                batch_id = (self._next_batch + turn) % len(self._in_flight)
                rows: list[_Row] = []
                self._memory.begin_step()
                if phase is not Phase.PREFILL:
                    self._add_decode_rows(rows, batch_id, keep_free=self._memory.prompt_reserve(choice.chunk_tokens))
                if phase is not Phase.DECODE:
                    self._add_prefill_rows(rows, within_seconds=choice.step_seconds if rows else None)
                if rows:
                    self._next_batch = (batch_id + 1) % len(self._in_flight)
                    if not waiting:
                        self._memory.promote_absent([row.request for row in rows])
                    placement = self.kv.place([row.request.request_id for row in rows])
                    assert self._budget.allows(len(placement.refill), num_rows=len(rows))
                    return _StagedStep(batch_id, tuple(rows), placement)
        return None

    def _view(self) -> PhaseView:
        population, memory = self._population, self._memory
        waiting = population.waiting
        announced = max(1, self.stats.num_announced)
        rows_share = (population.num_running + len(population.ready)) / (self._max_num_seqs * len(self._in_flight))
        return PhaseView(
            num_waiting=len(waiting),
            num_ready=len(population.ready),
            num_running=population.num_running,
            can_admit=bool(waiting) and memory.can_admit(waiting[0]),
            full_share=min(1.0, max(rows_share, self.kv.host.num_held / self._live_blocks())),
            mean_rows=self._mean_rows(),
            mean_kv_tokens=self._mean_kv_tokens(),
            mean_prompt=self.stats.prompt_tokens / announced,
            mean_output=self._output_length.mean_tokens,
        )

    def _mean_rows(self) -> float:
        return self._population.num_running / len(self._in_flight)

    def _mean_kv_tokens(self) -> float:
        return sum(self._memory.batch_blocks) * self._capacity.block_size / len(self._in_flight)

    def _live_blocks(self) -> int:
        """KV blocks that all batches in flight may hold together: resident ones, and the window once for each."""
        return self._capacity.num_device_blocks + (len(self._in_flight) - 1) * self.kv.window.num_blocks

    def _add_decode_rows(self, rows: list[_Row], batch_id: int, *, keep_free: int) -> None:
        population, memory = self._population, self._memory
        batch = population.batches[batch_id]
        target = self._balancer.target_rows(num_ready=len(population.ready), num_running=population.num_running)
        members = [batch[request_id] for request_id in sorted(batch)]
        for request in members[target:]:
            memory.leave(request)
        members = members[:target]
        in_turns = self._are_in_turns()
        if in_turns:
            coming = memory.travel_beside(batch_id, filterfalse(self._is_recent, population.ready_by_outputs))
            for request in self._turns.over(members, coming):
                memory.leave(request)
                self.stats.num_turns += 1
            members = [request for request in members if request.status is Status.RUNNING]
        memory.make_device_room_for_rows(members, batch_id=batch_id)
        rows += [_Row(request, 1, samples=True) for request in memory.extend_rows(members)]
        if not memory.stalled:
            queue = population.ready_by_outputs if in_turns else population.ready
            self._join_ready(rows, batch_id, list(queue), target=target, keep_free=keep_free)

    def _are_in_turns(self) -> bool:
        population, memory = self._population, self._memory
        if self.kv.offload is KVOffload.OFF or memory.stalled:
            return False  # what leaves would be lost; or who is served next is settled already
        return self._turns.are_taken(
            num_waiting=len(population.waiting),
            num_ready=len(population.ready),
            free_homes=self.kv.host.num_free,
            growth_blocks=memory.growth_to_end(),
        )

    def _join_ready(
        self, rows: list[_Row], batch_id: int, ready: Sequence[RequestState], *, target: int, keep_free: int
    ) -> None:
        """Fills the batch from READY, in that order, while device, window and link have room."""
        population, memory = self._population, self._memory
        live_blocks = self._live_blocks() - keep_free
        for request in ready:
            if request.status is not Status.READY:
                continue  # it had to start anew, for the sake of an older one
            if len(population.batches[batch_id]) >= target or not self._balancer.may_join(
                batch_blocks=memory.batch_blocks[batch_id],
                request_blocks=memory.num_blocks(request),
                live_blocks=live_blocks,
            ):
                break
            if population.num_running and self._is_recent(request):
                continue
            reserve = memory.growth_reserve() + (keep_free if population.num_running else 0)
            if not memory.admit(request, at_most=1, keep_free=reserve):
                memory.board(request, keep_free=reserve)
                break
            memory.join(request, batch_id)
            rows.append(_Row(request, 1, samples=True))

    def _is_recent(self, request: RequestState) -> bool:
        """Its token is still under way: taking it now would make the first stage wait for it."""
        return request.last_sample_step + self._capacity.num_stages > self._next_step + 1

    def _add_prefill_rows(self, rows: list[_Row], *, within_seconds: float | None) -> None:
        """Chunks of waiting prompts, oldest first: all that a step may have, or what it has time for."""
        memory = self._memory
        if memory.stalled:
            return
        load = None if within_seconds is None else self._load_of(rows)
        tokens_left = self._max_num_batched_tokens - len(rows)
        for request in list(self._population.waiting):
            if tokens_left <= 0 or len(rows) >= self._max_num_seqs or not memory.can_admit(request):
                break
            wanted = min(request.num_pending, tokens_left)
            if load is not None and within_seconds is not None:
                wanted = self._chunk_within(within_seconds, load, request, at_most=wanted)
            num_new = memory.admit(request, at_most=wanted, keep_free=0) if wanted else 0
            if num_new == 0:
                break
            tokens_left -= num_new
            rows.append(_Row(request, num_new, samples=num_new == request.num_pending))
            if num_new < request.num_pending:
                break
            if load is not None:
                load = load.plus_chunk(num_computed=request.num_computed, num_new=num_new, samples=True)

    def _load_of(self, rows: list[_Row]) -> StepLoad:
        computed = np.array([row.request.num_computed for row in rows], dtype=np.int64)
        return StepLoad.of_rows(computed, np.array([row.num_new for row in rows], dtype=np.int64), len(rows))

    def _chunk_within(self, seconds: float, load: StepLoad, request: RequestState, *, at_most: int) -> int:
        """The most tokens of a prompt that keep a step of that load within a time, nearly; 0 if there are none."""

        def fits(num_new: int) -> bool:
            chunk = load.plus_chunk(num_computed=request.num_computed, num_new=num_new)
            return self._forecast.step_seconds(chunk) <= seconds

        if fits(at_most):
            return at_most
        enough, too_many = 0, at_most
        while too_many - enough > 1 + enough // 16:
            tokens = (enough + too_many) // 2
            if fits(tokens):
                enough = tokens
            else:
                too_many = tokens
        return enough
