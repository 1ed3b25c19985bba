"""`PipelineActor`: a pipeline that Ray Data calls with batches, several at a time.

    batch 1 ──rows──┐                                              ┌──► batch 1, when its last row is there
    batch 2 ──rows──┼─► RequestFeed ─► Replicas.stream ─► outputs ─┼──► batch 2
    batch 3 ──rows──┘                  (a thread)                  └──► ...

Rows of all batches are in one stream, so nothing is drained where a batch ends. Back-pressure is Ray's: it has only so
many batches on their way. A pipeline that fails is started anew in place, with its rows (`replicas.py`); when that does
not help, this process ends, and Ray starts another and runs its batches again. All processes of the pipeline end with
this one, however that ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from pipemax.ray.rows import request_of, result_table, with_results
from pipemax.replicas import DEFAULT_MAX_RESTARTS, Replicas
from pipemax.request import GenerationError, RequestError, RequestOutput
from pipemax.request_feed import RequestFeed

_log = logging.getLogger(__name__)


class RowFailedError(RuntimeError):
    """A row failed, and the job wants to end then."""


class PipelineActor:
    """A callable class for `ray.data.Dataset.map_batches` with `batch_format="pyarrow"`.

    model_source              folder of the model, there on every machine
    engine_kwargs             settings of `EngineConfig`
    should_continue_on_error  True: a row's error is in its column `__inference_error__`; False: it ends the job
    id_column                 column with names that differ from row to row; draws without a seed depend on them then
    max_restarts              restarts of a failed pipeline in a row, without any row finished between, before the actor
                              ends

    Raises ConfigError or ExecutorError when the pipeline cannot be started.
    """

    def __init__(
        self,
        *,
        model_source: str,
        engine_kwargs: Mapping[str, Any] | None = None,
        should_continue_on_error: bool = True,
        id_column: str | None = None,
        max_restarts: int = DEFAULT_MAX_RESTARTS,
    ) -> None:
        self._should_continue_on_error = should_continue_on_error
        self._id_column = id_column
        self._numbers = itertools.count()
        self._owners: dict[str, _Batch] = {}
        self._feed = RequestFeed()
        self._replicas = Replicas(model_source, max_restarts=max_restarts, **(engine_kwargs or {}))
        self._thread = threading.Thread(target=self._work, name="pipemax-stream", daemon=True)
        self._thread.start()

    async def __call__(self, table: pa.Table) -> AsyncIterator[pa.Table]:
        """The batch with the columns of `rows.RESULT_SCHEMA`, once its last row is done."""
        batch = _Batch(table.num_rows, asyncio.get_running_loop())
        requests = []
        for place, row in enumerate(table.to_pylist()):
            request_id = self._name(row)
            try:
                if request_id in self._owners:
                    raise RequestError(f"another row in flight has the id {request_id!r}", param=self._id_column)
                request = request_of(row, request_id=request_id)
            except AssertionError:
                raise
            except Exception as error:  # whatever a dataset may hold
                batch.settle(place, _refused(request_id, row, error))
                continue
            batch.places[request_id] = place
            self._owners[request_id] = batch
            requests.append(request)
        self._feed.put(requests)
        outputs = await batch.done
        self._check(outputs)
        yield with_results(table, result_table(outputs))

    def _name(self, row: Mapping[str, Any]) -> str:
        if self._id_column is not None and row.get(self._id_column) is not None:
            return str(row[self._id_column])
        return f"{os.getpid()}-{next(self._numbers)}"

    def _check(self, outputs: list[RequestOutput]) -> None:
        if self._should_continue_on_error:
            return
        for output in outputs:
            if output.error is not None:
                raise RowFailedError(f"row {output.request_id}: {output.error}")

    def _work(self) -> None:
        """On the stream's thread, for the life of the actor."""
        try:
            for output in self._replicas.stream(self._feed):
                self._feed.settled()
                batch = self._owners.pop(output.request_id)
                batch.settle(batch.places[output.request_id], output)
        except BaseException:
            # Not an error of the batches, which would end the job: Ray starts another actor and runs them there.
            _log.exception("the pipeline of this actor is of no use any more; the actor ends")
            self._replicas.shutdown()
            os._exit(1)


class _Batch:
    """Outputs of one batch as they come, from the stream's thread or its own; `done` gives all, in row order."""

    def __init__(self, num_rows: int, loop: asyncio.AbstractEventLoop) -> None:
        self.places: dict[str, int] = {}
        self.done: asyncio.Future[list[RequestOutput]] = loop.create_future()
        self._outputs: list[RequestOutput | None] = [None] * num_rows
        self._lock = threading.Lock()
        self._left = num_rows
        self._loop = loop
        if not num_rows:
            self.done.set_result([])

    def settle(self, place: int, output: RequestOutput) -> None:
        with self._lock:
            assert self._outputs[place] is None
            self._outputs[place] = output
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self.done.cancelled():
            self.done.set_result([output for output in self._outputs if output is not None])


def _refused(request_id: str, row: Mapping[str, Any], error: Exception) -> RequestOutput:
    prompt = row.get("prompt")
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=[],
        error=error if isinstance(error, RequestError) else GenerationError(f"the row cannot be read: {error}"),
    )
