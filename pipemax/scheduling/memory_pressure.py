"""`MemoryPressure`: who gets device slots and homes, and who gives them up.

When the device runs short, in this order:

    1. what READY requests left on the device is dropped (it is at home)
    2. blocks of other batches are dropped, as long as those batches still fit the window
    3. blocks of the batch being staged likewise
    4. what half-prefilled requests have computed is dropped: all of it must come back for their next chunk
    5. the youngest running request leaves its batch: its tail goes home, the rest is dropped

A request that joins a batch takes no room from a prompt that is half-way, and leaves it what it still wants; what
such a prompt gave up comes back over several steps, if one is too short for it. And when host memory itself is full, or
the device without offloading, the youngest request is restarted: its KV is given up and computed again. For lack of
memory nobody yields to a younger request, and a request alone always fits (`Scheduler.add_request`), so the oldest
always comes through and nothing deadlocks. (Who yields in `turns.py` has had its quantum of tokens, and does so only
while homes are free.) A row that finds no slot this time *stalls*; until it has been served nobody joins and nothing is
prefilled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipemax.config import KVOffload
from pipemax.kv.manager import KVManager
from pipemax.kv.prefetch import PrefetchBudget
from pipemax.scheduling.output_length import OutputLengthEstimate
from pipemax.scheduling.population import Population
from pipemax.scheduling.request_state import RequestState, Status


class MemoryPressure:
    """Verbs over `KVManager` that know ages and states. `num_left` and `num_restarted` count what shortage has cost."""

    def __init__(
        self,
        *,
        kv: KVManager,
        population: Population,
        prefetch_budget: PrefetchBudget,
        output_length: OutputLengthEstimate,
    ) -> None:
        self._kv = kv
        self._budget = prefetch_budget
        self._population = population
        self._output_length = output_length
        self._reserved_blocks = 0
        self._batch_blocks = [0] * len(population.batches)
        self._batch_absent = [0] * len(population.batches)
        self._holders: dict[int, RequestState] = {}  # requests with a block table, by time of admission
        self._leftovers: dict[int, RequestState] = {}  # of those, not in a batch and maybe still on the device
        self._undroppable: set[int] = set()  # of those, found to have nothing to drop while this step is staged
        self._stalled: set[int] = set()
        self._rows: set[int] = set()  # requests with a row in the step being staged: nothing of theirs is dropped
        self._window_used = 0  # by those rows
        self._refill_blocks = 0  # that travel for those rows
        self.num_left = 0
        self.num_restarted = 0

    # -- questions -----------------------------------------------------------------------------------------------------

    @property
    def stalled(self) -> bool:
        return bool(self._stalled)

    def can_admit(self, request: RequestState) -> bool:
        """Whether a waiting request's expected length fits at home beside what is promised already.

        Without offloading there is no room to promise: what it has now must fit the device, and who grows too much
        later starts over.
        """
        if request.request_id in self._holders or not self._holders:
            return True
        if self._kv.offload is KVOffload.OFF:
            return self._kv.device.num_free >= self._kv.blocks_for(request.num_tokens) + self.growth_reserve()
        return self._reserved_blocks + self._expected_blocks(request) <= self._kv.host.num_blocks

    def prompt_reserve(self, chunk_tokens: int) -> int:
        """Slots that prompts will want while they are prefilled by chunks of that many tokens: joiners leave them free.

        One chunk being computed and one on its way home, as far as so much waits; and what the prompt that is half-way
        has yet to get: its rest, and what it had to give up.
        """
        waiting = self._population.waiting
        if not chunk_tokens or not waiting:
            return 0
        tokens = 0
        for request in waiting:
            tokens = min(2 * chunk_tokens, tokens + request.num_pending)
            if tokens == 2 * chunk_tokens:
                break
        reserve = self._kv.blocks_for(tokens)
        if waiting[0].request_id in self._holders:
            table = self._kv.tables[waiting[0].request_id]
            reserve += self._kv.blocks_for(waiting[0].num_tokens) - table.num_blocks + table.num_absent
        return reserve

    @property
    def batch_blocks(self) -> Sequence[int]:
        """Blocks that each batch in flight holds, present or absent."""
        return self._batch_blocks

    def num_blocks(self, request: RequestState) -> int:
        return self._kv.tables[request.request_id].num_blocks

    def growth_reserve(self) -> int:
        """Slots that running requests will want within a step or two: joiners leave them free."""
        return -(-self._population.num_running // self._kv.block_size)

    def growth_to_end(self) -> int:
        """Homes that running requests, and one that joins, are expected to want until they end.

        What has run for long is expected to go on for as long as a new one.
        """
        mean_blocks = self._kv.blocks_for(max(1, round(self._output_length.mean_tokens)))
        return (self._population.num_running + 1) * mean_blocks

    def travel_beside(self, batch_id: int, requests: Iterable[RequestState]) -> Iterator[RequestState]:
        """The first of the requests, in no batch, that the link can bring together with what the batch lacks."""
        left = self._budget.left(self._refill_blocks + self._batch_absent[batch_id])
        for request in requests:
            left -= self._kv.tables[request.request_id].num_absent
            if left < 0:
                return
            yield request

    # -- rows ----------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A step is being staged, without rows as yet. What has boarded for another attempt travels all the same."""
        self._rows.clear()
        self._undroppable.clear()
        self._window_used = 0
        self._refill_blocks = self._kv.num_promoted

    def _take_row(self, request: RequestState, *, absent: int, promoted_blocks: int) -> None:
        self._rows.add(request.request_id)
        self._window_used += absent
        self._refill_blocks += absent + promoted_blocks
        if self._stalled:
            self._stalled.discard(request.request_id)
        if request.status is not Status.RUNNING:
            self._leftovers[request.request_id] = request

    def extend_batch(self, batch_id: int) -> list[RequestState]:
        """Room for one more token of each member, in order of age; gives those that got it.

        Of the others some have left their batch: for an older one's sake, or to come back in another shape.
        """
        members = self._population.batches[batch_id].copy()
        tables, block_size = self._kv.tables, self._kv.block_size
        growing = [
            request
            for request in members
            if not request.num_computed % block_size
            and request.num_computed == tables[request.request_id].num_blocks * block_size
        ]
        self._make_device_room(len(growing), batch_id=batch_id)
        if not self._all_fit(members, growing, batch_id=batch_id):
            return list(self._extend_one_by_one(members))
        for request in growing:
            self._grow(request, request.num_computed + 1)
        request_ids = [request.request_id for request in members]
        self._rows.update(request_ids)
        self._stalled.difference_update(request_ids)
        self._window_used += self._batch_absent[batch_id]
        self._refill_blocks += self._batch_absent[batch_id]
        return members

    def _make_device_room(self, missing: int, *, batch_id: int) -> None:
        """One pass of cheap drops for all the blocks that a decode step needs."""
        if missing > self._kv.device.num_free:
            self._drop_leftovers(missing)
            batches = self._population.batches
            others = [other for other in range(len(batches)) if other != batch_id]
            for other in [*sorted(others, key=lambda other: self._batch_absent[other]), batch_id]:
                if missing <= self._kv.device.num_free:
                    return
                self._drop_to_window(other, missing)
            self._drop_leftovers(missing, prompts_too=True)

    def _all_fit(self, members: Sequence[RequestState], growing: Sequence[RequestState], *, batch_id: int) -> bool:
        """Whether nobody has to make room for anybody, as in nearly every step: then no member is looked at alone."""
        kv, absent = self._kv, self._batch_absent[batch_id]
        return (
            len(growing) <= min(kv.device.num_free, kv.host.num_free)
            and self._window_used + absent <= kv.window.num_blocks
            and self._budget.allows(self._refill_blocks + absent, num_rows=len(self._rows) + len(members))
        )

    def _extend_one_by_one(self, members: Iterable[RequestState]) -> Iterator[RequestState]:
        """As `extend_batch`: the oldest first, and each takes what it needs from the younger ones."""
        kv, rows = self._kv, self._rows
        for request in members:
            if request.status is not Status.RUNNING:
                continue  # it had to leave meanwhile
            table = kv.tables[request.request_id]
            if table.num_absent > kv.window.num_blocks:
                self.leave(request)  # the window has become smaller
                continue
            if (
                not self._budget.allows(self._refill_blocks + table.num_absent, num_rows=len(rows) + 1)
                or self._window_used + table.num_absent > kv.window.num_blocks
            ):
                # The link has become slower, or the step shorter, than when blocks were dropped; or the first row
                # needs more than a step's budget, and then it runs alone.
                continue
            full = request.num_computed == table.num_blocks * kv.block_size
            if full and not self._add_block(request):
                continue
            rows.add(request.request_id)
            self._window_used += table.num_absent
            self._refill_blocks += table.num_absent
            self._stalled.discard(request.request_id)
            yield request

    def _add_block(self, request: RequestState) -> bool:
        if not self._make_host_room(request):
            return False
        while not self._kv.device.num_free:
            if self._kv.offload is KVOffload.OFF:
                if not self._restart_youngest(sparing=None, younger_than=request):
                    self._restart(request)
                    return False
                continue
            victim = self._youngest_running(younger_than=request)
            if victim is not None:
                self.leave(victim)
                self.num_left += 1
                self._drop_leftovers(1, prompts_too=True)
            elif not self._drop_own(request):
                self._stalled.add(request.request_id)
                return False
        self._grow(request, request.num_computed + 1)
        return True

    def admit(self, request: RequestState, *, at_most: int, keep_free: int) -> int:
        """Room for a row of a request that is in no batch; gives the tokens it may compute: 0 if none.

        at_most    tokens wanted: 1 for a READY request, a chunk for a waiting prompt
        keep_free  slots to leave to others

        The tail, and what the window has no place for, becomes resident; its own blocks move to the window if that
        helps.
        """
        kv, request_id = self._kv, request.request_id
        if request_id not in self._holders:
            kv.add(request_id)
            self._holders[request_id] = request
            self._reserve(request, self._expected_blocks(request))
        table, tail = kv.tables[request_id], self._absent_tail(request)
        travelling = self._refill_blocks + table.num_absent
        if not self._budget.allows(travelling, num_rows=len(self._rows) + 1):
            return 0
        # A request alone may use the whole window, whatever the link can do: it has to run somehow.
        window = min(kv.window.num_blocks, self._budget.window_blocks) if self._rows else kv.window.num_blocks
        window_left = max(0, window - self._window_used)
        full_absent = table.num_absent - (tail is not None)
        fixed = keep_free + max(0, full_absent - window_left) + (tail is not None)
        wanted = fixed + kv.missing_blocks(request_id, request.num_computed + at_most)
        self._drop_leftovers(
            wanted,
            sparing=request,
            prompts_too=request.status is Status.WAITING or not self._population.num_running,
        )
        own_room = min(wanted - kv.device.num_free, window_left - full_absent)
        if own_room > 0 and self._budget.allows(travelling + own_room, num_rows=len(self._rows) + 1):
            self._drop(request, at_most=own_room, tail_too=False)
        new_blocks = min(kv.device.num_free - fixed, kv.host.num_free)
        room = table.num_blocks * kv.block_size - request.num_computed
        num_new = min(at_most, room + max(0, new_blocks) * kv.block_size)
        if kv.device.num_free < fixed or num_new <= 0:
            if self._is_stuck(request, room) and self._restart_youngest(sparing=request, younger_than=request):
                return self.admit(request, at_most=at_most, keep_free=keep_free)
            return 0
        full = [block for block in table.absent_blocks().tolist() if block != tail]
        excess = max(0, len(full) - window_left)
        promoted = full[len(full) - excess :] + ([tail] if tail is not None else [])
        for block in promoted:
            self._promote(request, block)
        self._grow(request, request.num_computed + num_new)
        self._take_row(request, absent=table.num_absent, promoted_blocks=len(promoted))
        return num_new

    def _is_stuck(self, request: RequestState, room: int) -> bool:
        """Nothing will make room by itself for a request that found none: `room` tokens are left in its blocks."""
        if self._population.num_running or self._rows:
            return False
        if self._kv.offload is KVOffload.OFF:
            return True
        # A prompt that is half-way starts nobody over while READY requests might run.
        first = request.status is Status.READY or not self._population.ready
        return first and not room and not self._kv.host.num_free

    def join(self, request: RequestState, batch_id: int) -> None:
        """The request becomes a member of a batch: what it has on the device is no leftover."""
        self._leftovers.pop(request.request_id, None)
        self._population.join(request, batch_id)
        self._batch_blocks[batch_id] += self.num_blocks(request)
        self._batch_absent[batch_id] += self._kv.tables[request.request_id].num_absent

    def board(self, request: RequestState, *, keep_free: int) -> None:
        """Brings what the link has time for of a request that is too long to come back in one step.

        Who is further from running makes room: else a device full of others that wait would keep it waiting for good.
        """
        absent = self._kv.tables[request.request_id].absent_blocks().tolist()
        wanted = min(self._budget.left(self._refill_blocks), len(absent))
        if wanted:
            self._drop_leftovers(wanted + keep_free, sparing=request)
        room = min(wanted, self._kv.device.num_free - keep_free)
        for block in absent[: max(0, room)]:
            self._promote(request, block)
            self._refill_blocks += 1
            self._leftovers[request.request_id] = request

    def promote_absent(self, requests: Iterable[RequestState]) -> None:
        """Free slots are used at once: blocks that would travel every turn stay from now on."""
        keep_free = 2 * self.growth_reserve() + 1
        for request in requests:
            table = self._kv.tables[request.request_id]
            if table.num_absent:
                for block in table.absent_blocks().tolist():
                    if self._kv.device.num_free <= keep_free:
                        return
                    self._promote(request, block)

    # -- giving up -----------------------------------------------------------------------------------------------------

    def leave(self, request: RequestState) -> None:
        """The request leaves its batch: its tail goes home, so that all of it may be dropped."""
        assert request.status is Status.RUNNING
        self._kv.write_home(
            request.request_id,
            first_token=(request.num_computed - 1) // self._kv.block_size * self._kv.block_size,
            num_tokens=request.num_computed,
            partial_too=True,
        )
        self._leave_batch(request)
        self._population.make_ready(request)
        self._leftovers[request.request_id] = request
        self._stalled.discard(request.request_id)

    def forget(self, request: RequestState) -> None:
        """The request needs no memory any more."""
        if self._holders.pop(request.request_id, None) is not None:
            self._leave_batch(request)
            self._kv.release(request.request_id)
            self._reserve(request, 0)
            self._leftovers.pop(request.request_id, None)
        self._stalled.discard(request.request_id)

    def _restart(self, request: RequestState) -> None:
        self.forget(request)
        request.num_computed = 0
        self._population.make_waiting(request)
        self.num_restarted += 1

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _leave_batch(self, request: RequestState) -> None:
        if request.batch_id is not None:
            self._batch_blocks[request.batch_id] -= self.num_blocks(request)
            self._batch_absent[request.batch_id] -= self._kv.tables[request.request_id].num_absent

    def _promote(self, request: RequestState, block: int) -> None:
        self._kv.promote(request.request_id, block)
        if request.batch_id is not None:
            self._batch_absent[request.batch_id] -= 1

    def _drop(self, request: RequestState, *, at_most: int, tail_too: bool) -> int:
        dropped = self._kv.drop(request.request_id, num_tokens=request.num_computed, at_most=at_most, tail_too=tail_too)
        if request.batch_id is not None:
            self._batch_absent[request.batch_id] += dropped
        return dropped

    def _absent_tail(self, request: RequestState) -> int | None:
        """The block that the next token is written to, if it is there but not on the device."""
        block = request.num_computed // self._kv.block_size
        table = self._kv.tables[request.request_id]
        return block if block < table.num_blocks and table.slots[block] < 0 else None

    def _expected_blocks(self, request: RequestState) -> int:
        outputs = self._output_length.expected_tokens(max_outputs=request.max_outputs, num_outputs=request.num_outputs)
        return self._kv.blocks_for(request.num_prompt + outputs)

    def _reserve(self, request: RequestState, blocks: int) -> None:
        self._reserved_blocks += blocks - request.reserved_blocks
        request.reserved_blocks = blocks

    def _grow(self, request: RequestState, num_tokens: int) -> None:
        num_added = self._kv.grow(request.request_id, num_tokens)
        if request.batch_id is not None:
            self._batch_blocks[request.batch_id] += num_added
        num_blocks = self.num_blocks(request)
        if num_blocks > request.reserved_blocks:
            self._reserve(request, num_blocks)

    def _drop_leftovers(self, wanted: int, *, sparing: RequestState | None = None, prompts_too: bool = False) -> None:
        """Drops blocks of requests that are in no batch, youngest first, until `wanted` slots are free.

        prompts_too   also of those that are half-prefilled
        """
        if self._kv.offload is KVOffload.OFF or wanted <= self._kv.device.num_free:
            return
        for request_id in sorted(self._leftovers.keys() - self._undroppable, reverse=True):
            short = wanted - self._kv.device.num_free
            if short <= 0:
                return
            request = self._leftovers[request_id]
            if request is sparing or request_id in self._rows:
                continue
            if request.status is Status.WAITING and not prompts_too:
                continue
            if self._drop(request, at_most=short, tail_too=True) < short:
                self._undroppable.add(request_id)
            table = self._kv.tables[request_id]
            if table.num_absent == table.num_blocks:
                del self._leftovers[request_id]

    def _drop_to_window(self, batch_id: int, wanted: int) -> None:
        """Drops full blocks of one batch's members while its absent blocks fit the window."""
        room = min(self._kv.window.num_blocks, self._budget.window_blocks) - self._batch_absent[batch_id]
        if room <= 0:
            return
        # Few requests with many absent blocks make longer copies than many with few.
        members = sorted(
            self._population.batches[batch_id],
            key=lambda r: (-self._kv.tables[r.request_id].num_absent, -r.request_id),
        )
        for request in members:
            short = min(wanted - self._kv.device.num_free, room)
            if short <= 0:
                return
            room -= self._drop(request, at_most=short, tail_too=False)

    def _drop_own(self, request: RequestState) -> int:
        """The first row of a step may use the whole window, whatever the link can do: it has to run somehow."""
        room = 0 if self._rows else self._kv.window.num_blocks - self._kv.tables[request.request_id].num_absent
        return self._drop(request, at_most=min(1, max(0, room)), tail_too=False)

    def _youngest_running(self, *, younger_than: RequestState) -> RequestState | None:
        """Of the batch that holds most, so that the batches stay equal."""
        batches = self._population.batches
        for batch_id in sorted(range(len(batches)), key=lambda batch_id: -self._batch_blocks[batch_id]):
            victim = next((r for r in reversed(batches[batch_id]) if r.request_id not in self._rows), None)
            if victim is not None and victim.request_id > younger_than.request_id:
                return victim
        return None

    def _make_host_room(self, request: RequestState) -> bool:
        """One free home for a running request; restarts the youngest, which may be the request itself."""
        while not self._kv.host.num_free:
            if not self._restart_youngest(sparing=None, younger_than=request):
                assert len(self._holders) > 1, "a request alone does not fit at home"
                self._restart(request)
                return False
        return True

    def _restart_youngest(self, *, sparing: RequestState | None, younger_than: RequestState) -> bool:
        """Restarts the youngest request that holds memory and has no row; False if all are older than the given one."""
        others = (r for r in self._holders.values() if r.request_id not in self._rows and r is not sparing)
        youngest = max(others, key=lambda r: r.request_id, default=None)
        if youngest is None or youngest.request_id <= younger_than.request_id:
            return False
        self._restart(youngest)
        return True
