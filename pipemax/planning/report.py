"""What `pipemax plan` shows: a table and a few sentences for people, one JSON object for programs. Formatting only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipemax.cost.hardware import GIB, ServerProfile
from pipemax.model_spec import ModelSpec
from pipemax.planning.compare import Job, LayoutRefusal, LayoutResult
from pipemax.planning.layouts import TensorLayout
from pipemax.planning.recommend import Recommendation
from pipemax.planning.simulate import SimulatedRun

_LIMITS_SHOWN = 3
_SMALLEST_GAIN = 0.001


def print_report(
    console: Console,
    outcomes: Sequence[LayoutResult | LayoutRefusal],
    recommendation: Recommendation,
    *,
    model: ModelSpec,
    server: ServerProfile,
    job: Job,
) -> None:
    """For a terminal."""
    sampled = f", from a sample of {len(job.sample):,}" if job.is_sampled else ""
    console.print(
        f"{model.name} on {server.num_gpus} x {server.gpu.name}: {job.total_requests:,} requests{sampled}",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("layout", no_wrap=True)
    for name in ("out tok/s", "hours", "rows", "busy", "wait", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    results = [outcome for outcome in outcomes if isinstance(outcome, LayoutResult)]
    for result in sorted(results, key=lambda result: -result.output_tokens_per_second):
        style = "bold" if result is recommendation.best else None
        table.add_row(*_cells(result), style=style)
    console.print(table)
    console.print(
        "rows: of a decode step; busy: the busiest stage; wait: of the time, for copies; GiB: of host memory, for KV",
        style="dim",
        highlight=False,
    )
    if any(result.is_rough for result in results):
        console.print(
            "~ the sample hardly fills the batches: these rest on a sum more than on a run; raise --max-requests",
            highlight=False,
        )
    for outcome in outcomes:
        if isinstance(outcome, LayoutRefusal):
            console.print(f"{outcome.layout}: {outcome.reason.split(';')[0]}", highlight=False)
    console.print(f"\nUse {recommendation.best.layout}.", style="bold", highlight=False)
    for reason in recommendation.reasons:
        console.print(f"  {reason}", highlight=False)
    if recommendation.gains:
        console.print("What limits it, as the gain from a tenth more:", highlight=False)
        for gain in recommendation.gains[:_LIMITS_SHOWN]:
            if gain.share >= _SMALLEST_GAIN:
                console.print(f"  {gain.share:+.1%}  {gain.resource}", highlight=False)
    if recommendation.command is not None:
        console.print(f"  {recommendation.command} -i ... -o ...", highlight=False, soft_wrap=True)
    elif isinstance(recommendation.best.layout, TensorLayout):
        console.print("  Tensor parallelism needs another engine, such as vLLM.", highlight=False)
    console.print(
        "\nPipelines are simulated with PipeMax's own scheduler, tensor parallelism is estimated as vLLM runs it; "
        f"figures of the {server.gpu.name}: {server.gpu.source}.",
        style="dim",
        highlight=False,
    )


def _cells(result: LayoutResult) -> list[str]:
    run = result.run
    return [
        str(result.layout),
        f"{'~' if result.is_rough else ''}{result.output_tokens_per_second:,.0f}",
        f"{result.job_seconds / 3600:.2f}",
        f"{result.mean_rows:.0f}",
        "" if run is None else f"{max(run.stage_utilisation):.0%}",
        "" if run is None else f"{max(run.window_wait):.1%}",
        "" if run is None or not result.home_bytes else f"{result.home_bytes / GIB:.0f}",
    ]


def report_json(
    outcomes: Sequence[LayoutResult | LayoutRefusal],
    recommendation: Recommendation,
    *,
    model: ModelSpec,
    server: ServerProfile,
    job: Job,
) -> dict[str, Any]:
    """Plain values. Seconds, bytes and shares, unrounded; `run` is of one replica and its share of the sample."""
    return {
        "model": model.name,
        "gpu": server.gpu.name,
        "num_gpus": server.num_gpus,
        "host_memory_gib": server.host_memory_gib,
        "num_requests": job.total_requests,
        "num_sampled_requests": len(job.sample),
        "layouts": [outcome_json(outcome) for outcome in outcomes],
        "recommendation": {
            "layout": str(recommendation.best.layout),
            "reasons": list(recommendation.reasons),
            "limits": [
                {"resource": gain.resource.name.lower(), "gain_from_a_tenth_more": gain.share}
                for gain in recommendation.gains
            ],
            "command": recommendation.command,
        },
    }


def outcome_json(outcome: LayoutResult | LayoutRefusal) -> dict[str, Any]:
    if isinstance(outcome, LayoutRefusal):
        return {"layout": str(outcome.layout), "does_not_fit": outcome.reason}
    return {
        "layout": str(outcome.layout),
        "job_seconds": outcome.job_seconds,
        "output_tokens_per_second": outcome.output_tokens_per_second,
        "requests_per_second": outcome.requests_per_second,
        "mean_rows": outcome.mean_rows,
        "home_bytes": outcome.home_bytes,
        "is_rough": outcome.is_rough,
        "run": None if outcome.run is None else run_json(outcome.run),
    }


def run_json(run: SimulatedRun) -> dict[str, Any]:
    steady = run.steady
    return {
        "seconds": run.seconds,
        "num_requests": run.num_requests,
        "output_tokens": run.output_tokens,
        "output_tokens_per_second": run.output_tokens_per_second,
        "num_steps": run.num_steps,
        "stage_layers": list(run.stage_layers),
        "num_device_blocks": run.capacity.num_device_blocks,
        "num_window_blocks": run.capacity.num_window_blocks,
        "num_host_blocks": run.capacity.num_host_blocks,
        "stage_utilisation": list(run.stage_utilisation),
        "window_wait": list(run.window_wait),
        "activation_wait": list(run.activation_wait),
        "link_up": list(run.link_up),
        "link_down": list(run.link_down),
        "refill_bytes": run.refill_bytes,
        "num_left": run.num_left,
        "num_restarted": run.num_restarted,
        "phase_steps": {phase.value: count for phase, count in run.phase_steps.items()},
        "phase_seconds": {phase.value: seconds for phase, seconds in run.phase_seconds.items()},
        "mean_decode_rows": run.mean_decode_rows,
        "max_home_bytes": run.max_home_bytes,
        "steady_decode": None
        if steady is None
        else {
            "num_steps": steady.num_steps,
            "seconds": steady.seconds,
            "mean_rows": steady.mean_rows,
            "output_tokens_per_second": steady.output_tokens_per_second,
            "stage_utilisation": list(steady.stage_utilisation),
            "window_wait": list(steady.window_wait),
            "activation_wait": list(steady.activation_wait),
        },
    }
