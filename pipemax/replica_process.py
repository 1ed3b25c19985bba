"""The process of a replica: one `LLM`, its requests from a pipe, its outputs into the pipe.

    pipe ──reader thread──► RequestFeed ──► LLM.stream ──► outbox ──► pipe
             | end of file: the parent is gone or wants no more; the process ends at once, and its stages with it

A control plane is Python, so several in one process would take turns. Never here: which replica gets which request,
what becomes of a failure (`replicas.py`).
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from pipemax.config import ConfigError
from pipemax.executor.base import ExecutorError
from pipemax.executor.stage_handle import start_server
from pipemax.observer import EngineGauges
from pipemax.plan import StepPlan, StepResult
from pipemax.replica_messages import (
    Drop,
    Observe,
    PlanDone,
    PlanSubmitted,
    ReplicaFailure,
    ReplicaNews,
    ReplicaReady,
    ReplicaSettings,
)
from pipemax.request import RequestOutput
from pipemax.request_feed import FeedAbandoned, RequestFeed
from pipemax.scheduling.request_state import RequestUpdate
from pipemax.settled_heap import settled_heap
from pipemax.text_generator import GenerationRequest

if TYPE_CHECKING:
    from pipemax.llm import LLM

# Many steps of a small model in one message, no more than one or two of a large one.
_NEWS_SECONDS = 0.02


def main() -> None:
    """`python -m pipemax.replica_process FD`: FD is a connection to the parent, inherited."""
    serve(Connection(int(sys.argv[1])))


def serve(pipe: Connection) -> NoReturn:
    """Loads, then answers requests until the pipe ends."""
    # Ctrl-C and a batch system's SIGTERM go to all processes of a job; how it ends is up to the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        settings = pipe.recv()
        assert isinstance(settings, ReplicaSettings)
        os.environ.clear()
        os.environ.update(settings.environment)
        _run(settings, pipe)
    except BaseException as error:
        failure = ReplicaFailure(
            message=str(error)
            if isinstance(error, ConfigError | ExecutorError)
            else f"{type(error).__name__}: {error}",
            details=error.details if isinstance(error, ExecutorError) else traceback.format_exc(),
            config_error=isinstance(error, ConfigError),
        )
        with contextlib.suppress(OSError):
            pipe.send(failure)
    os._exit(1)  # the reader thread is inside a read


def _run(settings: ReplicaSettings, pipe: Connection) -> NoReturn:
    outbox = _Outbox(pipe)
    # Whoever started this may be killed while the stages load: the reader is there from the start.
    inbox = _Inbox(pipe, outbox)
    inbox.start()
    start_server()
    from pipemax.llm import LLM

    llm = LLM(**settings.settings)
    inbox.llm = outbox.llm = llm
    llm.observe(outbox)
    pipe.send(
        ReplicaReady(
            model_name=llm.model_name,
            capacity=llm.capacity,
            max_model_len=llm.max_model_len,
            vocab_size=llm.vocab_size,
            max_num_seqs=llm.max_num_seqs,
        )
    )
    with settled_heap():
        while True:
            _answer(inbox.next_feed(), llm, outbox)
            outbox.drop_done()


def _answer(feed: RequestFeed, llm: LLM, outbox: _Outbox) -> None:
    """Until the feed ends, which is a drop."""
    with contextlib.suppress(FeedAbandoned):
        for output in llm.stream(outbox.count_taken(feed)):
            feed.settled()
            outbox.add(output)


class _Inbox:
    """Reads the pipe on a thread of its own, so that the parent never waits. A drop ends a feed and begins another."""

    def __init__(self, pipe: Connection, outbox: _Outbox) -> None:
        self._pipe = pipe
        self._outbox = outbox
        self._feeds: queue.SimpleQueue[RequestFeed] = queue.SimpleQueue()
        self._feed = self._begin_feed()
        self.llm: LLM | None = None

    def start(self) -> None:
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_feed(self) -> RequestFeed:
        return self._feeds.get()

    def _begin_feed(self) -> RequestFeed:
        feed = RequestFeed(on_wait=self._outbox.send)
        self._feeds.put(feed)
        return feed

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._pipe.recv()
                if isinstance(message, list):
                    self._feed.put(message)
                elif isinstance(message, Observe):
                    self._outbox.observed = True
                else:
                    assert isinstance(message, Drop)
                    self._drop(message)
        if self.llm is not None:
            self.llm.shutdown()  # so that the stages are gone, and their memory is free, when this process is
        os._exit(0)

    def _drop(self, what: Drop) -> None:
        """In this order: the stream that drops its queue finds no more to fill it, and the next one begins after."""
        assert self.llm is not None, "nothing is asked of a replica before it is ready"
        ended = self._feed
        ended.discard()
        self.llm.drop_queued()
        self._feed = self._begin_feed()
        if what is Drop.ALL:
            ended.abandon()
        else:
            ended.close()


class _Outbox:
    """Gathers news and sends them now and then. Observes the engine, so that it is asked in every step."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sent_seconds = 0.0
        self._outputs: list[RequestOutput] = []
        self._events: list[PlanSubmitted | PlanDone] = []
        self._num_taken = 0
        self._num_drops = 0
        self.llm: LLM | None = None
        self.observed = False

    def add(self, output: RequestOutput) -> None:
        self._outputs.append(output)

    def count_taken(self, feed: Iterable[GenerationRequest | None]) -> Iterator[GenerationRequest | None]:
        for request in feed:
            self._num_taken += request is not None
            yield request

    def drop_done(self) -> None:
        self._num_drops += 1
        self.send()

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        """See `EngineObserver`."""
        if self.observed:
            self._events.append(PlanSubmitted(plan, now_seconds, gauges))

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        """See `EngineObserver`."""
        if self.observed:
            self._events.append(PlanDone(result, list(updates)))
        if time.monotonic() - self._sent_seconds >= _NEWS_SECONDS:
            self.send()

    def send(self) -> None:
        """All that there is, even if that is only a sign of life."""
        assert self.llm is not None
        news = ReplicaNews(
            stats=self.llm.stats(),
            outputs=self._outputs,
            events=self._events,
            num_taken=self._num_taken,
            num_drops=self._num_drops,
        )
        self._outputs, self._events, self._num_taken, self._num_drops = [], [], 0, 0
        self._sent_seconds = time.monotonic()
        with contextlib.suppress(OSError):  # the parent is gone: the reader ends the process
            self._pipe.send(news)


if __name__ == "__main__":
    main()
