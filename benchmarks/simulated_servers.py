"""Throughput of Llama-3.1-70B on servers of eight GPUs without NVLink: every way to cut it, simulated; no GPU needed.

    python benchmarks/simulated_servers.py --jobs 2 --json benchmarks/results/simulated_servers.json
    python benchmarks/simulated_servers.py --ablation --jobs 2 --json benchmarks/results/simulated_ablation.json

Whole traces, every request to its own output length, which the scheduler does not know. Pipelines run PipeMax's own
scheduler on simulated stages; tensor parallelism and "PP as vLLM" are estimates of vLLM's scheduling on the same cost
model, each with the best of a few settings. docs/simulation.md says what came out and what it is worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from parts_off import LargestWindow, NoBalance, NoTurns

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.continuous_batching import BatchingLimits
from pipemax.cost.hardware import PeerLink, ServerProfile
from pipemax.cost.memory import tensor_parallel_blocks
from pipemax.cost.plain_pipeline import estimate_plain_pipeline
from pipemax.cost.profiles import server_profile
from pipemax.cost.serving import ServingEstimate
from pipemax.cost.tensor_parallel import estimate_tensor_parallel
from pipemax.cost.workload import MeanLengths, RequestLengths, read_lengths
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.planning.report import run_json
from pipemax.planning.simulate import Misestimate, PipelineSettings, plan_pipeline, simulate_pipeline

HERE = Path(__file__).parent
GPUS = ("rtx-4090", "rtx-5090", "l20")
TRACES = ("sharegpt_8k_first_turn", "longbench_en")
NUM_GPUS = 8
BLOCK_SIZE = 16

FULL = PipelineSettings(phase_policy=PhasePolicyName.AUTO, kv_offload=KVOffload.ON)
PIPELINES = {
    "PP": dataclasses.replace(FULL, phase_policy=PhasePolicyName.MIXED, kv_offload=KVOffload.OFF),
    "PP + phases": dataclasses.replace(FULL, phase_policy=PhasePolicyName.DISAGGREGATED, kv_offload=KVOffload.OFF),
    "PP + offloading": dataclasses.replace(FULL, phase_policy=PhasePolicyName.MIXED),
    "PP + offloading + phases": dataclasses.replace(FULL, phase_policy=PhasePolicyName.DISAGGREGATED),
    "all, auto": FULL,
}


@dataclass(frozen=True, slots=True)
class Ablation:
    """One thing off. `estimates_off` makes the machine differ from what the scheduler believes."""

    settings: PipelineSettings
    balanced: bool = True
    in_turns: bool = True
    window_pays: bool = True
    estimates_off: Misestimate | None = None


WRONG = Misestimate(decode_factor=1.4, prefill_factor=0.7, link_factor=0.6, noise=0.05)
ABLATIONS = {
    "everything": Ablation(FULL),
    "no offloading": Ablation(dataclasses.replace(FULL, kv_offload=KVOffload.OFF)),
    "no window: host memory for waiting requests only": Ablation(dataclasses.replace(FULL, num_window_blocks=0)),
    "the largest window": Ablation(FULL, window_pays=False),
    "no balance": Ablation(FULL, balanced=False),
    "no turns at the end": Ablation(FULL, in_turns=False),
    "phases apart always": Ablation(dataclasses.replace(FULL, phase_policy=PhasePolicyName.DISAGGREGATED)),
    "phases mixed always": Ablation(dataclasses.replace(FULL, phase_policy=PhasePolicyName.MIXED)),
    "no asynchronous scheduling": Ablation(dataclasses.replace(FULL, async_scheduling=False)),
    "everything, estimates wrong": Ablation(FULL, estimates_off=WRONG),
    "no correction, estimates wrong": Ablation(dataclasses.replace(FULL, correct_estimates=False), estimates_off=WRONG),
}


def model() -> ModelSpec:
    return ModelSpec.from_pretrained(HERE / "model_configs" / "Llama-3.1-70B")


def workload(trace: str, max_requests: int | None) -> tuple[RequestLengths, ...]:
    return read_lengths(HERE / "traces" / f"{trace}.csv")[:max_requests]


def run_pipeline(spec: ModelSpec, gpu: str, requests: Sequence[RequestLengths], ablation: Ablation) -> dict[str, Any]:
    server = server_profile(gpu, NUM_GPUS)
    unbalanced = nullcontext() if ablation.balanced else patch("pipemax.control_plane.Balancer", NoBalance)
    largest = nullcontext() if ablation.window_pays else patch("pipemax.control_plane.WindowSize", LargestWindow)
    to_the_end = nullcontext() if ablation.in_turns else patch("pipemax.control_plane.Turns", NoTurns)
    with unbalanced, largest, to_the_end:
        run = simulate_pipeline(
            model=spec,
            server=server,
            workload=requests,
            settings=ablation.settings,
            misestimate=ablation.estimates_off,
        )
    return run_json(run)


def run_estimate(
    spec: ModelSpec,
    server: ServerProfile,
    requests: Sequence[RequestLengths],
    num_blocks: int,
    estimate: Callable[..., ServingEstimate],
) -> dict[str, Any]:
    """The best of: two chunk sizes, and as many rows as memory takes or as it takes without starting anyone over."""
    lengths = MeanLengths.of(requests)
    safe_rows = max(1, int(num_blocks * BLOCK_SIZE / (lengths.prompt_tokens + lengths.output_tokens)))
    runs = {}
    for tokens in (2048, 8192):
        for rows in (1024 * NUM_GPUS, safe_rows):
            limits = BatchingLimits(
                num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=rows, max_num_batched_tokens=tokens
            )
            runs[rows, tokens] = estimate(model=spec, server=server, workload=requests, limits=limits)
    (rows, tokens), best = min(runs.items(), key=lambda item: item[1].seconds)
    return {
        "seconds": best.seconds,
        "num_requests": len(requests),
        "output_tokens": best.output_tokens,
        "output_tokens_per_second": best.output_tokens_per_second,
        "mean_decode_rows": best.mean_rows,
        "num_restarted": best.num_preemptions,
        "max_num_seqs": rows,
        "max_num_batched_tokens": tokens,
        "tried": [
            {
                "max_num_seqs": limit,
                "max_num_batched_tokens": chunk,
                "output_tokens_per_second": run.output_tokens_per_second,
                "num_restarted": run.num_preemptions,
            }
            for (limit, chunk), run in runs.items()
        ],
    }


def run_case(kind: str, spec: ModelSpec, gpu: str, trace: str, max_requests: int | None) -> dict[str, Any]:
    requests = workload(trace, max_requests)
    server = server_profile(gpu, NUM_GPUS)
    started, cpu_started = time.perf_counter(), time.process_time()
    if kind in ABLATIONS:
        result = run_pipeline(spec, gpu, requests, ABLATIONS[kind])
    elif kind in PIPELINES:
        result = run_pipeline(spec, gpu, requests, Ablation(PIPELINES[kind]))
    elif kind == "PP as vLLM":
        capacity = plan_pipeline(
            model=spec,
            server=server,
            settings=dataclasses.replace(PIPELINES["PP"], heads=(HeadPlace.LAST,)),
            lengths=MeanLengths.of(requests),
            num_requests=len(requests),
        ).capacity
        result = run_estimate(spec, server, requests, capacity.num_device_blocks, estimate_plain_pipeline)
    else:
        peer_link = PeerLink.HOST_MEMORY if kind == "TP, no P2P" else None
        num_blocks = tensor_parallel_blocks(model=spec, server=server, block_size=BLOCK_SIZE)

        def estimate(**arguments: Any) -> ServingEstimate:
            return estimate_tensor_parallel(**arguments, peer_link=peer_link)

        result = run_estimate(spec, server, requests, num_blocks, estimate)
    spent = {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    return {"kind": kind, "gpu": gpu, "trace": trace, **spent, **result}


def cases(gpus: Sequence[str], traces: Sequence[str], *, ablation: bool) -> list[tuple[str, str, str]]:
    found = []
    for trace in traces:
        for gpu in gpus:
            kinds = list(ABLATIONS) if ablation else ["TP, no P2P", "PP as vLLM", *PIPELINES]
            if not ablation and server_profile(gpu, NUM_GPUS).gpu.peer_link is not PeerLink.HOST_MEMORY:
                kinds.insert(1, "TP, P2P")
            found += [(kind, gpu, trace) for kind in kinds]
    return found


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print("| trace | server | what | out tok/s | x first | rows | busy | waits | steady busy | steady waits | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    first: dict[tuple[str, str], float] = {}
    for result in results:
        speed = result["output_tokens_per_second"]
        base = first.setdefault((result["trace"], result["gpu"]), speed)
        cells = [
            result["trace"],
            f"{NUM_GPUS} x {result['gpu']}",
            result["kind"],
            f"{speed:,.0f}",
            f"{speed / base:.2f}",
        ]
        cells.append(f"{result['mean_decode_rows']:.1f}")
        if "stage_utilisation" in result:
            cells += [f"{max(result['stage_utilisation']):.1%}", f"{max(result['window_wait']):.1%}"]
            steady = result["steady_decode"]
            cells += (
                ["-", "-"]
                if steady is None
                else [f"{max(steady['stage_utilisation']):.1%}", f"{max(steady['window_wait']):.1%}"]
            )
        else:
            cells += ["", "", "", ""]
        print("|", " | ".join([*cells, f"{result['cpu_seconds']:.0f}"]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=GPUS)
    parser.add_argument("--traces", nargs="+", default=TRACES)
    parser.add_argument("--max-requests", type=int, help="the first N of each trace; default: all")
    parser.add_argument("--kinds", nargs="+", help="these rows of the table only")
    parser.add_argument("--ablation", action="store_true", help="each policy off in turn instead")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    spec = model()
    todo = cases(args.gpus, args.traces, ablation=args.ablation)
    todo = [case for case in todo if args.kinds is None or case[0] in args.kinds]
    done: dict[tuple[str, str, str], dict[str, Any]] = {}
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(run_case, kind, spec, gpu, trace, args.max_requests): (kind, gpu, trace)
            for kind, gpu, trace in todo
        }
        for future in as_completed(futures):
            case = futures[future]
            try:
                done[case] = future.result()
            except AssertionError as error:
                print(f"{case}: the scheduler broke: {error!r}", file=sys.stderr, flush=True)
                continue
            seconds = done[case]["wall_seconds"]
            print(
                f"{case}: {done[case]['output_tokens_per_second']:,.0f} tok/s, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            if args.json:
                write_json(args.json, [done[case] for case in todo if case in done])
    print_table([done[case] for case in todo if case in done])


def write_json(path: Path, results: list[dict[str, Any]]) -> None:
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/pipemax"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    report = {
        "command": " ".join(["python", "benchmarks/simulated_servers.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "files_changed_since": [line[3:] for line in changed],
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
