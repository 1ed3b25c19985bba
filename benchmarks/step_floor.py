"""What decode steps of a pipeline of two stages took, beside their floor: GEMMs by themselves, and reading KV.

    python benchmarks/step_floor.py --steps benchmarks/results/h200x2_70b_sharegpt_256_6aea9b6.steps.jsonl.gz \\
        --gemms benchmarks/results/h200_gemm_floor_same_gpu_as_step_kernels.json --kv-rate 4.0 --head last

The steps are those that `two_gpus.py` wrote, the GEMMs those of `gemm_floor.py`: of the sizes that hold a step's rows
the quickest, and the head on the last stage or half of it on either (`--head`). Waits for the window are not in a
step's time; what copies beside it cost is, and on a first stage that samples the sampling.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from pathlib import Path
from typing import Any

from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec

HERE = Path(__file__).parent
RANGES = ((1, 32), (33, 64), (65, 96), (97, 128), (1, 128))


def floor_seconds(
    step: dict[str, Any], gemms: dict[int, dict[str, float]], *, layers: int, head_share: float, kv_token_seconds: float
) -> float:
    held = [size for size in gemms if size >= step["rows"]]
    layer = min(gemms[size]["layer_milliseconds"] for size in held)
    head = head_share * min(gemms[size]["head_milliseconds"] for size in held)
    return (layers * layer + head) / 1e3 + layers * step["kv_tokens"] * kv_token_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--gemms", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=HERE / "model_configs" / "Llama-3.1-70B")
    parser.add_argument("--head", type=HeadPlace, choices=list(HeadPlace), required=True)
    parser.add_argument("--kv-rate", type=float, required=True, help="TB/s at which KV could be read")
    arguments = parser.parse_args()
    model = ModelSpec.from_pretrained(arguments.model)
    gemms = {int(size): row for size, row in json.loads(arguments.gemms.read_text())["by_tokens"].items()}
    kv_token_bytes = model.kv_geometry(block_size=1, dtype_bytes=2).layer_block_bytes(0)
    with gzip.open(arguments.steps, "rt", encoding="utf-8") as file:
        steps = [step for step in map(json.loads, file) if step["phase"] == "decode" and step["rows"]]
    print("rows of a step | stage | steps | all of them / their floors | median")
    for first, last in RANGES:
        chosen = [step for step in steps if first <= step["rows"] <= last]
        for stage in range(2 if chosen else 0):
            taken = [step["compute_seconds_by_stage"][stage] for step in chosen]
            floors = [
                floor_seconds(
                    step,
                    gemms,
                    layers=model.num_layers // 2,
                    head_share=0.5 if arguments.head is HeadPlace.ENDS else float(stage == 1),
                    kv_token_seconds=kv_token_bytes / (arguments.kv_rate * 1e12),
                )
                for step in chosen
            ]
            median = statistics.median(one / floor for one, floor in zip(taken, floors, strict=True))
            rows = f"{first} to {last}"
            print(f"{rows:14s} | {stage:5d} | {len(chosen):5d} | {sum(taken) / sum(floors):26.3f} | {median:6.3f}")


if __name__ == "__main__":
    main()
