"""`recommend`: which layout to use and why, what limits it, and what would fit where nothing does.

The best throughput wins, or of those within a hundredth of it the one that asks for less (this engine, no offloading,
fewer replicas).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipemax.config import MOST_NUM_SEQS, ConfigError, KVOffload, PhasePolicyName
from pipemax.cost.hardware import GIB, ServerProfile
from pipemax.cost.profiles import gpu_names, server_profile
from pipemax.cost.workload import MeanLengths
from pipemax.model_spec import ModelSpec
from pipemax.planning.compare import Job, JobSettings, LayoutRefusal, LayoutResult
from pipemax.planning.layouts import Layout, PipelineLayout, TensorLayout, replica_server
from pipemax.planning.limits import Gain, limits
from pipemax.planning.simulate import check_lengths, plan_pipeline

_AS_GOOD = 0.99
_MOST_GPUS = 16


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`reasons` are sentences; `gains` say what limits the layout, empty where it is no pipeline; `command` starts it
    here, None where another engine has to."""

    best: LayoutResult
    reasons: tuple[str, ...]
    gains: tuple[Gain, ...]
    command: str | None


def recommend(
    outcomes: Sequence[LayoutResult | LayoutRefusal],
    *,
    model: ModelSpec,
    model_dir: Path,
    server: ServerProfile,
    job: Job,
    settings: JobSettings,
) -> Recommendation:
    """`model_dir` is what the command should name. Raises ConfigError that says what would fit when no layout does."""
    results = [outcome for outcome in outcomes if isinstance(outcome, LayoutResult)]
    if not results:
        reasons = [outcome.reason for outcome in outcomes if isinstance(outcome, LayoutRefusal)]
        raise ConfigError(_what_would_fit(reasons[0], model=model, server=server, job=job, settings=settings))
    fastest = max(result.output_tokens_per_second for result in results)
    as_good = [result for result in results if result.output_tokens_per_second >= _AS_GOOD * fastest]
    best = min(as_good, key=_demands)
    return Recommendation(
        best=best,
        reasons=tuple(_reasons(best, results)),
        gains=_limits(best, model=model, server=server, job=job, settings=settings),
        command=_command(best, model_dir=model_dir, settings=settings),
    )


def _demands(result: LayoutResult) -> tuple[bool, bool, int, float]:
    """What a layout asks for; less is better among equals. This engine runs pipelines only."""
    layout = result.layout
    other_engine = isinstance(layout, TensorLayout)
    offload = isinstance(layout, PipelineLayout) and layout.kv_offload is KVOffload.ON
    return other_engine, offload, layout.num_replicas, -result.output_tokens_per_second


def _reasons(best: LayoutResult, results: Sequence[LayoutResult]) -> list[str]:
    """The best against the best of each other kind."""
    layout = best.layout
    reasons = []

    def against(what: str, is_rival: Callable[[Layout], bool]) -> None:
        rivals = [result for result in results if is_rival(result.layout)]
        if rivals:
            rival = max(rivals, key=lambda result: result.output_tokens_per_second)
            times = best.output_tokens_per_second / rival.output_tokens_per_second
            rows = f"{best.mean_rows:.0f} rows a step, {rival.mean_rows:.0f} there"
            reasons.append(f"{times:.2f} x {what} ({rival.layout}): {rows}")

    if isinstance(layout, PipelineLayout):
        offload, policy, size = layout.kv_offload, layout.phase_policy, layout.num_stages
        against(
            f"the best with offloading {'off' if offload is KVOffload.ON else 'on'}",
            lambda other: isinstance(other, PipelineLayout) and other.kv_offload is not offload,
        )
        against(
            "the best other phase policy",
            lambda other: (
                isinstance(other, PipelineLayout)
                and (other.num_stages, other.kv_offload) == (size, offload)
                and other.phase_policy is not policy
            ),
        )
        against(
            "the best other number of stages",
            lambda other: isinstance(other, PipelineLayout) and other.num_stages != size,
        )
        against("the best tensor parallelism", lambda other: isinstance(other, TensorLayout))
    else:
        against("the best other tensor parallelism", lambda other: isinstance(other, TensorLayout) and other != layout)
        against("the best pipeline", lambda other: isinstance(other, PipelineLayout))
    return reasons


def _limits(
    best: LayoutResult, *, model: ModelSpec, server: ServerProfile, job: Job, settings: JobSettings
) -> tuple[Gain, ...]:
    layout = best.layout
    if not isinstance(layout, PipelineLayout):
        return ()
    return limits(
        model=model,
        server=replica_server(server, layout.num_replicas),
        settings=settings.of_pipeline(kv_offload=layout.kv_offload, phase_policy=layout.phase_policy),
        lengths=MeanLengths.of(job.sample),
        num_requests=job.total_requests // layout.num_replicas,
    )


def _command(best: LayoutResult, *, model_dir: Path, settings: JobSettings) -> str | None:
    layout = best.layout
    if not isinstance(layout, PipelineLayout):
        return None
    flags = [
        f"--model {shlex.quote(str(model_dir))}",
        f"--pipeline-parallel-size {layout.num_stages}",
        *([f"--data-parallel-size {layout.num_replicas}"] if layout.num_replicas > 1 else []),
        f"--phase-policy {layout.phase_policy}",
        f"--kv-offload {layout.kv_offload}",
        # A pipeline that is not told chooses as many as its memory has KV for.
        *([f"--max-num-seqs {settings.max_num_seqs}"] if settings.max_num_seqs != MOST_NUM_SEQS else []),
        f"--max-num-batched-tokens {settings.max_num_batched_tokens}",
    ]
    if layout.kv_offload is KVOffload.ON:
        flags.append(f"--host-memory-gib {max(layout.num_replicas, -(-best.home_bytes // GIB))}")
    return "pipemax run-batch " + " ".join(flags)


def _what_would_fit(reason: str, *, model: ModelSpec, server: ServerProfile, job: Job, settings: JobSettings) -> str:
    fitting = []
    host_gib = server.host_memory_gib
    more = (n for n in range(server.num_gpus + 1, min(_MOST_GPUS, model.num_layers) + 1))
    enough = next((n for n in more if _fits(server.gpu.name, n, host_gib, model, job, settings)), None)
    if enough is not None:
        fitting.append(f"{enough} x {server.gpu.name}")
    fitting += [
        f"{server.num_gpus} x {name}"
        for name in gpu_names()
        if name != server.gpu.name and _fits(name, server.num_gpus, host_gib, model, job, settings)
    ]
    if not fitting:
        return reason
    return f"{reason.split(';')[0]}; what would fit: {', '.join(fitting)}"


def _fits(gpu_name: str, num_gpus: int, host_gib: float, model: ModelSpec, job: Job, settings: JobSettings) -> bool:
    server = server_profile(gpu_name, num_gpus, host_memory_gib=host_gib)
    pipeline = settings.of_pipeline(kv_offload=KVOffload.ON, phase_policy=PhasePolicyName.AUTO)
    try:
        plan = plan_pipeline(
            model=model,
            server=server,
            settings=pipeline,
            lengths=MeanLengths.of(job.sample),
            num_requests=len(job.sample),
        )
        check_lengths(job.sample, capacity=plan.capacity)
    except ConfigError:
        return False
    return True
