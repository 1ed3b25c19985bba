"""What a decode step of one stage costs, by number of rows, fast paths and copies beside it; prints JSON.

    python benchmarks/stage_step.py --model benchmarks/model_configs/Llama-3.1-8B > benchmarks/results/stage_step.json

`step` is the time from the end of one step to the end of the next, with steps issued ahead; `issue` what the thread
needs to issue one for an idle GPU, which must stay below it. All rows have the same number of keys, or with `--ragged`
a tenth of it to nearly twice as many. While a variant is prepared the weights are there twice: of a 70B, `--layers 20`.
Copies beside a step: none; of blocks that go home, a sixteenth of the rows a step as in decode; with `--refill`, also
of so many that come back, scattered.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from one_stage import BLOCK_SIZE, OneStage, keys_of_rows

from pipemax.attention.captured_plan import PLANS_VARIABLE, CapturedPlans, captured_plans
from pipemax.cuda_options import AttentionChoice, CudaOptions
from pipemax.plan import StepPlan
from pipemax.worker import gpu_stage
from pipemax.worker.gemm_library import LIBRARY_VARIABLE, GemmLibrary, gemm_library
from pipemax.worker.stage_worker import StageWorker

STEPS = 26
WARM_UP_STEPS = 6
ISSUE_STEPS = 8


def choose_paths(environment: dict[str, str]) -> None:
    """As a stage process with that environment would."""
    for variable, choice in ((LIBRARY_VARIABLE, gemm_library), (PLANS_VARIABLE, captured_plans)):
        os.environ.pop(variable, None)
        choice.cache_clear()
    os.environ.update(environment)


def step_and_issue_seconds(worker: StageWorker, plans: list[StepPlan]) -> tuple[float, float]:
    issue_seconds, steps = [], []
    for turn, plan in enumerate(plans):
        if turn >= len(plans) - ISSUE_STEPS:
            torch.cuda.synchronize()
        began = time.monotonic()
        steps += worker.run_step(plan)
        issue_seconds.append(time.monotonic() - began)
    finished = np.array([step.report().finished_seconds for step in steps])
    step_seconds = np.diff(finished)[WARM_UP_STEPS:-ISSUE_STEPS]
    return statistics.median(step_seconds), statistics.median(issue_seconds[-ISSUE_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="of the model's; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 128, 256, 512])
    parser.add_argument("--keys", type=int, default=450, help="a row, or their mean")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--refill", type=int, default=0, help="blocks a step")
    parser.add_argument("--variants", nargs="+", help="of the names in this file; default: all")
    arguments = parser.parse_args()
    most_rows = max(arguments.rows)
    stage = OneStage(
        arguments.model,
        num_layers=arguments.layers,
        num_slots=most_rows * (2 + (arguments.keys + STEPS) // BLOCK_SIZE),
        num_window_slots=arguments.refill,
    )
    variants: dict[str, tuple[CudaOptions, dict[str, str]]] = {
        "transformers forward": (CudaOptions(fused_layers=False), {}),
        "own layers": (CudaOptions(cuda_graphs=False), {}),
        "own layers in graphs": (CudaOptions(), {}),
        "decode graphs": (CudaOptions(), {}),
        "decode graphs, default GEMM library": (CudaOptions(), {LIBRARY_VARIABLE: GemmLibrary.DEFAULT}),
        "decode graphs, planned each step": (CudaOptions(), {PLANS_VARIABLE: CapturedPlans.EACH_STEP}),
    }
    copies_beside = {"none": 0, "home": 0, **({"home and refill": arguments.refill} if arguments.refill else {})}
    backend = gpu_stage.open_attention(stage.model, AttentionChoice.FLASHINFER)
    results = []
    for name, (options, environment) in variants.items():
        if arguments.variants is not None and name not in arguments.variants:
            continue
        choose_paths(environment)
        started = time.monotonic()
        decode_graphs = stage.prepare(backend, options, most_rows=most_rows, most_keys=2 * arguments.keys + STEPS)
        prepare_seconds = time.monotonic() - started
        for copies, num_refilled in copies_beside.items():
            worker = stage.worker(
                backend=backend, decode_graphs=decode_graphs if name.startswith("decode graphs") else None
            )
            for num_rows in arguments.rows:
                plans = stage.steps(
                    keys=keys_of_rows(num_rows, mean=arguments.keys, ragged=arguments.ragged),
                    num_steps=STEPS,
                    num_homed=0 if copies == "none" else max(1, num_rows // BLOCK_SIZE),
                    num_refilled=num_refilled,
                )
                step_seconds, issue_seconds = step_and_issue_seconds(worker, plans)
                results.append(
                    {
                        "variant": name,
                        "copies": copies,
                        "rows": num_rows,
                        "keys_per_row": arguments.keys,
                        "issue_milliseconds": round(1e3 * issue_seconds, 3),
                        "step_milliseconds": round(1e3 * step_seconds, 3),
                        "prepare_seconds": round(prepare_seconds, 1),
                    }
                )
    settings = {name: str(value) for name, value in vars(arguments).items()}
    print(json.dumps({"device": torch.cuda.get_device_name(0), "settings": settings, "results": results}))


if __name__ == "__main__":
    main()
