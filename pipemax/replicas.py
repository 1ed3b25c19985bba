"""`Replicas`: several pipelines on one machine, fed from one stream of requests.

    requests ──► whichever replica has room and fewest in flight ─┬─► replica 0: GPUs 0 .. P-1
                        ▲                                         ├─► replica 1: GPUs P .. 2P-1
                        └── again, after a failure                └─► ...          ──► outputs, as they finish

A replica is a process with an `LLM` of its own (`replica.py`). One that fails is started anew while the others go on;
its requests go to whichever has room. What fails whichever pipeline it runs on is found by the rules of `reruns.py`,
and comes out with an error. Only when that does not help, ExecutorError is raised.

The composition root of replicas. Never here: who gets which GPUs (`replica_division.py`), processes and pipes,
scheduling.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from pipemax.config import ConfigError, EngineConfig
from pipemax.engine_stats import EngineStats
from pipemax.executor.base import ExecutorError
from pipemax.observer import EngineGauges, EngineObserver
from pipemax.plan import Capacity, StageTiming, StepResult
from pipemax.replica import Replica, ReplicaState
from pipemax.replica_division import divide
from pipemax.replica_messages import Drop, PlanDone, PlanSubmitted, ReplicaNews
from pipemax.request import GenerationError, RequestError, RequestOutput
from pipemax.reruns import Reruns
from pipemax.text_generator import GenerationRequest, TextGenerator

DEFAULT_MAX_RESTARTS = 5
_LONGEST_PAUSE_SECONDS = 30.0
# While the caller has nothing now: so long a request that comes may wait.
_ASK_AGAIN_SECONDS = 0.02
_LOOK_AROUND_SECONDS = 1.0


class Replicas(TextGenerator):
    """`data_parallel_size` pipelines, ready to generate; the calls are those of `LLM`.

    Parameters are the fields of `EngineConfig`, and `max_restarts`: times in a row that a failed replica is started
    anew without any request finished in between. Raises ConfigError or ExecutorError when a replica cannot be started
    (nothing is left running then); ExecutorError comes out of the generating calls when replicas fail too often. Use it
    as a context manager, or call `shutdown()`; replicas also end with this process.
    """

    def __init__(self, model: str | Path, *, max_restarts: int = DEFAULT_MAX_RESTARTS, **settings: Any) -> None:
        unknown = set(settings) - set(EngineConfig.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}; EngineConfig lists what there is")
        config = EngineConfig(model=str(model), **settings)
        self._config = config
        self._max_restarts = max_restarts
        self._observers: list[EngineObserver] = []
        self._gauges: dict[int, EngineGauges] = {}
        self._past: list[EngineStats] = []
        self._streaming = False
        self._dropping_queued = False
        self._queue_dropped = False
        self._reruns: Reruns[GenerationRequest] = self._new_reruns()
        self._pending: deque[GenerationRequest] = deque()
        self._open_ids: set[str] = set()
        self._running_group = False
        self._started_seconds = time.monotonic()
        self._replicas = [
            Replica(
                index=index,
                settings=one,
                stall_seconds=config.stall_seconds,
            )
            for index, one in enumerate(divide(config))
        ]
        try:
            for replica in self._replicas:
                replica.start()
            while not all(replica.state is ReplicaState.RUNNING for replica in self._replicas):
                for replica in self._heard(None):
                    replica.receive()
        except BaseException:
            self.shutdown()
            raise

    # -- generating ----------------------------------------------------------------------------------------------------

    def stream(self, requests: Iterable[GenerationRequest | None]) -> Iterator[RequestOutput]:
        """See `TextGenerator`. Ids of requests in flight must differ: a second one of the same id comes out with an
        error. One stream at a time. Raises ExecutorError when replicas fail too often."""
        if self._streaming:
            raise RuntimeError("these replicas are generating already: finish or close the other stream first")
        self._streaming = True
        self._queue_dropped = False
        self._reruns = self._new_reruns()
        source = _Source(requests)
        try:
            yield from self._finish_drops()
            while True:
                if self._dropping_queued:
                    self._drop_queue(source)
                yield from self._hand_out(source)
                if self._is_done(source):
                    return
                self._start_due()
                for replica in self._heard(self._patience_seconds(source)):
                    yield from self._receive(replica)
                self._check_silence()
                yield from self._condemned(at_end=False)
        finally:
            self._streaming = False
            self._pending.clear()
            self._open_ids.clear()
            self._running_group = False
            for replica in self._replicas:
                if replica.in_flight and replica.state is ReplicaState.RUNNING:
                    self._tell(replica, Drop.ALL)

    def drop_queued(self) -> None:
        """Makes a running `stream` give up the requests that no batch has taken up: no output comes of them.

        May be called from a signal handler.
        """
        self._dropping_queued = True

    # -- around --------------------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        return self._replicas[0].ready.model_name if self._replicas[0].ready else Path(self._config.model).name

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    @property
    def capacity(self) -> Capacity:
        """Of all replicas together: stages and blocks are sums, sizes are those of one."""
        ready = [replica.ready for replica in self._replicas if replica.ready is not None]
        return dataclasses.replace(
            ready[0].capacity,
            num_stages=sum(one.capacity.num_stages for one in ready),
            num_device_blocks=sum(one.capacity.num_device_blocks for one in ready),
            num_window_blocks=sum(one.capacity.num_window_blocks for one in ready),
            num_host_blocks=sum(one.capacity.num_host_blocks for one in ready),
        )

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together that every replica takes."""
        return min(replica.ready.max_model_len for replica in self._replicas if replica.ready is not None)

    def stats(self) -> EngineStats:
        """Sums over all replicas, those that are gone included; as of their last news."""
        all_stats = self._past + [replica.stats for replica in self._replicas if replica.stats is not None]
        capacity = self.capacity
        sums = {
            field.name: sum(getattr(stats, field.name) for stats in all_stats)
            for field in dataclasses.fields(EngineStats)
        }
        return EngineStats(
            **{
                **sums,
                "num_device_blocks": capacity.num_device_blocks,
                "num_window_blocks": capacity.num_window_blocks,
                "num_host_blocks": capacity.num_host_blocks,
                "elapsed_seconds": time.monotonic() - self._started_seconds,
            }
        )

    def observe(self, observer: EngineObserver) -> None:
        """From now on `observer` is told of every plan and result.

        Stages, batches and steps of replica r follow those of replica r-1 in number; gauges are sums. Told with a
        little delay, and in order for each replica.
        """
        self._observers.append(observer)
        for replica in self._replicas:
            if replica.state is ReplicaState.RUNNING:
                replica.observe()

    def pids(self) -> list[int | None]:
        """Processes of the replicas, for those who measure or break them."""
        return [replica.pid for replica in self._replicas]

    def shutdown(self) -> None:
        """Ends the replicas. Idempotent."""
        for replica in self._replicas:
            self._keep_stats(replica)
            replica.end()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- requests in ---------------------------------------------------------------------------------------------------

    def _hand_out(self, source: _Source) -> Iterator[RequestOutput]:
        """Gives requests to replicas with room, evenly; suspects, in groups, once nothing else is to be done."""
        if self._running_group and self._num_in_flight():
            return
        self._running_group = False
        self._pending.extend(self._reruns.take_again())
        batches: dict[int, list[GenerationRequest]] = {}
        source.ask_again()
        while (replica := self._next_replica(batches)) is not None:
            if self._pending:
                request: GenerationRequest | None = self._pending.popleft()
            elif (request := source.next()) is not None and request.request_id in self._open_ids:
                yield _same_id(request)
                continue
            if request is None:
                break
            self._open_ids.add(request.request_id)
            batches.setdefault(replica.index, []).append(request)
        for index, batch in batches.items():
            self._send(self._replicas[index], batch)
        if not (batches or self._pending or self._num_in_flight()) and (source.is_empty or source.is_exhausted):
            yield from self._turn_to_suspects()

    def _next_replica(self, batches: dict[int, list[GenerationRequest]]) -> Replica | None:
        def load(replica: Replica) -> int:
            return len(replica.in_flight) + len(batches.get(replica.index, ()))

        able = [
            replica
            for replica in self._replicas
            if replica.state is ReplicaState.RUNNING and replica.room > len(batches.get(replica.index, ()))
        ]
        return min(able, key=load, default=None)

    def _turn_to_suspects(self) -> Iterator[RequestOutput]:
        """They run together on one replica, and nothing else runs meanwhile. When there are none, all is told."""
        replica = next((one for one in self._replicas if one.state is ReplicaState.RUNNING), None)
        if replica is None:
            return
        group = self._reruns.next_group()
        if group is None:
            yield from self._condemned(at_end=True)
        else:
            self._running_group = True
            self._send(replica, group)

    def _send(self, replica: Replica, requests: Sequence[GenerationRequest]) -> None:
        try:
            replica.send_requests(requests)
        except ExecutorError as error:
            self._failed(replica, error)

    def _drop_queue(self, source: _Source) -> None:
        self._dropping_queued = False
        self._queue_dropped = True
        source.close()
        self._pending.clear()
        for replica in self._replicas:
            if replica.state is ReplicaState.RUNNING:
                self._tell(replica, Drop.QUEUED)

    # -- results out ---------------------------------------------------------------------------------------------------

    def _heard(self, timeout_seconds: float | None) -> list[Replica]:
        """Replicas that have said something, or have died."""
        pipes = {replica.pipe: replica for replica in self._replicas if replica.state is not ReplicaState.DOWN}
        return [pipes[pipe] for pipe in connection.wait(list(pipes), timeout_seconds)]  # type: ignore[index]

    def _receive(self, replica: Replica) -> Iterator[RequestOutput]:
        starting = replica.state is ReplicaState.STARTING
        try:
            news = replica.receive()
            if news is None and self._observers:
                replica.observe()
        except (ExecutorError, ConfigError) as error:
            self._failed(replica, error, starting=starting)
            return
        if news is None:
            return
        self._pass_on(replica, news)
        for output in news.outputs:
            replica.fruitless_failures = 0
            self._open_ids.discard(output.request_id)
            self._reruns.finished(output.request_id)
            yield output

    def _condemned(self, *, at_end: bool) -> Iterator[RequestOutput]:
        for condemned in self._reruns.take_condemned(at_end=at_end):
            request = condemned.row
            self._open_ids.discard(request.request_id)
            yield RequestOutput(
                request_id=request.request_id,
                prompt=request.prompt if isinstance(request.prompt, str) else None,
                prompt_token_ids=[],
                error=GenerationError(f"the pipeline fails whenever this request runs: {condemned.error}"),
            )

    def _is_done(self, source: _Source) -> bool:
        if self._queue_dropped:
            return not any(replica.is_dropping for replica in self._replicas)
        return source.is_exhausted and not self._open_ids

    def _num_in_flight(self) -> int:
        return sum(len(replica.in_flight) for replica in self._replicas)

    def _patience_seconds(self, source: _Source) -> float:
        has_room = any(one.state is ReplicaState.RUNNING and one.room for one in self._replicas)
        if source.is_empty and has_room and not self._running_group:
            return _ASK_AGAIN_SECONDS if self._num_in_flight() else 0.0
        return _LOOK_AROUND_SECONDS if self._num_in_flight() else _ASK_AGAIN_SECONDS

    def _finish_drops(self) -> Iterator[RequestOutput]:
        """What an earlier stream has left behind."""
        while any(replica.is_dropping for replica in self._replicas if replica.state is ReplicaState.RUNNING):
            for replica in self._heard(_LOOK_AROUND_SECONDS):
                yield from self._receive(replica)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _tell(self, replica: Replica, what: Drop) -> None:
        try:
            replica.drop(what)
        except ExecutorError as error:
            self._failed(replica, error)

    def _check_silence(self) -> None:
        for replica in self._replicas:
            try:
                replica.check_silence()
            except ExecutorError as error:
                self._failed(replica, error)

    def _failed(self, replica: Replica, error: ExecutorError | ConfigError, *, starting: bool = False) -> None:
        """The others go on. Raises `error` when there is no use in it."""
        unfinished = list(replica.in_flight.items())
        replica.in_flight.clear()
        self._keep_stats(replica)
        replica.end()
        self._gauges.pop(replica.index, None)
        if not self._running_group:
            replica.fruitless_failures += 1
        num_failures = replica.fruitless_failures
        pause_seconds = 0.0 if num_failures < 2 else min(_LONGEST_PAUSE_SECONDS, 0.25 * 2**num_failures)
        replica.start_at_seconds = time.monotonic() + pause_seconds
        if self._queue_dropped or not self._streaming:
            return  # nothing runs again any more
        if starting or not unfinished:
            self._reruns.could_not_start(error)
        else:
            self._reruns.failed(error, unfinished)
        if all(self._is_given_up(one) for one in self._replicas):
            raise error

    def _is_given_up(self, replica: Replica) -> bool:
        return replica.state is ReplicaState.DOWN and replica.fruitless_failures > self._max_restarts

    def _start_due(self) -> None:
        for replica in self._replicas:
            due = replica.state is ReplicaState.DOWN and time.monotonic() >= replica.start_at_seconds
            if due and not self._is_given_up(replica) and not self._queue_dropped:
                replica.start()

    def _new_reruns(self) -> Reruns[GenerationRequest]:
        return Reruns(max_failures=self._max_restarts * self._config.data_parallel_size)

    def _keep_stats(self, replica: Replica) -> None:
        if replica.stats is not None:
            self._past.append(replica.stats)
            replica.stats = None

    # -- observers -----------------------------------------------------------------------------------------------------

    def _pass_on(self, replica: Replica, news: ReplicaNews) -> None:
        """Events of one replica, in numbers that are its own among all."""
        if not news.events:
            return
        num_replicas, index = len(self._replicas), replica.index
        num_batches = self._config.num_batches or self._config.pipeline_parallel_size
        for event in news.events:
            if isinstance(event, PlanSubmitted):
                self._gauges[index] = event.gauges
                plan = dataclasses.replace(
                    event.plan,
                    step_id=event.plan.step_id * num_replicas + index,
                    batch_id=event.plan.batch_id + index * num_batches,
                )
                gauges = _sum_of(self._gauges.values(), expected_seconds=event.gauges.expected_seconds)
                for observer in self._observers:
                    observer.on_submit(plan, now_seconds=event.now_seconds, gauges=gauges)
            else:
                result = self._placed(event, step_id=event.result.step_id * num_replicas + index, replica=index)
                result = dataclasses.replace(result, batch_id=event.result.batch_id + index * num_batches)
                for observer in self._observers:
                    observer.on_result(result, event.updates)

    def _placed(self, event: PlanDone, *, step_id: int, replica: int) -> StepResult:
        """The replica's stages at their places; the others did nothing in this step."""
        result, num_stages = event.result, self._config.pipeline_parallel_size
        idle = StageTiming(min(timing.start_seconds for timing in result.timings), 0.0, 0.0, 0.0, 0, 0)
        before, after = replica * num_stages, (len(self._replicas) - replica - 1) * num_stages
        return dataclasses.replace(
            result, step_id=step_id, timings=(*[idle] * before, *result.timings, *[idle] * after)
        )


class _Source:
    """The caller's requests, asked no more often than once a round while there are none."""

    def __init__(self, requests: Iterable[GenerationRequest | None]) -> None:
        self._requests = iter(requests)
        self.is_empty = False
        self.is_exhausted = False

    def ask_again(self) -> None:
        self.is_empty = False

    def next(self) -> GenerationRequest | None:
        """None when there is none, now (`is_empty`) or ever (`is_exhausted`)."""
        if self.is_empty or self.is_exhausted:
            return None
        try:
            request = next(self._requests)
        except StopIteration:
            self.is_exhausted = True
            return None
        self.is_empty = request is None
        return request

    def close(self) -> None:
        self.is_exhausted = True


def _same_id(request: GenerationRequest) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt if isinstance(request.prompt, str) else None,
        prompt_token_ids=[],
        error=RequestError(f"another request in flight has the id {request.request_id!r}: give each its own"),
    )


def _sum_of(all_gauges: Iterable[EngineGauges], *, expected_seconds: float) -> EngineGauges:
    gauges = list(all_gauges)
    sums = {field.name: sum(getattr(one, field.name) for one in gauges) for field in dataclasses.fields(EngineGauges)}
    return EngineGauges(**{**sums, "expected_seconds": expected_seconds})
