"""`BatchJob`: one pass over the rows of a job: through engines, and into the files of results.

    JobResults.rows ──row──► engine.stream ──answer──► JobResults.answers
         │                        └────────error───► JobResults.errors
         └─────────────────────────────────error───►

The job keeps nothing but the rows that the engine has and has not given back. When the pipeline fails, it starts
another one and runs the rows in flight again (`reruns.py`). Never here: files and formats (`io/`), what a run is from
its beginning to its end (`run_batch.py`), the engine (`llm.py`).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipemax.config import ConfigError
from pipemax.executor.base import ExecutorError
from pipemax.interrupts import Interrupts
from pipemax.io.batch_request import BatchRow, ErrorCode, RowError, row_error
from pipemax.io.batch_response import answer_line, failure_line, refusal_line
from pipemax.io.job_results import JobResults
from pipemax.io.progress import JobCounts
from pipemax.job_watch import JobWatch
from pipemax.observer import EngineObserver
from pipemax.plan import Capacity
from pipemax.report.row_log import RowLog
from pipemax.request import GenerationError, RequestOutput
from pipemax.reruns import Reruns
from pipemax.settled_heap import settled_heap

if TYPE_CHECKING:
    from pipemax.llm import EngineStats, GenerationRequest

_LONGEST_PAUSE_SECONDS = 30.0


class TooManyFailedRowsError(RuntimeError):
    """More rows failed than the threshold allows; the job has stopped. The message says what to do."""


class BatchEngine(Protocol):
    """What a job needs of `LLM`."""

    @property
    def model_name(self) -> str: ...

    @property
    def capacity(self) -> Capacity: ...

    def observe(self, observer: EngineObserver) -> None: ...

    def stream(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]: ...

    def drop_queued(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def shutdown(self) -> None: ...


def check_failed(counts: JobCounts, threshold: int | None) -> None:
    """Raises TooManyFailedRowsError when more rows have failed than `threshold`; None: any number may."""
    if threshold is not None and counts.failed_rows > threshold:
        raise TooManyFailedRowsError(
            f"stopped: {counts.failed_rows:,} rows have failed and --error-threshold is {threshold:,}; what is done is "
            "in the files: start again with a higher threshold to go on, or with --overwrite to start anew"
        )


class BatchJob:
    """One pass over the input. Every row ends as one line in `answers` or in `errors`, whatever becomes of engines."""

    def __init__(
        self,
        engine: BatchEngine,
        start_engine: Callable[[], BatchEngine],
        *,
        results: JobResults,
        counts: JobCounts,
        error_threshold: int | None,
        max_restarts: int,
        interrupts: Interrupts,
        watch: JobWatch,
        log: RowLog,
        tell: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._start_engine = start_engine
        self._results = results
        self._counts = counts
        self._error_threshold = error_threshold
        self._interrupts = interrupts
        self._watch = watch
        self._log = log
        self._tell = tell
        self._new_rows = self._read_new_rows(results.rows())
        self._new_rows_left = True
        self._pending: deque[BatchRow] = deque()
        self._in_flight: dict[str, BatchRow] = {}
        self._reruns: Reruns[BatchRow] = Reruns(max_failures=max_restarts)
        self._past = PipelineTotals()
        self.num_restarts = 0

    def run(self) -> None:
        self._interrupts.rows_are_in_flight()
        with settled_heap():
            while not self._interrupts.requested and self._take_rows():
                try:
                    self._run_together()
                except ExecutorError as error:
                    with self._watch.pause():
                        self._start_again(error)
        if not self._interrupts.requested:
            self._write_condemned(at_end=True)

    def totals(self) -> PipelineTotals:
        return self._past.plus(self._engine.stats())

    def drop_queued(self) -> None:
        self._engine.drop_queued()

    def end(self) -> None:
        self._engine.shutdown()

    # -- rows in -------------------------------------------------------------------------------------------------------

    def _take_rows(self) -> bool:
        """Decides what runs next: all that is left, or a group of suspects by itself; False when nothing is left."""
        self._pending.extend(self._reruns.take_again())
        if self._pending or self._new_rows_left:
            return True
        self._pending.extend(self._reruns.next_group() or ())
        return bool(self._pending)

    def _requests(self) -> Iterator[GenerationRequest]:
        from pipemax.llm import GenerationRequest

        while not self._interrupts.requested:
            row = self._pending.popleft() if self._pending else next(self._new_rows, None)
            if row is None:
                self._new_rows_left = False
                return
            self._in_flight[row.custom_id] = row
            self._log.started(row.custom_id, now_seconds=time.monotonic())
            yield GenerationRequest(
                request_id=row.custom_id,
                sampling_params=row.sampling_params,
                prompt=row.prompt,
                messages=row.messages,
                chat_template_kwargs=row.chat_template_kwargs,
            )

    def _read_new_rows(self, rows: Iterable[BatchRow | RowError]) -> Iterator[BatchRow]:
        for row in rows:
            self._watch.progress()
            if self._results.done.covers(row):
                continue
            if isinstance(row, RowError):
                self._log.refused(row.custom_id, code=row.code, message=row.message)
                self._write_failed(refusal_line(row))
            else:
                yield row

    # -- results out ---------------------------------------------------------------------------------------------------

    def _run_together(self) -> None:
        """All rows that are to run now; until the engine has given them back or fails."""
        for output in self._engine.stream(self._requests()):
            self._watch.progress()
            row = self._in_flight.pop(output.request_id, None)
            assert row is not None, f"the engine gave an output of {output.request_id!r}, which it does not have"
            self._settle(row, output)
            self._reruns.finished(row.custom_id)
            self._write_condemned(at_end=False)
        if self._interrupts.requested:
            return
        for row in self._in_flight.values():
            self._fail(row, code="row_lost", message="the engine ended without an answer")
        self._in_flight.clear()

    def _settle(self, row: BatchRow, output: RequestOutput) -> None:
        if isinstance(output.error, GenerationError):
            self._fail(row, code="generation_failed", message=str(output.error))
            return
        if output.error is not None:
            error = row_error(
                row.line_number,
                row.custom_id,
                ErrorCode.INVALID_VALUE,
                str(output.error),
                param=output.error.param,
                row_id=row.row_id,
                unit=row.unit,
            )
            self._log.failed(row.custom_id, code=error.code, message=error.message)
            self._write_failed(refusal_line(error))
            return
        self._results.answers.append(
            answer_line(row, output, model_name=self._engine.model_name, created_seconds=int(time.time()))
        )
        completion = output.outputs[0]
        prompt_tokens, output_tokens = len(output.prompt_token_ids), len(completion.token_ids)
        self._counts.answered_rows += 1
        self._counts.prompt_tokens += prompt_tokens
        self._counts.output_tokens += output_tokens
        self._log.answered(
            row.custom_id,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            finish_reason=str(completion.finish_reason),
            now_seconds=time.monotonic(),
        )

    def _write_condemned(self, *, at_end: bool) -> None:
        for condemned in self._reruns.take_condemned(at_end=at_end):
            message = f"the pipeline fails whenever this row runs: {condemned.error}"
            self._fail(condemned.row, code="pipeline_failed", message=message)

    def _fail(self, row: BatchRow, *, code: str, message: str) -> None:
        self._log.failed(row.custom_id, code=code, message=message)
        self._write_failed(failure_line(row, code=code, message=message))

    def _write_failed(self, line: bytes) -> None:
        self._results.errors.append(line)
        self._counts.failed_rows += 1
        check_failed(self._counts, self._error_threshold)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _start_again(self, error: ExecutorError) -> None:
        """Another pipeline in place of the one that has failed. Raises `error` or a later one when it is of no use."""
        unfinished = [(row.custom_id, row) for row in itertools.chain(self._in_flight.values(), self._pending)]
        self._in_flight.clear()
        self._pending.clear()
        self._past = self.totals()
        self._engine.shutdown()
        self._interrupts.raise_if_requested()
        self._reruns.failed(error, unfinished)
        if error.details:
            self._tell(error.details.rstrip())
        self._tell(f"{error}; starting the pipeline anew, {len(unfinished):,} rows run again")
        while True:
            num_failures = self._reruns.num_stalled_failures
            time.sleep(0.0 if num_failures < 2 else min(_LONGEST_PAUSE_SECONDS, 0.25 * 2**num_failures))
            self._interrupts.raise_if_requested()
            try:
                self._engine = self._start_engine()
            except (ExecutorError, ConfigError) as another:
                self._reruns.could_not_start(another)
                self._tell(f"{another}; trying again")
            else:
                self.num_restarts += 1
                return


@dataclass(frozen=True, slots=True)
class PipelineTotals:
    """Counts over all engines of a job. Blocks are KV blocks of all layers, on each stage."""

    blocks_sent_home: int = 0
    blocks_refilled: int = 0

    def plus(self, stats: EngineStats) -> PipelineTotals:
        return PipelineTotals(
            self.blocks_sent_home + stats.blocks_sent_home,
            self.blocks_refilled + stats.blocks_refilled,
        )
