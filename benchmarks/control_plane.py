"""Python time that the control plane takes for a decode step: plan, result, nothing else. No GPU, no model weights.

    python benchmarks/control_plane.py --rows 512 --json benchmarks/results/control_plane.json

Batches of so many rows in steady decode, on the plan of Llama-3.1-70B on two H100: requests end, others take their
places from READY, blocks fill and go home, and with `--travelling` some blocks of each row come and go. Results come
at once; what a stage does is not in here. Times are of one thread's CPU, so that other processes do not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.load import even_stages
from pipemax.cost.profiles import server_profile
from pipemax.cost.table import best_cost_model
from pipemax.model_spec import ModelSpec
from pipemax.plan import Capacity, Phase, StepResult
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState
from pipemax.scheduling.scheduler import Scheduler

HERE = Path(__file__).parent
NUM_STAGES = NUM_BATCHES = 2
BLOCK_SIZE = 16
PROMPT_TOKENS = 220
MEAN_OUTPUT_TOKENS = 480
END_TOKEN, TOKEN = 1, 2


@dataclass
class Spent:
    """CPU milliseconds of each decode step, by part."""

    schedule: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    refill: list[int] = field(default_factory=list)


def make_scheduler(rows: int, *, travelling: int) -> Scheduler:
    """Room for the rows of both batches less `travelling` blocks a row; those blocks fit the window."""
    spec = ModelSpec.from_pretrained(HERE / "model_configs" / "Llama-3.1-70B")
    server = server_profile("h100-sxm", NUM_STAGES)
    stages = even_stages(spec.num_layers, NUM_STAGES)
    blocks_a_row = (PROMPT_TOKENS + MEAN_OUTPUT_TOKENS // 2) // BLOCK_SIZE + 2
    window = travelling * rows
    capacity = Capacity(
        num_stages=NUM_STAGES,
        block_size=BLOCK_SIZE,
        num_device_blocks=NUM_BATCHES * rows * (blocks_a_row - travelling) + 2 * window,
        num_window_blocks=window,
        num_host_blocks=NUM_BATCHES * rows * 4 * blocks_a_row,
        block_bytes=1,
    )
    forecast = Forecast(
        cost=best_cost_model(model=spec, gpu=server.gpu, dtype_bytes=2, kv_dtype_bytes=2),
        stages=stages,
        link=server.host_link,
        # The link brings what the window holds within a decode step, whatever the model.
        block_bytes=max(1, int(server.host_link.up_bytes_per_second * 0.02 / max(1, 2 * window))),
        learn=True,
    )
    return build_scheduler(
        capacity=capacity,
        num_batches=NUM_BATCHES,
        max_num_seqs=rows,
        max_num_batched_tokens=8192,
        async_scheduling=True,
        phase_policy=PhasePolicyName.DISAGGREGATED,
        kv_offload=KVOffload.ON if travelling else KVOffload.OFF,
        forecast=forecast,
    )


def run(rows: int, *, travelling: int, num_steps: int) -> Spent:
    scheduler = make_scheduler(rows, travelling=travelling)
    rng = np.random.default_rng(0)
    num_requests = 6 * NUM_BATCHES * rows
    lengths = rng.integers(1, 2 * MEAN_OUTPUT_TOKENS, num_requests)
    sampling = SamplingParams(max_tokens=2 * MEAN_OUTPUT_TOKENS)
    for index in range(num_requests):
        scheduler.add_request(
            RequestState(
                request_id=index,
                prompt_token_ids=np.broadcast_to(np.int32(0), (PROMPT_TOKENS,)),
                sampling=sampling,
                seed=0,
                stop_token_ids=frozenset({END_TOKEN}),
                max_outputs=2 * MEAN_OUTPUT_TOKENS,
            )
        )
    spent, given = Spent(), np.zeros(num_requests, dtype=np.int64)
    plans: deque = deque()
    while len(spent.rows) < num_steps and scheduler.population.requests:
        while True:
            began = time.thread_time()
            plan = scheduler.schedule()
            seconds = time.thread_time() - began
            if plan is None:
                break
            plans.append(plan)
            if plan.phase is Phase.DECODE and plan.num_rows > 0.9 * rows:
                spent.schedule.append(1e3 * seconds)
                spent.rows.append(plan.num_rows)
                spent.refill.append(len(plan.refill))
        plan = plans.popleft()
        request_ids = plan.request_ids[plan.samples]
        given[request_ids] += 1
        tokens = np.where(given[request_ids] >= lengths[request_ids], END_TOKEN, TOKEN).astype(np.int32)
        result = StepResult(plan.step_id, plan.batch_id, request_ids, tokens, None, {}, 0.0, ())
        began = time.thread_time()
        scheduler.update(result)
        seconds = time.thread_time() - began
        if plan.phase is Phase.DECODE and plan.num_rows > 0.9 * rows:
            spent.update.append(1e3 * seconds)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps looked at")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for travelling in (0, 1, 4):
        spent = run(args.rows, travelling=travelling, num_steps=args.steps)
        assert spent.rows, "no decode step was full"
        schedule, update = np.array(spent.schedule), np.array(spent.update)
        result = {
            "travelling_blocks_a_row": travelling,
            "steps": len(spent.rows),
            "mean_rows": float(np.mean(spent.rows)),
            "mean_refill_blocks": float(np.mean(spent.refill)),
            "schedule_ms": {"median": float(np.median(schedule)), "p99": float(np.percentile(schedule, 99))},
            "update_ms": {"median": float(np.median(update)), "p99": float(np.percentile(update, 99))},
        }
        results.append(result)
        print(json.dumps(result))
    if args.json:
        git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        report = {
            "command": " ".join(["python", "benchmarks/control_plane.py", *sys.argv[1:]]),
            "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
