"""`Population`: which live request is in which state. Queues by age, one dict a batch; no memory, no policy."""

from __future__ import annotations

import bisect

from pipemax.scheduling.request_state import RequestState, Status


def _age(request: RequestState) -> int:
    return request.request_id


class Population:
    """Live requests. `waiting` and `ready` are in order of age, `batches[b]` maps request ids to members."""

    def __init__(self, *, num_batches: int) -> None:
        self.requests: dict[int, RequestState] = {}
        self.waiting: list[RequestState] = []
        self.ready: list[RequestState] = []
        self.batches: list[dict[int, RequestState]] = [{} for _ in range(num_batches)]

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

    def join(self, request: RequestState, batch_id: int) -> None:
        self._take_out(request)
        request.status, request.batch_id = Status.RUNNING, batch_id
        self.batches[batch_id][request.request_id] = request

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
        del self.requests[request.request_id]

    def _take_out(self, request: RequestState) -> None:
        if request.status is Status.RUNNING:
            assert request.batch_id is not None
            del self.batches[request.batch_id][request.request_id]
            request.batch_id = None
        elif request.status is not Status.DRAINING:
            queue = self.waiting if request.status is Status.WAITING else self.ready
            index = bisect.bisect_left(queue, request.request_id, key=_age)
            assert queue[index] is request
            del queue[index]
