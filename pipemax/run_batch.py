"""A batch job from its beginning to its end: what is there is taken up, the rest runs, what was asked for is made.

    JobResults.take_up  ->  start_engine  ->  BatchJob.run  ->  summary, trace, report  ->  JobResults.complete

It can be killed at any moment: started again, it reads what its files hold, makes sure that the rest belongs to it and
runs what is missing. A `JobRecord` looks on all the time: progress, metrics, and at the end trace and report.

What never lives here: running rows (`batch_job.py`), files and formats (`io/`), command line flags (`cli.py`), the
engine (`llm.py`).
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pipemax.batch_job import BatchEngine, BatchJob, TooManyFailedRowsError, check_failed
from pipemax.config import ConfigError, EngineConfig
from pipemax.interrupts import Interrupts
from pipemax.io.batch_files import BatchFiles, ExistingOutput
from pipemax.io.job_manifest import Settings
from pipemax.io.job_results import JobResults
from pipemax.io.model_digest import model_digest
from pipemax.io.progress import JobCounts, ProgressDisplay, ProgressStyle
from pipemax.io.sampling_defaults import defaults_text
from pipemax.job_watch import JobWatch
from pipemax.report.html_report import JobOutcome
from pipemax.report.job_record import JobRecord, RecordWishes

__all__ = [
    "BatchEngine",
    "BatchFiles",
    "ExistingOutput",
    "JobRules",
    "RowOrder",
    "TooManyFailedRowsError",
    "answer_settings",
    "run_batch",
]

# After the first Ctrl-C: long enough for most answers, short enough for a batch system that kills half a minute later.
_DRAIN_SECONDS = 20.0


class RowOrder(enum.Enum):
    """Order of lines in the final files."""

    AS_FINISHED = "as finished"
    AS_INPUT = "as in the input"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRules:
    """How a job deals with what is there and with what goes wrong.

    existing          see `ExistingOutput`
    settings          what answers depend on, for the manifest
    sampling_defaults of rows that say nothing, by the API's names (`io/sampling_defaults.py`)
    error_threshold   stop once more rows than that have failed; None: never
    row_order         see `RowOrder`
    max_restarts      times in a row that a failed pipeline is started anew without any row finished in between
    """

    existing: ExistingOutput = ExistingOutput.RESUME
    settings: Settings
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    error_threshold: int | None = None
    row_order: RowOrder = RowOrder.AS_FINISHED
    max_restarts: int = 5


def answer_settings(config: EngineConfig, sampling_defaults: Mapping[str, Any] | None = None) -> Settings:
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
            "sampling_defaults": defaults_text(sampling_defaults or {}),
        }
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; models are not downloaded: give a folder or a .gguf file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None


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

    job: BatchJob | None = None
    results = JobResults(
        files, existing=rules.existing, settings=rules.settings, defaults=rules.sampling_defaults, tell=tell
    )
    with interrupts, results:
        beginning = results.take_up()
        to_run = beginning.open_rows
        earlier_rows = beginning.answered_rows + beginning.failed_rows
        counts = JobCounts(
            total_rows=to_run + earlier_rows,
            answered_rows=beginning.answered_rows,
            failed_rows=beginning.failed_rows,
            earlier_rows=earlier_rows,
        )
        check_failed(counts, rules.error_threshold)
        if counts.total_rows:
            earlier = f", {counts.earlier_rows:,} of them done already" if counts.earlier_rows else ""
            tell(f"{counts.total_rows:,} rows in {files.input}{earlier}" + ("; loading the model" if to_run else ""))
        if to_run and files.job_input.has_short_answers(rules.sampling_defaults):
            tell(
                "texts without max_tokens are completed by 16 tokens: --max-tokens, or a column of that name, says more"
            )
        engine = start_watched() if to_run else None
        start_seconds = time.monotonic()
        try:
            try:
                results.make_files()
                if engine is not None:
                    job = BatchJob(
                        engine,
                        start_watched,
                        results=results,
                        counts=counts,
                        error_threshold=rules.error_threshold,
                        max_restarts=rules.max_restarts,
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
                results.answers.sync()
                results.errors.sync()
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
        results.complete(in_input_order=rules.row_order is RowOrder.AS_INPUT)
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


def _summary(counts: JobCounts, seconds: float, job: BatchJob | None, files: BatchFiles) -> str:
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
        copies = f"{totals.blocks_sent_home:,} blocks went home, {totals.blocks_refilled:,} came back"
        lines.append(f"  KV       {copies if totals.blocks_sent_home else 'stayed on the devices'}")
        if job.num_restarts:
            lines.append(f"  restarts {job.num_restarts:,}: the pipeline failed, rows in flight ran again")
    if open_rows and files.answers != files.output:
        lines.append(f"  so far   {files.answers}, of which {files.output} is made at the end")
    else:
        lines.append(f"  answers  {files.output}")
    if counts.failed_rows:
        where = f"the column {files.result_prefix}error" if files.error_file is None else str(files.error_file)
        lines.append(f"  errors   {where}")
    if open_rows:
        lines.append("  not done: the same command goes on with the rest")
    return "\n".join(lines)
