"""Where a decode step's time goes, kernel by kernel of a layer; prints JSON.

    python benchmarks/step_kernels.py --model benchmarks/model_configs/Llama-3.1-70B --layers 40 --rows 1 32 64 96
    python benchmarks/step_kernels.py --model benchmarks/model_configs/Llama-3.1-70B --layers 40 --rows 64 --chunk 60

For each number of rows: the step as `stage_step.py` times it, with blocks going home, and again with some coming back;
then both under torch's profiler: of all layers what each kernel took, in order, and how long the GPU had nothing to do
after it (less than 0 where the next begins before it has ended). The profiler makes steps longer.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from one_stage import BLOCK_SIZE, OneStage, keys_of_rows
from stage_step import STEPS, step_and_issue_seconds

from pipemax.bench import environment
from pipemax.cuda_options import AttentionChoice, CudaOptions
from pipemax.plan import StepPlan
from pipemax.worker import gpu_stage
from pipemax.worker.stage_worker import StageWorker

PROFILED_STEPS = 6
ATTENTION = "BatchPrefillWithPagedKVCache"
LONGEST_NAME = 90


def kernels_of(worker: StageWorker, plans: Sequence[StepPlan]) -> list[dict[str, Any]]:
    """Kernels of one stream under the profiler, in order, as they stand in a Chrome trace."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for plan in plans:
            worker.run_step(plan)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return sorted(kernels, key=lambda event: float(event["ts"]))


def layers_of(kernels: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """From one attention to the next, where the kernels are the usual ones."""
    starts = [place for place, kernel in enumerate(kernels) if ATTENTION in kernel["name"]]
    layers = [list(kernels[start : end + 1]) for start, end in itertools.pairwise(starts)]
    usual = collections.Counter(tuple(kernel["name"] for kernel in layer) for layer in layers).most_common(1)[0][0]
    return [layer for layer in layers if tuple(kernel["name"] for kernel in layer) == usual]


def table_of(layers: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each kernel of a layer but the next layer's attention: medians in microseconds."""
    rows = []
    for place in range(len(layers[0]) - 1):
        ends = [float(layer[place]["ts"]) + float(layer[place]["dur"]) for layer in layers]
        gaps = [float(layer[place + 1]["ts"]) - end for layer, end in zip(layers, ends, strict=True)]
        rows.append(
            {
                "kernel": layers[0][place]["name"][:LONGEST_NAME],
                "microseconds": round(statistics.median(float(layer[place]["dur"]) for layer in layers), 2),
                "then_nothing": round(statistics.median(gaps), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="of the model's; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 64, 96])
    parser.add_argument("--kv-tokens", type=int, default=36000, help="keys of all rows; a row has 1,500 at most")
    parser.add_argument("--chunk", type=int, default=0, help="prompt tokens beside these rows")
    parser.add_argument(
        "--refill", type=int, default=300, help="blocks that come back a step, beside the second timing"
    )
    arguments = parser.parse_args()
    most_tokens = max(arguments.rows) + arguments.chunk
    means = {num_rows: min(1500, arguments.kv_tokens // num_rows) for num_rows in arguments.rows}
    stage = OneStage(
        arguments.model,
        num_layers=arguments.layers,
        num_slots=arguments.chunk
        + max((num_rows + 1) * (2 + (mean + STEPS) // BLOCK_SIZE) for num_rows, mean in means.items()),
        num_window_slots=arguments.refill,
    )
    backend = gpu_stage.open_attention(stage.model, AttentionChoice.FLASHINFER)
    graphs = stage.prepare(
        backend, CudaOptions(), most_rows=max(256, most_tokens), most_keys=2 * max(means.values()) + STEPS
    )
    worker = stage.worker(backend=backend, decode_graphs=graphs)
    results = []
    for num_rows, mean in means.items():
        keys = keys_of_rows(num_rows, mean=mean, ragged=True)
        homed = max(1, num_rows // BLOCK_SIZE)
        common = {"keys": keys, "chunk": arguments.chunk}
        quiet, beside = (
            step_and_issue_seconds(
                worker, stage.steps(num_steps=STEPS, num_homed=homed, num_refilled=num_refilled, **common)
            )
            for num_refilled in (0, arguments.refill)
        )
        tables = [
            table_of(
                layers_of(
                    kernels_of(
                        worker,
                        stage.steps(num_steps=PROFILED_STEPS, num_homed=homed, num_refilled=num_refilled, **common),
                    )
                )
            )
            for num_refilled in (0, arguments.refill)
        ]
        results.append(
            {
                "rows": num_rows,
                "kv_tokens": int(keys.sum()),
                "step_milliseconds": round(1e3 * quiet[0], 3),
                "issue_milliseconds": round(1e3 * quiet[1], 3),
                "step_beside_refill_milliseconds": round(1e3 * beside[0], 3),
                "kernels": tables[0],
                "kernels_beside_refill": tables[1],
            }
        )
    settings = {name: str(value) for name, value in vars(arguments).items()}
    print(json.dumps({"settings": settings, "environment": environment(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
