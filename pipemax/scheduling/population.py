"""`Population`: which live request is in which state. Queues and batches by age; no memory, no policy."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from pipemax.scheduling.request_state import RequestState, Status


def _age(request: RequestState) -> int:
    return request.request_id


def _outputs(request: RequestState) -> tuple[int, int]:
    return request.num_outputs, request.request_id


class Population:
    """Live requests. `waiting`, `ready` and the members of each batch in flight, `batches[b]`, are in order of age.

    `ready_by_outputs` has the READY ones again, those with the fewest outputs first.
    """

    def __init__(self, *, num_batches: int) -> None:
        self.requests: dict[int, RequestState] = {}
        self.waiting: list[RequestState] = []
        self.ready: list[RequestState] = []
        self.ready_by_outputs: list[RequestState] = []
        self.batches: list[list[RequestState]] = [[] for _ in range(num_batches)]

    @property
    def num_running(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def add(self, request: RequestState) -> None:
        assert request.request_id not in self.requests and request.status is Status.WAITING
        self.requests[request.request_id] = request
        bisect.insort(self.waiting, request, key=_age)

    def make_ready(self, request: RequestState) -> None:
        """Prefill is done, or the request leaves its batch."""
        self._take_out(request)
        request.status = Status.READY
        bisect.insort(self.ready, request, key=_age)
        bisect.insort(self.ready_by_outputs, request, key=_outputs)

    def join(self, request: RequestState, batch_id: int) -> None:
        self._take_out(request)
        request.status, request.batch_id = Status.RUNNING, batch_id
        request.outputs_at_join = request.num_outputs
        bisect.insort(self.batches[batch_id], request, key=_age)

    def make_waiting(self, request: RequestState) -> None:
        """The request starts anew, in its old place in the queue."""
        self._take_out(request)
        request.status = Status.WAITING
        bisect.insort(self.waiting, request, key=_age)

    def drain(self, request: RequestState) -> None:
        self._take_out(request)
        request.status = Status.DRAINING

    def remove(self, request: RequestState) -> None:
        self._take_out(request)
        request.status = Status.FINISHED
        del self.requests[request.request_id]

    def _take_out(self, request: RequestState) -> None:
        if request.status is Status.RUNNING:
            assert request.batch_id is not None
            _delete(self.batches[request.batch_id], request, key=_age)
            request.batch_id = None
        elif request.status is Status.READY:
            _delete(self.ready, request, key=_age)
            _delete(self.ready_by_outputs, request, key=_outputs)
        elif request.status is Status.WAITING:
            _delete(self.waiting, request, key=_age)


def _delete(queue: list[RequestState], request: RequestState, *, key: Callable[[RequestState], Any]) -> None:
    index = bisect.bisect_left(queue, key(request), key=key)
    assert queue[index] is request
    del queue[index]
