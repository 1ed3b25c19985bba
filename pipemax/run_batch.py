"""A batch job: rows of a file go through an engine, answers and errors are appended as they come.

    BatchReader ──row──► engine.stream ──answer──► OutputJournal (answers)
         │                     └────────error───► OutputJournal (errors)
         └──────────────────────────────error───►

The job keeps nothing but the rows that the engine has and has not given back. It can be killed at any moment: started
again, it reads what its files hold (`io/done_rows.py`), makes sure that the rest belongs to it (`io/job_manifest.py`)
and runs what is missing. When the pipeline fails, the job starts another one and runs the rows in flight again
(`reruns.py`). A `JobRecord` looks on all the time: progress, metrics, and at the end trace and report.

What never lives here: the format of a line (`io/`), command line flags (`cli.py`), the engine (`llm.py`).
"""

from __future__ import annotations

import enum
import itertools
import math
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from pipemax.config import ConfigError, EngineConfig
from pipemax.executor.base import ExecutorError
from pipemax.interrupts import Interrupts
from pipemax.io.batch_reader import BatchReader, count_rows
from pipemax.io.batch_request import BatchRow, ErrorCode, RowError, row_error
from pipemax.io.batch_response import answer_line, failure_line, refusal_line
from pipemax.io.done_rows import DoneRows
from pipemax.io.input_order import put_in_input_order
from pipemax.io.job_manifest import JobManifest, Settings, manifest_path
from pipemax.io.model_digest import model_digest
from pipemax.io.output_journal import OutputJournal
from pipemax.io.progress import JobCounts, ProgressDisplay, ProgressStyle
from pipemax.job_watch import JobWatch
from pipemax.observer import EngineObserver
from pipemax.plan import Capacity
from pipemax.report.html_report import JobOutcome
from pipemax.report.job_record import JobRecord, RecordWishes
from pipemax.report.row_log import RowLog
from pipemax.request import GenerationError, RequestOutput
from pipemax.reruns import Reruns

if TYPE_CHECKING:
    from pipemax.llm import EngineStats, GenerationRequest

# After the first Ctrl-C: long enough for most answers, short enough for a batch system that kills half a minute later.
_DRAIN_SECONDS = 20.0
_LONGEST_PAUSE_SECONDS = 30.0


class ExistingOutput(enum.Enum):
    """What happens with results that are there already.

    RESUME goes on with them, and refuses if the job is not the one they came from. FORCE_RESUME goes on all the same:
    what is done stays as it is. OVERWRITE starts anew.
    """

    RESUME = "resume"
    FORCE_RESUME = "force-resume"
    OVERWRITE = "overwrite"


class RowOrder(enum.Enum):
    """Order of lines in the final files."""

    AS_FINISHED = "as finished"
    AS_INPUT = "as in the input"


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


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """Where a job reads and writes; checked, but not opened."""

    input: Path
    answers: Path
    errors: Path
    manifest: Path

    @classmethod
    def check(
        cls, input_file: Path, output_file: Path, error_file: Path | None, *, existing: ExistingOutput
    ) -> BatchFiles:
        """Raises ConfigError for anything that would make the job fail, or write over something, later.

        `error_file` None means beside the output: out.jsonl gets out.errors.jsonl.
        """
        if error_file is None:
            error_file = output_file.with_name(f"{output_file.stem}.errors{output_file.suffix}")
        manifest = manifest_path(output_file)
        _check_input(input_file)
        for flag, path in (("--output-file", output_file), ("--error-file", error_file)):
            _check_target(flag, path)
            if _same_file(path, input_file):
                raise ConfigError(f"{flag} {path} is the input file: choose another")
        if _same_file(output_file, error_file):
            raise ConfigError(f"--error-file {error_file} is the output file: choose another")
        for path in (input_file, output_file, error_file):
            if _same_file(path, manifest):
                raise ConfigError(f"{path} is where the job of {output_file} keeps its manifest: choose another name")
        if existing is not ExistingOutput.OVERWRITE and not manifest.exists():
            for path in (output_file, error_file):
                if path.exists() and path.stat().st_size:
                    raise ConfigError(
                        f"{path} exists and is not of a job that could go on (there is no {manifest.name}): choose "
                        "another, or give --overwrite"
                    )
        return cls(input_file, output_file, error_file, manifest)

    def check_record(self, wishes: RecordWishes) -> None:
        """Raises ConfigError for what would keep a trace, a report or metrics from being had later.

        They replace older ones of the same name, but none of the job's own files.
        """
        for flag, path in (("--trace", wishes.trace), ("--report", wishes.report)):
            if path is not None:
                _check_target(flag, path)
                for own in (self.input, self.answers, self.errors, self.manifest):
                    if _same_file(path, own):
                        raise ConfigError(f"{flag} {path} is a file of the job itself: choose another")
        if wishes.trace is not None and wishes.report is not None and _same_file(wishes.trace, wishes.report):
            raise ConfigError(f"--report {wishes.report} is the trace: choose another")
        if wishes.metrics is not None:
            wishes.metrics.check()


def _check_input(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"--input-file {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ConfigError(f"--input-file {path} is {kind}: give a file of JSON lines")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"--input-file {path}: no permission to read it")


def _check_target(flag: str, path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        folder = path.resolve().parent
        if not folder.is_dir():
            raise ConfigError(f"{flag} {path}: there is no folder {folder}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{flag} {path}: no permission to write in {folder}") from None
        return
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ConfigError(f"{flag} {path} is {kind}: give a file's name")
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{flag} {path}: no permission to write it")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: no permission to write in {path.resolve().parent}")


def _same_file(left: Path, right: Path) -> bool:
    """Also through links of both kinds, and for files that are not there yet."""
    try:
        return left.samefile(right)
    except OSError:
        return left.resolve() == right.resolve()


def answer_settings(config: EngineConfig) -> Settings:
    """What answers depend on, for the manifest. Where and how fast they are computed is not among it.

    Raises ConfigError when the model's files cannot be read.
    """
    model = Path(config.model)
    tokenizer = model if config.tokenizer is None else Path(config.tokenizer)
    try:
        return {
            "model": model.resolve().name,
            "model_digest": model_digest(model),
            "tokenizer_digest": model_digest(tokenizer),
            "load_format": config.load_format.value,
            "dtype": config.dtype,
            "seed": config.seed,
            "max_model_len": config.max_model_len,
        }
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRules:
    """How a job deals with what is there and with what goes wrong.

    existing          see `ExistingOutput`
    settings          what answers depend on, for the manifest
    error_threshold   stop once more rows than that have failed; None: never
    row_order         see `RowOrder`
    max_restarts      times in a row that a failed pipeline is started anew without any row finished in between
    """

    existing: ExistingOutput = ExistingOutput.RESUME
    settings: Settings
    error_threshold: int | None = None
    row_order: RowOrder = RowOrder.AS_FINISHED
    max_restarts: int = 5


def run_batch(
    *,
    files: BatchFiles,
    rules: JobRules,
    start_engine: Callable[[], BatchEngine],
    wishes: RecordWishes,
    progress_style: ProgressStyle,
    show_messages: bool,
    stderr: TextIO,
    watch: JobWatch | None = None,
) -> JobCounts:
    """Runs a job, or what is left of it, and gives what came of all its rows. Without rows to run it needs no engine.

    `watch` ends the process when the job itself hangs; it looks after the engines that `start_engine` gives.

    Raises what `start_engine` raises at the first start; ConfigError when results that are there are not of this job;
    ExecutorError when the pipeline fails too often; TooManyFailedRowsError; OSError when a file fails; JobInterrupted
    (a KeyboardInterrupt). Whatever ends the job, rows that were done are in their files by then, the summary has been
    shown, and trace and report are written.
    """
    files.check_record(wishes)
    record, problem = JobRecord(wishes), ""
    watch = watch or JobWatch(stall_seconds=math.inf)

    def tell(text: str) -> None:
        if show_messages:
            print(f"pipemax: {text}", file=stderr, flush=True)

    interrupts = Interrupts(
        drain_seconds=_DRAIN_SECONDS,
        on_first=lambda: None if job is None else job.drop_queued(),
        message=f"\npipemax: stopping: rows in flight may finish within {_DRAIN_SECONDS:.0f} s; once more: at once\n"
        if show_messages
        else "",
    )

    def start_watched() -> BatchEngine:
        return record.watch(start_engine())

    job: _Job | None = None
    with (
        interrupts,
        DoneRows() as done,
        OutputJournal(files.answers) as answers,
        OutputJournal(files.errors) as errors,
    ):
        beginning = _take_up(files, rules, answers, errors, done, tell)
        to_run = beginning.num_open_rows
        counts = JobCounts(
            total_rows=to_run + len(done),
            answered_rows=answers.num_rows,
            failed_rows=errors.num_rows,
            earlier_rows=len(done),
        )
        _check_failed(counts, rules)
        if counts.total_rows:
            earlier = f", {counts.earlier_rows:,} of them done already" if counts.earlier_rows else ""
            tell(f"{counts.total_rows:,} rows in {files.input}{earlier}" + ("; loading the model" if to_run else ""))
        engine = start_watched() if to_run else None
        start_seconds = time.monotonic()
        try:
            try:
                _make_files(rules, beginning.manifest, files, answers, errors)
                if engine is not None:
                    job = _Job(
                        engine,
                        start_watched,
                        rows=BatchReader(files.input, defaults={}),
                        done=done,
                        answers=answers,
                        errors=errors,
                        counts=counts,
                        rules=rules,
                        interrupts=interrupts,
                        watch=watch,
                        log=record.rows,
                        tell=tell,
                    )
                    display = ProgressDisplay(counts, live=record.live, style=progress_style, stream=stderr)
                    with record.serve_metrics(counts), display, watch.watch():
                        job.run()
                if counts.done_rows == counts.total_rows:
                    interrupts.all_is_done()  # also when the rows in flight that might still finish were all the rest
                problem = "interrupted" if interrupts.requested and counts.done_rows < counts.total_rows else ""
            except BaseException as error:
                problem = str(error) or type(error).__name__
                raise
            finally:
                answers.close()
                errors.close()
                tell(_summary(counts, time.monotonic() - start_seconds, job, files))
                if engine is not None:
                    title = f"{files.input.name} with {engine.model_name}"
                    _write_record(record, _outcome(title, counts, problem), tell)
        finally:
            if job is not None:
                job.end()
            elif engine is not None:
                engine.shutdown()
        interrupts.raise_if_requested()
        if rules.row_order is RowOrder.AS_INPUT:
            for path in (files.answers, files.errors):
                if path.exists():
                    put_in_input_order(path, BatchReader(files.input, defaults={}))
    return counts


def _outcome(title: str, counts: JobCounts, problem: str) -> JobOutcome:
    return JobOutcome(
        title=title,
        total_rows=counts.total_rows,
        answered_rows=counts.answered_rows,
        failed_rows=counts.failed_rows,
        earlier_rows=counts.earlier_rows,
        problem=problem,
    )


def _write_record(record: JobRecord, outcome: JobOutcome, tell: Callable[[str], None]) -> None:
    """Writes trace and report. Of a job that ended by an error that error is told, not one of these files."""
    try:
        for path in record.write(outcome):
            tell(f"  written  {path}")
    except OSError:
        if not outcome.problem:
            raise


@dataclass(frozen=True, slots=True)
class _Beginning:
    """Where a run takes the job up."""

    manifest: JobManifest
    num_open_rows: int


def _take_up(
    files: BatchFiles,
    rules: JobRules,
    answers: OutputJournal,
    errors: OutputJournal,
    done: DoneRows,
    tell: Callable[[str], None],
) -> _Beginning:
    """Reads what earlier runs have left. Raises ConfigError, OSError."""
    manifest = JobManifest(dict(rules.settings))
    if rules.existing is ExistingOutput.OVERWRITE:
        return _Beginning(manifest, count_rows(files.input))
    before = JobManifest.read(files.manifest)
    for journal in (answers, errors):
        if journal.path.exists():
            if torn_bytes := journal.recover():
                tell(f"{journal.path}: the last line was not finished ({torn_bytes:,} bytes); its row runs again")
            journal.num_rows = done.add_file(journal.path)
    if before is None or len(done) == 0:
        return _Beginning(manifest, count_rows(files.input))
    difference = before.difference(rules.settings)
    fix = "choose another output file, give --overwrite to start anew, or --force-resume to go on all the same"
    if difference is not None:
        if rules.existing is not ExistingOutput.FORCE_RESUME:
            raise ConfigError(f"{files.answers} has answers of another job: {difference}; {fix}")
        tell(f"going on with another setting: {difference}")
        manifest = before.replaced_by(rules.settings)
    else:
        manifest = before
    comparison = done.compare_with_input(BatchReader(files.input, defaults={}))
    if comparison.num_changed:
        what = f"{comparison.num_changed:,} rows that are done have changed in {files.input}: {comparison.example}"
        if rules.existing is not ExistingOutput.FORCE_RESUME:
            raise ConfigError(f"{what}; {fix}")
        tell(f"{what}; their results stay as they are")
    return _Beginning(manifest, comparison.num_open)


def _make_files(
    rules: JobRules, manifest: JobManifest, files: BatchFiles, answers: OutputJournal, errors: OutputJournal
) -> None:
    """From here on the folder holds a job that can be taken up. Raises OSError."""
    answers.create()
    if rules.existing is ExistingOutput.OVERWRITE:
        answers.clear()
        if files.errors.exists():
            errors.clear()
    manifest.write(files.manifest)


def _check_failed(counts: JobCounts, rules: JobRules) -> None:
    threshold = rules.error_threshold
    if threshold is not None and counts.failed_rows > threshold:
        raise TooManyFailedRowsError(
            f"stopped: {counts.failed_rows:,} rows have failed and --error-threshold is {threshold:,}; what is done is "
            "in the files: start again with a higher threshold to go on, or with --overwrite to start anew"
        )


class _Job:
    """One pass over the input. Every row ends as one line in `answers` or in `errors`, whatever becomes of engines."""

    def __init__(
        self,
        engine: BatchEngine,
        start_engine: Callable[[], BatchEngine],
        *,
        rows: BatchReader,
        done: DoneRows,
        answers: OutputJournal,
        errors: OutputJournal,
        counts: JobCounts,
        rules: JobRules,
        interrupts: Interrupts,
        watch: JobWatch,
        log: RowLog,
        tell: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._start_engine = start_engine
        self._done = done
        self._answers = answers
        self._errors = errors
        self._counts = counts
        self._rules = rules
        self._interrupts = interrupts
        self._watch = watch
        self._log = log
        self._tell = tell
        self._new_rows = self._read_new_rows(rows)
        self._new_rows_left = True
        self._pending: deque[BatchRow] = deque()
        self._in_flight: dict[str, BatchRow] = {}
        self._reruns: Reruns[BatchRow] = Reruns(max_failures=rules.max_restarts)
        self._past = _Totals()
        self.num_restarts = 0

    def run(self) -> None:
        self._interrupts.rows_are_in_flight()
        while not self._interrupts.requested and self._take_rows():
            try:
                self._run_together()
            except ExecutorError as error:
                with self._watch.pause():
                    self._start_again(error)
        if not self._interrupts.requested:
            self._write_condemned(at_end=True)

    def totals(self) -> _Totals:
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
            if self._done.covers(row):
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
            )
            self._log.failed(row.custom_id, code=error.code, message=error.message)
            self._write_failed(refusal_line(error))
            return
        self._answers.append(
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
        self._errors.append(line)
        self._counts.failed_rows += 1
        _check_failed(self._counts, self._rules)

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
class _Totals:
    """Counts over all engines of a job."""

    blocks_sent_home: int = 0
    blocks_refilled: int = 0

    def plus(self, stats: EngineStats) -> _Totals:
        return _Totals(
            self.blocks_sent_home + stats.blocks_sent_home,
            self.blocks_refilled + stats.blocks_refilled,
        )


def _summary(counts: JobCounts, seconds: float, job: _Job | None, files: BatchFiles) -> str:
    open_rows = counts.total_rows - counts.done_rows
    lines = [
        f"{counts.answered_rows:,} rows answered, {counts.failed_rows:,} failed"
        + (f" ({counts.earlier_rows:,} of them before)" if counts.earlier_rows else "")
        + (f", {open_rows:,} not done" if open_rows else "")
        + f", in {seconds:,.1f} s",
        f"  tokens   {counts.prompt_tokens:,} prompt, {counts.output_tokens:,} output, "
        f"{counts.output_tokens / max(seconds, 1e-9):,.1f} output tokens/s",
    ]
    if job is not None:
        totals = job.totals()
        lines.append(f"  KV       {totals.blocks_sent_home:,} blocks went home, {totals.blocks_refilled:,} came back")
        if job.num_restarts:
            lines.append(f"  restarts {job.num_restarts:,}: the pipeline failed, rows in flight ran again")
    lines.append(f"  answers  {files.answers}")
    if counts.failed_rows:
        lines.append(f"  errors   {files.errors}")
    if open_rows:
        lines.append("  not done: the same command goes on with the rest")
    return "\n".join(lines)
