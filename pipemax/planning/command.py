"""`pipemax plan`: its flags, and the way from flags to a report. No GPU and no weights are needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from pipemax.config import MOST_NUM_SEQS

ErrorsTold = Callable[..., AbstractContextManager[None]]


def add_plan_command(app: typer.Typer, *, errors_told: ErrorsTold) -> None:
    """Adds the command; `errors_told(verbose=...)` turns what it raises into one line and an exit code."""

    @app.command("plan")
    def plan(
        *,
        model: Annotated[Path, typer.Option(metavar="DIR", help="Folder with the model's config.json.")],
        gpu: Annotated[str, typer.Option(metavar="NAME", help="GPU of the server, such as rtx-4090.")],
        num_gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of the server.")],
        workload: Annotated[
            Path,
            typer.Option(
                metavar="CSV", help="A line for each request: prompt_tokens,output_tokens, under that header."
            ),
        ],
        host_memory_gib: Annotated[float, typer.Option(metavar="GIB", help="Main memory of the server.")] = 512.0,
        max_requests: Annotated[
            int, typer.Option(metavar="N", help="Simulate a sample of this size where the workload is larger.")
        ] = 1000,
        max_num_seqs: Annotated[
            int, typer.Option(metavar="ROWS", help="Most rows in one step of one batch.")
        ] = MOST_NUM_SEQS,
        max_num_batched_tokens: Annotated[
            int, typer.Option(metavar="TOKENS", help="Most prompt tokens in one prefill step.")
        ] = 2048,
        json_file: Annotated[
            str | None, typer.Option("--json", metavar="PATH", help="Write the figures there as JSON; - is stdout.")
        ] = None,
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")] = False,
    ) -> None:
        """Says what to expect of a server for a model and a workload, and how to cut the model over its GPUs.

        Compares pipelines with and without offloading, replicas of shorter ones, and tensor parallelism.
        """
        with errors_told(verbose=verbose):
            _plan(
                model_dir=model,
                gpu_name=gpu,
                num_gpus=num_gpus,
                workload_file=workload,
                host_memory_gib=host_memory_gib,
                max_requests=max_requests,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                json_file=json_file,
            )


def _plan(
    *,
    model_dir: Path,
    gpu_name: str,
    num_gpus: int,
    workload_file: Path,
    host_memory_gib: float,
    max_requests: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    json_file: str | None,
) -> None:
    from rich.console import Console

    from pipemax.config import ConfigError
    from pipemax.cost.profiles import server_profile
    from pipemax.cost.workload import read_lengths
    from pipemax.head_place import possible_heads
    from pipemax.model_spec import ModelSpec
    from pipemax.planning.compare import Job, JobSettings, compare_layouts
    from pipemax.planning.layouts import candidate_layouts
    from pipemax.planning.recommend import recommend
    from pipemax.planning.report import print_report, report_json

    for flag, value in (
        ("--max-requests", max_requests),
        ("--max-num-seqs", max_num_seqs),
        ("--max-num-batched-tokens", max_num_batched_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    server = server_profile(gpu_name, num_gpus, host_memory_gib=host_memory_gib)
    job = Job.of(read_lengths(workload_file), max_requests=max_requests)
    model = ModelSpec.from_pretrained(model_dir)
    settings = JobSettings(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, heads=possible_heads("cuda")
    )
    layouts = candidate_layouts(server.gpu, num_gpus)
    if sys.stderr.isatty():
        print(
            f"pipemax: simulating {len(job.sample):,} of {job.total_requests:,} requests on {len(layouts)} layouts of "
            f"{num_gpus} x {server.gpu.name}; a minute or two",
            file=sys.stderr,
            flush=True,
        )
    outcomes = compare_layouts(layouts=layouts, model=model, server=server, job=job, settings=settings)
    recommendation = recommend(outcomes, model=model, model_dir=model_dir, server=server, job=job, settings=settings)
    if json_file is not None:
        text = json.dumps(report_json(outcomes, recommendation, model=model, server=server, job=job), indent=2) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
            return
        Path(json_file).write_text(text, encoding="utf-8")
    print_report(Console(), outcomes, recommendation, model=model, server=server, job=job)
