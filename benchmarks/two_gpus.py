"""Llama-3.1-70B on two GPUs without P2P: throughput of several workloads, one after another, with one start.

    NCCL_P2P_DISABLE=1 python benchmarks/two_gpus.py --folder benchmarks/results/h100x2

For each workload a JSON file as `pipemax bench throughput --output-json` writes it, 50 decode steps as a trace for
ui.perfetto.dev, and every step in one line of a `.steps.jsonl.gz` (`expected_steps.py` reads it); prints the summaries.
Weights are random. `--engine '{"kv_offload": "off"}'` changes a setting, `--largest-window` makes the window as large
as the link allows, whatever its copies cost. With one GPU and half of the layers (`--num-gpus 1 --model ...` with
`--engine '{"num_batches": 2}'`) the GPU does what a stage of two does, without waiting for the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from parts_off import LargestWindow

from pipemax.bench import environment, longest_request_tokens, measure_throughput, print_throughput, read_lengths
from pipemax.llm import LLM
from pipemax.observer import EngineGauges, EngineObserver
from pipemax.plan import Phase, StepPlan, StepResult
from pipemax.report.chrome_trace import write_chrome_trace
from pipemax.report.recorder import RunSnapshot, StepRecorder
from pipemax.scheduling.request_state import RequestUpdate

HERE = Path(__file__).parent
TRACED_STEPS = 50
STAGE_FIGURES = ("compute_seconds", "window_wait_seconds", "activation_wait_seconds", "issue_seconds")


def middle_decode_steps(run: RunSnapshot) -> RunSnapshot:
    """The part of a run to look at: decode steps in a row, from the middle of the longest stretch of them."""
    steps = (*run.head, *run.tail)
    stretches: list[list[Any]] = [[]]
    for step in steps:
        if step.phase is Phase.DECODE:
            stretches[-1].append(step)
        elif stretches[-1]:
            stretches.append([])
    longest = max(stretches, key=len)
    first = max(0, len(longest) - TRACED_STEPS) // 2
    chosen = tuple(longest[first : first + TRACED_STEPS])
    return dataclasses.replace(run, head=(), tail=chosen, num_skipped=run.num_skipped + len(steps) - len(chosen))


def observe(llm: LLM, observers: Sequence[EngineObserver]) -> None:
    for observer in observers:
        llm.observe(observer)


class StepLines:
    """EngineObserver that keeps every step in a few numbers."""

    def __init__(self) -> None:
        self._plans: dict[int, dict[str, Any]] = {}
        self._lines: list[str] = []

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        self._plans[plan.step_id] = {
            "step": plan.step_id,
            "batch": plan.batch_id,
            "phase": plan.phase.value,
            "rows": plan.num_rows,
            "tokens": plan.num_tokens,
            "kv_tokens": plan.kv_tokens,
            "refill_blocks": len(plan.refill),
            "home_blocks": len(plan.write_home),
            "window_blocks": gauges.window_blocks,
            "resident_blocks": gauges.resident_blocks,
            "live_blocks": gauges.home_blocks,
        }

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        line = {**self._plans.pop(result.step_id), "finished_seconds": round(result.finished_seconds, 5)}
        for name in STAGE_FIGURES:
            line[f"{name}_by_stage"] = [round(getattr(timing, name), 6) for timing in result.timings]
        self._lines.append(json.dumps(line))

    def write(self, path: Path) -> None:
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self._lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=HERE / "model_configs" / "Llama-3.1-70B")
    parser.add_argument("--workloads", nargs="+", default=["sharegpt_999", "sharegpt_256"])
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--engine", default="{}", help="further engine settings, as JSON")
    parser.add_argument("--num-prompts", type=int, help="the first so many of each workload; default: all")
    parser.add_argument("--largest-window", action="store_true", help="as large as the link allows")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lengths = {
        name: read_lengths(HERE / "workloads" / f"{name}.csv", num_prompts=arguments.num_prompts)
        for name in arguments.workloads
    }
    settings: dict[str, Any] = {
        "model": str(arguments.model),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "pipeline_parallel_size": arguments.num_gpus,
        "max_model_len": max(longest_request_tokens(rows) for rows in lengths.values()),
        "skip_tokenizer_init": True,
        **json.loads(arguments.engine),
    }
    started_seconds = time.monotonic()
    window = patch("pipemax.control_plane.WindowSize", LargestWindow) if arguments.largest_window else nullcontext()
    with window, LLM(**settings) as llm:
        common = {
            "load_seconds": time.monotonic() - started_seconds,
            "start_up": llm.start_up,
            "settings": {name: str(value) for name, value in settings.items()},
            "environment": environment(),
            "command": "python " + " ".join(sys.argv),
        }
        for name, rows in lengths.items():
            recorder, lines = StepRecorder(capacity=llm.capacity), StepLines()
            observers = (recorder, lines)
            report = {**measure_throughput(llm, rows, on_warm=lambda seen=observers: observe(llm, seen)), **common}
            print(name, flush=True)
            print_throughput(report, sys.stdout)
            (arguments.folder / f"{name}.json").write_text(json.dumps({**report, "dataset": f"{name}.csv"}, indent=1))
            lines.write(arguments.folder / f"{name}.steps.jsonl.gz")
            trace = arguments.folder / f"{name}_decode.trace.json"
            write_chrome_trace(trace, middle_decode_steps(recorder.snapshot()), manifest=common)
            if report["requests_finished"] < len(rows):
                raise SystemExit("interrupted")


if __name__ == "__main__":
    main()
