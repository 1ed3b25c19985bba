"""The command line: `pipemax run-batch ...`.

Flags come in here, errors and exit codes go out; the work is done elsewhere. torch and Transformers are imported inside
commands only, so that help and usage errors come at once.

    0    done, and no more rows failed than --error-threshold allows
    1    done, and more rows failed
    2    wrong flags, settings, files or model: nothing was started
    3    a stage died or a file could not be written: what was done before is in the files
    130  interrupted: likewise
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipemax.config import ConfigError
from pipemax.engine_flags import with_engine_flags
from pipemax.planning.command import add_plan_command


class ExitCode(enum.IntEnum):
    DONE = 0
    ROWS_FAILED = 1
    WRONG_SETTINGS = 2
    ENGINE_DIED = 3
    INTERRUPTED = 130


app = typer.Typer(
    name="pipemax",
    help="Offline LLM inference at the highest throughput on servers whose GPUs have no fast interconnect.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> int:
    """Runs the command line of this process and gives its exit code."""
    try:
        return int(app(standalone_mode=False) or ExitCode.DONE)
    except typer.TyperException as error:  # flags that are unknown, missing or not of their type
        _tell(error.format_message())
        return ExitCode.WRONG_SETTINGS
    except typer.Abort:
        return ExitCode.INTERRUPTED


def _tell(message: str) -> None:
    print(f"pipemax: error: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _errors_told(*, verbose: bool) -> Iterator[None]:
    """Turns what a command raises into one line and an exit code. Bugs come with their traceback, asked for or not."""
    from pipemax.executor.base import ExecutorError

    code = ExitCode.ENGINE_DIED
    try:
        yield
        return
    except (typer.Exit, typer.TyperException):
        raise
    except KeyboardInterrupt:
        code, message, details = ExitCode.INTERRUPTED, "interrupted", ""
    except ConfigError as error:
        code, message, details = ExitCode.WRONG_SETTINGS, str(error), traceback.format_exc()
    except ExecutorError as error:
        message, details = str(error), error.details + traceback.format_exc()
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        details = traceback.format_exc()
    except Exception as error:
        verbose = True
        message, details = f"internal error: {error!r}", traceback.format_exc()
    if verbose and details:
        print(details, file=sys.stderr)
    _tell(message)
    raise typer.Exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pipemax {importlib.metadata.version('pipemax')}")
        raise typer.Exit


@app.callback()
def _pipemax(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


bench_app = typer.Typer(name="bench", help="Measures.", no_args_is_help=True)
app.add_typer(bench_app)


@bench_app.command("throughput")
@with_engine_flags
def bench_throughput(
    *,
    dataset_path: Annotated[
        Path,
        typer.Option(metavar="PATH", help="CSV with columns prompt_tokens and output_tokens, a request a line."),
    ],
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Requests: the first N of the file.", show_default="all", min=1)
    ] = None,
    output_json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Everything measured, as JSON.", show_default="not written")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")] = False,
    engine: dict[str, Any],
) -> None:
    """Works through random prompts of the file's lengths, and prints how fast that went.

    Output lengths are hidden from the scheduler: all requests carry the same max_tokens and are stopped when they have
    their length.
    """
    with _errors_told(verbose=verbose):
        from pipemax.bench import run_throughput

        run_throughput(
            dataset_path=dataset_path,
            num_prompts=num_prompts,
            output_json=output_json,
            engine_settings=engine,
            stdout=sys.stdout,
        )


@app.command("run-batch")
@with_engine_flags
def run_batch(
    *,
    input_file: Annotated[
        Path,
        typer.Option(
            "--input-file", "-i", metavar="PATH", help="Requests, one JSON object a line (OpenAI batch format)."
        ),
    ],
    output_file: Annotated[
        Path,
        typer.Option(
            "--output-file", "-o", metavar="PATH", help="Answers, appended as rows finish, in no fixed order."
        ),
    ],
    error_file: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Rows that failed.", show_default="beside the output: NAME.errors.jsonl"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output and error files that exist.")] = False,
    error_threshold: Annotated[
        int, typer.Option(metavar="ROWS", help="Rows that may fail before the exit code is 1; -1: any number.", min=-1)
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")] = False,
    engine: dict[str, Any],
) -> None:
    """Answers every row of a file of requests in the OpenAI batch format.

    Rows that are wrong or fail go to the error file; the others go on. The output is there from the first answer on.
    """
    with _errors_told(verbose=verbose):
        from pipemax.io.progress import ProgressStyle
        from pipemax.run_batch import BatchEngine, BatchFiles
        from pipemax.run_batch import run_batch as run

        def start_engine() -> BatchEngine:
            from pipemax.llm import LLM

            return LLM(**engine)

        files = BatchFiles.check(input_file, output_file, error_file, overwrite=overwrite)
        counts = run(
            files=files,
            overwrite=overwrite,
            start_engine=start_engine,
            progress_style=ProgressStyle.NONE if quiet else ProgressStyle.for_stream(sys.stderr),
            show_messages=not quiet,
            stderr=sys.stderr,
        )
        if 0 <= error_threshold < counts.failed_rows:
            raise typer.Exit(ExitCode.ROWS_FAILED)


@app.command()
def doctor(
    *,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Copy on the GPUs for a few seconds to measure their links.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of findings, for programs.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")] = False,
) -> None:
    """Looks at this machine: GPUs, links, memory, limits, libraries; what each means for a job, and what to do.

    The exit code is 1 if something would keep a job from running, else 0.
    """
    with _errors_told(verbose=verbose):
        from pipemax.doctor.display import findings_json, show_findings
        from pipemax.doctor.examination import examine
        from pipemax.doctor.finding import Severity

        findings = examine(measure=measure)
        if as_json:
            found = list(findings)
            print(findings_json(found))
        else:
            found = show_findings(findings, sys.stdout)
        if any(finding.severity is Severity.BLOCKS for finding in found):
            raise typer.Exit(1)


add_plan_command(app, errors_told=_errors_told)
