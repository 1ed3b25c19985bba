"""The command line: `pipemax run-batch ...`.

Flags come in here, errors and exit codes go out; the work is done elsewhere. torch and Transformers are imported inside
commands only, so that help and usage errors come at once.

    0    done; no row failed, or no more than --error-threshold allows
    1    done, and rows failed; or stopped, since more failed than --error-threshold allows
    2    wrong flags, settings, files or model: nothing was started
    3    the pipeline failed too often or a file could not be written: what was done before is in the files
    130  interrupted by Ctrl-C, 143 by SIGTERM: likewise
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

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
    TERMINATED = 143


_ROWS = "Rows"
_WATCHING = "Watching the job"
_Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Trace of the steps, for ui.perfetto.dev (JSON).",
        show_default="not written",
        rich_help_panel=_WATCHING,
    ),
]
_Report = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Report: one HTML page.", show_default="not written", rich_help_panel=_WATCHING),
]

app = typer.Typer(
    name="pipemax",
    help="Offline LLM inference at the highest throughput on servers whose GPUs have no fast interconnect.",
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
    from pipemax.interrupts import JobInterrupted
    from pipemax.run_batch import TooManyFailedRowsError

    code = ExitCode.ENGINE_DIED
    try:
        yield
        return
    except (typer.Exit, typer.TyperException):
        raise
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, JobInterrupted) and interrupt.signal_number == signal.SIGTERM
        code = ExitCode.TERMINATED if terminated else ExitCode.INTERRUPTED
        message, details = "terminated" if terminated else "interrupted", ""
    except TooManyFailedRowsError as error:
        code, message, details = ExitCode.ROWS_FAILED, str(error), ""
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
    length_hints: Annotated[
        bool, typer.Option("--length-hints", help="Tell the scheduler: every request's max_tokens is its own length.")
    ] = False,
    output_json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Everything measured, as JSON.", show_default="not written")
    ] = None,
    trace: _Trace = None,
    report: _Report = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")] = False,
    engine: dict[str, Any],
) -> None:
    """Works through random prompts of the file's lengths, and prints how fast that went.

    Output lengths are hidden from the scheduler: all requests carry the same max_tokens and are stopped when they have
    their length. Ctrl-C ends it early and tells what had come by then.
    """
    with _errors_told(verbose=verbose):
        from pipemax.bench import run_throughput
        from pipemax.report.job_record import RecordWishes

        run_throughput(
            dataset_path=dataset_path,
            num_prompts=num_prompts,
            length_hints=length_hints,
            output_json=output_json,
            wishes=RecordWishes(trace=trace, report=report, command=["pipemax", *sys.argv[1:]], settings=engine),
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
            "--input-file",
            "-i",
            metavar="PATH",
            help="Requests: OpenAI batch format, or a table with prompts. .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or "
            "the folder of a Hugging Face dataset.",
        ),
    ],
    output_file: Annotated[
        Path,
        typer.Option(
            "--output-file",
            "-o",
            metavar="PATH",
            help="Answers, in any of these formats (no extension: a dataset's folder). OpenAI requests to .jsonl: "
            "appended as rows finish; all else: a table, made at the end.",
        ),
    ],
    error_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Rows that failed; in a table they have a column.",
            show_default="beside the output: NAME.errors.jsonl",
        ),
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column with the prompts: texts, token ids or chat messages.",
            show_default="messages or prompt",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    result_prefix: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Put before the names of result columns.", rich_help_panel=_ROWS),
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest answer of rows that do not say.",
            show_default="16; chats: the model's length",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T", help="Of rows that do not say.", show_default="the model's, else 1", rich_help_panel=_ROWS
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Of rows that do not say.", show_default="the model's, else 1", rich_help_panel=_ROWS
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Of rows that do not say.", show_default="the model's, else off", rich_help_panel=_ROWS
        ),
    ] = None,
    generation_config: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="auto: sampling parameters that neither a row nor a flag says are those of the model's "
            "generation_config.json.",
            rich_help_panel=_ROWS,
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew: throw away what output and error file hold.")
    ] = False,
    force_resume: Annotated[
        bool,
        typer.Option("--force-resume", help="Go on with results of another model, other settings or a changed input."),
    ] = False,
    preserve_order: Annotated[
        bool, typer.Option("--preserve-order", help="Put the finished files in the order of the input.")
    ] = False,
    error_threshold: Annotated[
        int | None,
        typer.Option(
            metavar="ROWS",
            help="Rows that may fail: the job stops when there are more; -1: any number, and the exit code is 0.",
            show_default="never stop; exit code 1 if any failed",
            min=-1,
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N", help="Restarts of a failed pipeline in a row, without a row finished between.", min=0
        ),
    ] = 5,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    trace: _Trace = None,
    report: _Report = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            help="Serve metrics for Prometheus while the job runs.",
            show_default="not served",
            rich_help_panel=_WATCHING,
            min=1,
            max=65535,
        ),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to serve them.", rich_help_panel=_WATCHING)
    ] = "127.0.0.1",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")] = False,
    engine: dict[str, Any],
) -> None:
    """Answers every row of a file: OpenAI batch requests, or a table (JSON lines, Parquet, a dataset) with prompts.

    Rows that are wrong or fail cost themselves only. Answers are on disk as rows finish. A job that was stopped or
    killed is taken up by the same command.
    """
    with _errors_told(verbose=verbose):
        if overwrite and force_resume:
            raise ConfigError("--overwrite starts anew and --force-resume goes on: give one of them")
        from pipemax.config import EngineConfig
        from pipemax.executor.stage_handle import start_server
        from pipemax.io.progress import ProgressStyle
        from pipemax.io.sampling_defaults import flag_sampling_defaults, model_sampling_defaults
        from pipemax.job_watch import JobWatch
        from pipemax.report.job_record import RecordWishes
        from pipemax.report.metrics import MetricsAddress
        from pipemax.run_batch import BatchEngine, BatchFiles, ExistingOutput, JobRules, RowOrder, answer_settings
        from pipemax.run_batch import run_batch as run

        existing = ExistingOutput.RESUME
        if overwrite or force_resume:
            existing = ExistingOutput.OVERWRITE if overwrite else ExistingOutput.FORCE_RESUME

        files = BatchFiles.check(
            input_file,
            output_file,
            error_file,
            existing=existing,
            prompt_column=prompt_column,
            result_prefix=result_prefix,
        )
        config = EngineConfig(**engine)
        sampling_defaults = {
            **(model_sampling_defaults(Path(config.model)) if generation_config == "auto" else {}),
            **flag_sampling_defaults(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k),
        }
        watch = JobWatch(stall_seconds=config.stall_seconds)

        def start_engine() -> BatchEngine:
            if config.data_parallel_size > 1:
                from pipemax.replicas import Replicas

                return Replicas(**engine, max_restarts=max_restarts)
            start_server()
            from pipemax.llm import LLM

            llm = LLM(**engine)
            watch.look_after(llm.engine)
            return llm

        counts = run(
            files=files,
            rules=JobRules(
                existing=existing,
                settings=answer_settings(config, sampling_defaults),
                sampling_defaults=sampling_defaults,
                error_threshold=None if error_threshold == -1 else error_threshold,
                row_order=RowOrder.AS_INPUT if preserve_order else RowOrder.AS_FINISHED,
                max_restarts=max_restarts,
            ),
            start_engine=start_engine,
            wishes=RecordWishes(
                trace=trace,
                report=report,
                metrics=None if metrics_port is None else MetricsAddress(metrics_host, metrics_port),
                command=["pipemax", *sys.argv[1:]],
                settings=engine,
            ),
            progress_style=ProgressStyle.NONE if quiet else ProgressStyle.for_stream(sys.stderr),
            show_messages=not quiet,
            stderr=sys.stderr,
            watch=watch,
        )
        if error_threshold is None and counts.failed_rows:
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
