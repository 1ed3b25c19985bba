"""`RequestFeed`: requests that come while a stream runs, from another thread.

    put ──► [ ... ] ──next──► stream ──output──► settled

To be given to `TextGenerator.stream`. While something is in flight an empty feed says None, and the pipeline goes on;
with nothing in flight it blocks until there is a request, or an end. Never here: what becomes of outputs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from pipemax.text_generator import GenerationRequest


class FeedAbandoned(Exception):  # noqa: N818  (nothing is wrong)
    """What is in flight is no longer wanted: goes through the stream, which drops it."""


class RequestFeed:
    """One stream's requests. `on_wait` is called, on the stream's thread, before the feed blocks."""

    def __init__(self, *, on_wait: Callable[[], None] = lambda: None) -> None:
        self._on_wait = on_wait
        self._changed = threading.Condition()
        self._requests: deque[GenerationRequest] = deque()
        self._in_flight = 0
        self._closed = False
        self._abandoned = False

    # -- by whoever has requests ---------------------------------------------------------------------------------------

    def put(self, requests: Iterable[GenerationRequest]) -> None:
        with self._changed:
            assert not self._closed
            self._requests.extend(requests)
            self._changed.notify()

    def discard(self) -> None:
        """Forgets what the stream has not taken."""
        with self._changed:
            self._requests.clear()

    def close(self) -> None:
        """No more will come: the stream ends when all that was put is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def abandon(self) -> None:
        """Makes the stream raise FeedAbandoned when it asks next."""
        with self._changed:
            self._closed = self._abandoned = True
            self._changed.notify()

    # -- by whoever reads the stream -----------------------------------------------------------------------------------

    def settled(self) -> None:
        """A request has come back from the stream."""
        self._in_flight -= 1

    # -- by the stream -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[GenerationRequest | None]:
        return self

    def __next__(self) -> GenerationRequest | None:
        if not self._requests and not self._closed and not self._in_flight:
            self._on_wait()
        with self._changed:
            while not self._requests and not self._closed and not self._in_flight:
                self._changed.wait()
            if self._abandoned:
                raise FeedAbandoned
            if self._requests:
                self._in_flight += 1
                return self._requests.popleft()
            if self._closed:
                raise StopIteration
            return None
