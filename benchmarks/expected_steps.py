"""What steps took beside what the cost model expects of them, by phase and size.

    python benchmarks/expected_steps.py --steps benchmarks/results/h200x2_70b_sharegpt_999.steps.jsonl.gz --gpu h200

The steps are those that `two_gpus.py` wrote, of two equal stages; nothing is corrected online here. Medians of each
group of steps, sizes in half octaves.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
from pathlib import Path
from typing import Any

from pipemax.cost.load import StepLoad, even_stages
from pipemax.cost.profiles import gpu_profile
from pipemax.cost.table import best_cost_model
from pipemax.model_spec import ModelSpec

HERE = Path(__file__).parent


def load_of(step: dict[str, Any]) -> StepLoad:
    """The sums that a step's duration depends on; prompts of such steps have some hundred tokens before them."""
    rows, tokens, kv_tokens = step["rows"], step["tokens"], step["kv_tokens"]
    if step["phase"] == "decode":
        return StepLoad.of_decode(num_rows=rows, kv_tokens=kv_tokens)
    return StepLoad(rows, tokens, kv_tokens, kv_tokens + 100 * tokens, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=HERE / "model_configs" / "Llama-3.1-70B")
    parser.add_argument("--gpu", required=True, help="a name of pipemax plan --gpu")
    arguments = parser.parse_args()
    model = ModelSpec.from_pretrained(arguments.model)
    cost = best_cost_model(model=model, gpu=gpu_profile(arguments.gpu), dtype_bytes=2, kv_dtype_bytes=2)
    stages = even_stages(model.num_layers, 2)
    groups: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    with gzip.open(arguments.steps, "rt", encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    for step in steps:
        if not step["rows"]:
            continue
        load = load_of(step)
        expected = [1e3 * cost.step_seconds(load, stage) for stage in stages]
        measured = [1e3 * seconds for seconds in step["compute_seconds_by_stage"]]
        size = round(2 * math.log2(step["tokens"]))
        figures = (step["tokens"], step["kv_tokens"], step["refill_blocks"])
        groups.setdefault((step["phase"], size), []).append((*figures, *measured, *expected))
    print("phase   steps tokens     KV refill | stage 0 ms expected ratio | stage 1 ms expected ratio")
    for (phase, _), group in sorted(groups.items()):
        tokens, kv_tokens, refill, first, second, first_expected, second_expected = (
            statistics.median(column) for column in zip(*group, strict=True)
        )
        print(
            f"{phase:7s} {len(group):5d} {tokens:6.0f} {kv_tokens:6.0f} {refill:6.0f} "
            f"| {first:10.1f} {first_expected:8.1f} {first / first_expected:5.2f} "
            f"| {second:10.1f} {second_expected:8.1f} {second / second_expected:5.2f}"
        )


if __name__ == "__main__":
    main()
