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

import numpy as np

from pipemax.config import KVOffload
from pipemax.cost.forecast import Forecast
from pipemax.cost.load import StepLoad
from pipemax.kv.manager import KVManager
from pipemax.kv.prefetch import PrefetchBudget
from pipemax.plan import NO_BATCH, Capacity, NewRequest, Phase, StepPlan, StepResult
from pipemax.request import FinishReason
from pipemax.scheduling.balancer import Balancer
from pipemax.scheduling.memory_pressure import MemoryPressure
from pipemax.scheduling.output_length import OutputLengthEstimate
from pipemax.scheduling.phase import PhasePolicy, PhaseView
from pipemax.scheduling.population import Population
from pipemax.scheduling.request_state import RequestState, RequestUpdate, Status
from pipemax.scheduling.staged_step import NO_ROWS, Chunk, StagedStep
from pipemax.scheduling.turns import Turns
from pipemax.scheduling.window_size import WindowSize

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
        window_size: WindowSize,
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
        self._window_size = window_size
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
        self._staged: StagedStep | None = None
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
                self._output_length.observe(request.num_received)
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
        requests, errors = self._population.requests, result.row_errors
        updates = []
        for request_id, token_id in zip(result.request_ids.tolist(), result.token_ids.tolist(), strict=True):
            request = requests.get(request_id)
            if request is None:
                continue
            if errors and request_id in errors:
                self.finish_request(request_id, is_complete=False)
                updates.append(RequestUpdate(request_id, None, FinishReason.ERROR, error=errors[request_id]))
                continue
            update = RequestUpdate(request_id, token_id)
            updates.append(update)
            request.num_received += 1
            assert request.num_received <= request.num_outputs
            self.stats.output_tokens += 1
            if token_id in request.stop_token_ids or request.num_received == request.max_outputs:
                self._end_if_over(request, update)
        return updates

    def _end_if_over(self, request: RequestState, update: RequestUpdate) -> None:
        """The request ends with its newest token, if that is a stop token past `min_tokens`, or the last of all."""
        if update.token_id in request.stop_token_ids and request.num_received > request.sampling.min_tokens:
            update.finish_reason, update.stop_reason = FinishReason.STOP, update.token_id
        elif request.num_received == request.max_outputs:
            update.finish_reason = FinishReason.LENGTH
        else:
            return
        self.finish_request(request.request_id, is_complete=True)

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

    def _emit(self, staged: StagedStep | None) -> StepPlan:
        """Composes the plan of the staged step, staging the one that follows on the way.

        Without a staged step, or when all its rows are over, the plan has no rows: it only moves blocks.
        """
        step = NO_ROWS if staged is None else staged.still_live()
        requests, num_members = step.requests, len(step.members)
        num_computed = np.array([request.num_computed for request in requests], dtype=np.int32)
        num_new = np.ones(len(requests), dtype=np.int32)
        num_new[num_members:] = [chunk.num_new for chunk in step.chunks]
        samples = np.ones(len(requests), dtype=np.bool_)
        samples[num_members:] = [chunk.samples for chunk in step.chunks]
        depends_on = max([request.last_sample_step for request in requests], default=-1)
        new_requests = self._announce(step.chunks)
        finished_ids, self._finished_ids = tuple(self._finished_ids), []
        self._advance_members(step.members)
        for chunk in step.chunks:
            self._advance_chunk(chunk)
        load = StepLoad.of_rows(num_computed, num_new, int(np.count_nonzero(samples)))
        if num_members:
            self._window_size.observe(load)
        self._plan_prefetch(load)
        self._staged = self._stage()
        return StepPlan(
            step_id=self._next_step,
            batch_id=step.batch_id if requests else NO_BATCH,
            phase=step.phase,
            request_ids=np.array([request.request_id for request in requests], dtype=np.int64),
            num_computed_tokens=num_computed,
            num_new_tokens=num_new,
            samples=samples,
            block_table_indptr=step.placement.indptr,
            block_table_indices=step.placement.indices,
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

    def _announce(self, chunks: list[Chunk]) -> tuple[NewRequest, ...]:
        """A request's first row is one of prefill."""
        fresh = [chunk.request for chunk in chunks if not chunk.request.announced]
        for request in fresh:
            request.announced = True
            self.stats.num_announced += 1
            self.stats.prompt_tokens += request.num_prompt
        return tuple(request.announcement() for request in fresh)

    def _advance_members(self, members: list[RequestState]) -> None:
        """One token of each is submitted: counts move on, and a block that it fills goes home."""
        block_size, step_id = self._capacity.block_size, self._next_step
        for request in members:
            request.num_computed = num_computed = request.num_computed + 1
            request.num_outputs = num_outputs = request.num_outputs + 1
            request.last_sample_step = step_id
            if num_outputs == request.max_outputs:
                self._drain(request)
            elif not num_computed % block_size:
                self.kv.write_home(
                    request.request_id, first_token=num_computed - 1, num_tokens=num_computed, partial_too=False
                )

    def _advance_chunk(self, chunk: Chunk) -> None:
        """Part of a prompt is submitted: all that was computed goes home, and with the last part it is READY."""
        request, num_new, samples = chunk
        first_token = request.num_computed
        request.num_computed += num_new
        if samples:
            request.num_outputs += 1
            request.last_sample_step = self._next_step
            if request.num_outputs == request.max_outputs:
                self._drain(request)
                return
        self.kv.write_home(
            request.request_id, first_token=first_token, num_tokens=request.num_computed, partial_too=True
        )
        if samples:
            self._population.make_ready(request)

    def _drain(self, request: RequestState) -> None:
        """Nothing reads its KV again. Steps run in order, so its memory is free for the next ones right away."""
        self._memory.forget(request)
        self._population.drain(request)

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
            if self._population.waiting or self._population.ready:  # else more rows are not to be had
                wanted = self._window_size.blocks(wanted, held_blocks=sum(self._memory.batch_blocks))
            if abs(wanted - self.kv.window.num_blocks) > _WINDOW_TOLERANCE * self.kv.window.num_blocks:
                self.kv.window.resize(wanted)

    def _stage(self) -> StagedStep | None:
        population = self._population
        waiting = population.waiting
        choice = self._phase_policy.choose(self._view())
        for phase in choice.preference:
            for turn in range(len(self._in_flight) if phase is not Phase.PREFILL else 1):
                batch_id = (self._next_batch + turn) % len(self._in_flight)
                members: list[RequestState] = []
                chunks: list[Chunk] = []
                self._memory.begin_step()
                if phase is not Phase.PREFILL:
                    keep_free = self._memory.prompt_reserve(choice.chunk_tokens)
                    members = self._decode_members(batch_id, keep_free=keep_free)
                if phase is not Phase.DECODE:
                    chunks = self._prefill_chunks(members, within_seconds=choice.step_seconds if members else None)
                if members or chunks:
                    self._next_batch = (batch_id + 1) % len(self._in_flight)
                    requests = [*members, *[chunk.request for chunk in chunks]]
                    if not waiting:
                        self._memory.promote_absent(requests)
                    placement = self.kv.place([request.request_id for request in requests])
                    assert self._budget.allows(len(placement.refill), num_rows=len(requests))
                    return StagedStep(batch_id, members, chunks, placement)
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

    def _decode_members(self, batch_id: int, *, keep_free: int) -> list[RequestState]:
        """Members of the batch, those that join it among them, with room for one more token."""
        population, memory = self._population, self._memory
        batch = population.batches[batch_id]
        target = self._balancer.target_rows(num_ready=len(population.ready), num_running=population.num_running)
        for request in batch[target:]:
            memory.leave(request)
        in_turns = self._are_in_turns()
        if in_turns:
            coming = memory.travel_beside(batch_id, filterfalse(self._is_recent, population.ready_by_outputs))
            for request in self._turns.over(batch, coming):
                memory.leave(request)
                self.stats.num_turns += 1
        members = memory.extend_batch(batch_id)
        if not memory.stalled:
            queue = population.ready_by_outputs if in_turns else population.ready
            members += self._join_ready(batch_id, queue.copy(), target=target, keep_free=keep_free)
        return members

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
        self, batch_id: int, ready: Sequence[RequestState], *, target: int, keep_free: int
    ) -> list[RequestState]:
        """Fills the batch from READY, in that order, while device, window and link have room; gives who came."""
        joined: list[RequestState] = []
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
            joined.append(request)
        return joined

    def _is_recent(self, request: RequestState) -> bool:
        """Its token is still under way: taking it now would make the first stage wait for it."""
        return request.last_sample_step + self._capacity.num_stages > self._next_step + 1

    def _prefill_chunks(self, members: Sequence[RequestState], *, within_seconds: float | None) -> list[Chunk]:
        """Chunks of waiting prompts, oldest first, beside those members: all that a step may have, or has time for."""
        memory = self._memory
        chunks: list[Chunk] = []
        if memory.stalled:
            return chunks
        load = None if within_seconds is None else self._load_of(members)
        tokens_left = self._max_num_batched_tokens - len(members)
        for request in self._population.waiting.copy():
            num_rows = len(members) + len(chunks)
            if tokens_left <= 0 or num_rows >= self._max_num_seqs or not memory.can_admit(request):
                break
            wanted = min(request.num_pending, tokens_left)
            if load is not None and within_seconds is not None:
                wanted = self._chunk_within(within_seconds, load, request, at_most=wanted)
            num_new = memory.admit(request, at_most=wanted, keep_free=0) if wanted else 0
            if num_new == 0:
                if request.num_computed:  # what it had to give up comes back over several steps, if it must
                    memory.board(request, keep_free=0)
                break
            tokens_left -= num_new
            chunks.append(Chunk(request, num_new, samples=num_new == request.num_pending))
            if num_new < request.num_pending:
                break
            if load is not None:
                load = load.plus_chunk(num_computed=request.num_computed, num_new=num_new, samples=True)
        return chunks

    @staticmethod
    def _load_of(members: Sequence[RequestState]) -> StepLoad:
        num_computed = sum([request.num_computed for request in members])
        return StepLoad.of_decode(num_rows=len(members), kv_tokens=num_computed + len(members))

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
