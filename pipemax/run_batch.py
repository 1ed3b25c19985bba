"""A batch job: rows of a file go through an engine, answers and errors are appended as they come.

    BatchReader ──row──► engine.stream ──answer──► OutputJournal (answers)
         │                     └────────error───► OutputJournal (errors)
         └──────────────────────────────error───►

The job keeps nothing but the rows that the engine has and has not given back. What never lives here: the format of a
line (`io/`), command line flags (`cli.py`), the engine (`llm.py`).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from pipemax.config import ConfigError
from pipemax.io.batch_reader import BatchReader, count_rows
from pipemax.io.batch_request import BatchRow, ErrorCode, RowError, row_error
from pipemax.io.batch_response import answer_line, failure_line, refusal_line
from pipemax.io.output_journal import OutputJournal
from pipemax.io.progress import JobCounts, ProgressDisplay, ProgressStyle
from pipemax.request import GenerationError, RequestOutput

if TYPE_CHECKING:
    from pipemax.llm import EngineStats, GenerationRequest


class BatchEngine(Protocol):
    """What a job needs of `LLM`."""

    @property
    def model_name(self) -> str: ...

    def stream(self, requests: Iterable[GenerationRequest]) -> Iterator[RequestOutput]: ...

    def stats(self) -> EngineStats: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """Where a job reads and writes; checked, but not opened."""

    input: Path
    answers: Path
    errors: Path

    @classmethod
    def check(cls, input_file: Path, output_file: Path, error_file: Path | None, *, overwrite: bool) -> BatchFiles:
        """Raises ConfigError for anything that would make the job fail, or write over something, later.

        `error_file` None means beside the output: out.jsonl gets out.errors.jsonl.
        """
        if error_file is None:
            error_file = output_file.with_name(f"{output_file.stem}.errors{output_file.suffix}")
        _check_input(input_file)
        for flag, path in (("--output-file", output_file), ("--error-file", error_file)):
            _check_target(flag, path, overwrite=overwrite)
            if _same_file(path, input_file):
                raise ConfigError(f"{flag} {path} is the input file: choose another")
        if _same_file(output_file, error_file):
            raise ConfigError(f"--error-file {error_file} is the output file: choose another")
        return cls(input_file, output_file, error_file)


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


def _check_target(flag: str, path: Path, *, overwrite: bool) -> None:
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
    if status.st_size and not overwrite:
        raise ConfigError(f"{flag} {path} exists and is not empty: choose another, or give --overwrite")


def _same_file(left: Path, right: Path) -> bool:
    """Also through links of both kinds, and for files that are not there yet."""
    try:
        return left.samefile(right)
    except OSError:
        return left.resolve() == right.resolve()


def run_batch(
    *,
    files: BatchFiles,
    overwrite: bool,
    start_engine: Callable[[], BatchEngine],
    progress_style: ProgressStyle,
    show_messages: bool,
    stderr: TextIO,
) -> JobCounts:
    """Runs a whole job and gives what came of its rows. An input without rows needs no engine.

    Raises what `start_engine` and the engine raise (ConfigError, ExecutorError), and OSError when a file fails;
    whatever ends the job, rows that were done are in their files by then, and the summary has been shown.
    """
    counts = JobCounts(total_rows=count_rows(files.input))
    answers, errors = OutputJournal(files.answers), OutputJournal(files.errors)
    if show_messages and counts.total_rows:
        print(f"pipemax: {counts.total_rows:,} rows in {files.input}; loading the model", file=stderr, flush=True)
    engine = start_engine() if counts.total_rows else None
    try:
        start_seconds = time.monotonic()
        try:
            with answers, errors:
                answers.create()
                if overwrite:
                    answers.clear()
                    if files.errors.exists():
                        errors.clear()
                if engine is not None:
                    display = ProgressDisplay(
                        counts,
                        output_tokens=lambda: engine.stats().output_tokens,
                        style=progress_style,
                        stream=stderr,
                    )
                    with display:
                        _Job(engine, files.input, answers, errors, counts).run()
        finally:
            if show_messages:
                stats = None if engine is None else engine.stats()
                print(_summary(counts, time.monotonic() - start_seconds, stats, files), file=stderr, flush=True)
    finally:
        if engine is not None:
            engine.shutdown()
    return counts


class _Job:
    """One pass over the input. Every row ends as one line in `answers` or in `errors`."""

    def __init__(
        self, engine: BatchEngine, input_file: Path, answers: OutputJournal, errors: OutputJournal, counts: JobCounts
    ) -> None:
        self._engine = engine
        self._rows = BatchReader(input_file, defaults={})
        self._answers = answers
        self._errors = errors
        self._counts = counts
        self._in_flight: dict[str, BatchRow] = {}

    def run(self) -> None:
        for output in self._engine.stream(self._requests()):
            row = self._in_flight.pop(output.request_id, None)
            assert row is not None, f"the engine gave an output of {output.request_id!r}, which it does not have"
            self._settle(row, output)
        for custom_id in self._in_flight:
            self._fail(failure_line(custom_id, code="row_lost", message="the engine ended without an answer"))

    def _requests(self) -> Iterator[GenerationRequest]:
        from pipemax.llm import GenerationRequest

        for row in self._rows:
            if isinstance(row, RowError):
                self._fail(refusal_line(row))
                continue
            self._in_flight[row.custom_id] = row
            yield GenerationRequest(
                request_id=row.custom_id,
                sampling_params=row.sampling_params,
                prompt=row.prompt,
                messages=row.messages,
                chat_template_kwargs=row.chat_template_kwargs,
            )

    def _settle(self, row: BatchRow, output: RequestOutput) -> None:
        if isinstance(output.error, GenerationError):
            self._fail(failure_line(row.custom_id, code="generation_failed", message=str(output.error)))
            return
        if output.error is not None:
            error = row_error(
                row.line_number,
                row.custom_id,
                ErrorCode.INVALID_VALUE,
                str(output.error),
                param=output.error.param,
            )
            self._fail(refusal_line(error))
            return
        self._answers.append(
            answer_line(row, output, model_name=self._engine.model_name, created_seconds=int(time.time()))
        )
        self._counts.answered_rows += 1
        self._counts.prompt_tokens += len(output.prompt_token_ids)
        self._counts.output_tokens += len(output.outputs[0].token_ids)

    def _fail(self, line: bytes) -> None:
        self._errors.append(line)
        self._counts.failed_rows += 1


def _summary(counts: JobCounts, seconds: float, stats: Any, files: BatchFiles) -> str:
    open_rows = counts.total_rows - counts.done_rows
    lines = [
        f"pipemax: {counts.answered_rows:,} rows answered, {counts.failed_rows:,} failed"
        + (f", {open_rows:,} not done" if open_rows else "")
        + f", in {seconds:,.1f} s",
        f"  tokens   {counts.prompt_tokens:,} prompt, {counts.output_tokens:,} output, "
        f"{counts.output_tokens / max(seconds, 1e-9):,.1f} output tokens/s",
    ]
    if stats is not None:
        lines.append(f"  KV       {stats.blocks_sent_home:,} blocks went home, {stats.blocks_refilled:,} came back")
    lines.append(f"  answers  {files.answers}")
    if counts.failed_rows:
        lines.append(f"  errors   {files.errors}")
    return "\n".join(lines)
