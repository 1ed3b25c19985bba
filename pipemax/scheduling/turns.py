"""`Turns`: who makes room in a batch for whom, once nobody waits for prefill any more.

How long an answer gets is unknown until it ends. Requests that run to their end one after another leave a tail: the
last to join runs on alone, at nearly the price of a full step. So at the end of a job the request with the fewest
outputs goes first, and all that are left advance together:

    to the end, one after another        in turns
    A ████████████████                   A ██  ██  ██  ██  ██
    B ████████                           B   ██  ██  ██ .
    C         ████████████████           C ██  ██  ██  ██  ██       nearly the same length is left of A and C:
    D                 ████████           D   ██  ██  ██ .           the batch is full until then

What a turn costs is a request's KV over the link, so it lasts for a number of tokens. Whoever joins runs for as many
before it can be asked to leave: every turn brings the job forward, whatever the order. Numbers of outputs only; memory,
link and queues are the scheduler's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipemax.scheduling.request_state import RequestState

QUANTUM_TOKENS = 64


class Turns:
    """A member of a batch yields to a READY request that is more than `quantum_tokens` outputs behind it."""

    def __init__(self, *, quantum_tokens: int = QUANTUM_TOKENS) -> None:
        assert quantum_tokens >= 1
        self._quantum_tokens = quantum_tokens

    def are_taken(self, *, num_waiting: int, num_ready: int, free_homes: int, growth_blocks: int) -> bool:
        """Whether it is time to, and there is room: turns keep everyone's KV growing, and lack of homes costs restarts.

        growth_blocks   homes that are wanted if turns end now, and those that run go on to their end
        """
        return num_ready > 0 and not num_waiting and free_homes >= growth_blocks

    def over(self, members: Sequence[RequestState], following: Iterable[RequestState]) -> list[RequestState]:
        """Members whose turn is over, most outputs first: one for each of `following`, which come fewest first."""
        leaving: list[RequestState] = []
        ahead: list[RequestState] | None = None
        for request in following:
            if ahead is None:
                ahead = self._ahead(members, of=request)
            if len(leaving) == len(ahead):
                break
            member = ahead[len(leaving)]
            if member.num_outputs <= request.num_outputs + self._quantum_tokens:
                break
            leaving.append(member)
        return leaving

    def _ahead(self, members: Sequence[RequestState], *, of: RequestState) -> list[RequestState]:
        quantum = self._quantum_tokens
        limit = of.num_outputs + quantum
        ahead = [r for r in members if r.num_outputs > limit and r.num_outputs >= r.outputs_at_join + quantum]
        return sorted(ahead, key=lambda r: (-r.num_outputs, -r.request_id))
