"""Scaling of replicas: output tokens per second of `--data-parallel-size` 1 and 2 on the same machine.

    python benchmarks/replicas.py --model models/SmolLM2-135M-Instruct --json benchmarks/results/replicas_cpu.json
    python benchmarks/replicas.py --model /models/Llama-3.1-8B-Instruct --device cuda --rows 2000 --json ...

Both counts run as `Replicas`, with as many threads (CPU) or GPUs a replica, and the same rows in all: weak figures for
one replica do not flatter two. In turns; the best of the repeats counts for each. Efficiency is the rate of R replicas
over R times that of one. Also checks that both give the same tokens (greedy; on GPUs, where a step's shape changes
sums, it reports how many rows differ).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipemax.replicas import Replicas
from pipemax.request import SamplingParams

TOPICS = ["the sea", "a bicycle", "tax law", "photosynthesis", "chess", "bread", "black holes", "a good night's sleep"]


def prompts(num_rows: int) -> list[str]:
    """Of several lengths."""
    return [f"Note {n}. " + f"What is there to say about {TOPICS[n % 8]}? " * (1 + n % 4) for n in range(num_rows)]


def settings(args: argparse.Namespace, num_replicas: int) -> dict[str, Any]:
    """The memory of each replica is the same whatever their number."""
    common = {
        "device": args.device,
        "load_format": args.load_format,
        "data_parallel_size": num_replicas,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": args.max_model_len,
        "host_memory_gib": args.host_memory_gib * num_replicas,
    }
    if args.device == "cpu":
        common |= {"dtype": "float32", "threads_per_stage": args.threads}
    return common


def run(args: argparse.Namespace, num_replicas: int) -> tuple[list[float], list[list[int]]]:
    """Seconds of each repeat, without loading and after a warm-up; tokens of the last."""
    rows = prompts(args.rows)
    params = [SamplingParams(temperature=0, max_tokens=tokens_of(n, args), ignore_eos=True) for n in range(args.rows)]
    seconds: list[float] = []
    tokens: list[list[int]] = []
    with Replicas(args.model, **settings(args, num_replicas)) as replicas:
        warm = min(args.rows, 4 * num_replicas)
        replicas.generate(rows[:warm], params[:warm])
        for _ in range(args.rounds):
            start_seconds = time.perf_counter()
            outputs = replicas.generate(rows, params)
            seconds.append(time.perf_counter() - start_seconds)
            tokens = [output.outputs[0].token_ids for output in outputs]
    return seconds, tokens


def tokens_of(row: int, args: argparse.Namespace) -> int:
    return int(args.max_tokens // 2 + row % (args.max_tokens // 2 + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a stage, on a CPU")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--host-memory-gib", type=float, default=1.0, help="of each replica")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each count")
    parser.add_argument("--rounds", type=int, default=1, help="runs of all rows in a turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    seconds: dict[int, list[float]] = {count: [] for count in args.replicas}
    tokens: dict[int, list[list[int]]] = {}
    for _ in range(args.repeats):
        for count in args.replicas:
            found, tokens[count] = run(args, count)
            seconds[count] += found
            print(f"{count} replicas: {', '.join(f'{value:.2f} s' for value in found)}", flush=True)
    num_tokens = sum(tokens_of(row, args) for row in range(args.rows))
    rates = {count: num_tokens / min(values) for count, values in seconds.items()}
    first = args.replicas[0]
    differing = {
        count: sum(one != other for one, other in zip(tokens[first], tokens[count], strict=True))
        for count in args.replicas[1:]
    }
    report = {
        "output_tokens": num_tokens,
        "seconds": seconds,
        "output_tokens_per_second": rates,
        "efficiency": {count: rates[count] / rates[first] * first / count for count in args.replicas[1:]},
        "rows_that_differ": differing,
        "settings": {key: str(value) for key, value in vars(args).items() if key != "json"},
        "cores": len(os.sched_getaffinity(0)),
        "machine": device_name(args.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if args.json is not None:
        args.json.write_text(text)
    if args.device == "cpu" and any(differing.values()):
        raise SystemExit("the counts of replicas give different tokens")


def device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
