"""Llama-3.1-70B on two GPUs without P2P: throughput of several workloads, one after another, with one start.

    NCCL_P2P_DISABLE=1 python benchmarks/two_gpus.py --folder benchmarks/results/h100x2

For each workload a JSON file as `pipemax bench throughput --output-json` writes it, and 50 decode steps as a trace
for ui.perfetto.dev; prints the summaries. Weights are random. `--engine '{"kv_offload": "off"}'` changes a setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from pipemax.bench import environment, longest_request_tokens, measure_throughput, print_throughput, read_lengths
from pipemax.llm import LLM
from pipemax.plan import Phase
from pipemax.report.chrome_trace import write_chrome_trace
from pipemax.report.recorder import RunSnapshot, StepRecorder

HERE = Path(__file__).parent
TRACED_STEPS = 50


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=HERE / "model_configs" / "Llama-3.1-70B")
    parser.add_argument("--workloads", nargs="+", default=["sharegpt_999", "sharegpt_256"])
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--engine", default="{}", help="further engine settings, as JSON")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lengths = {name: read_lengths(HERE / "workloads" / f"{name}.csv", num_prompts=None) for name in arguments.workloads}
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
    with LLM(**settings) as llm:
        common = {
            "load_seconds": time.monotonic() - started_seconds,
            "start_up": llm.start_up,
            "settings": {name: str(value) for name, value in settings.items()},
            "environment": environment(),
            "command": "python " + " ".join(sys.argv),
        }
        for name, rows in lengths.items():
            recorder = StepRecorder(capacity=llm.capacity)
            report = {**measure_throughput(llm, rows, on_warm=lambda seen=recorder: llm.observe(seen)), **common}
            print(name, flush=True)
            print_throughput(report, sys.stdout)
            (arguments.folder / f"{name}.json").write_text(json.dumps({**report, "dataset": f"{name}.csv"}, indent=1))
            trace = arguments.folder / f"{name}_decode.trace.json"
            write_chrome_trace(trace, middle_decode_steps(recorder.snapshot()), manifest=common)
            if report["requests_finished"] < len(rows):
                raise SystemExit("interrupted")


if __name__ == "__main__":
    main()
