"""What a head shared by both ends of a pipeline is worth, in simulation (`pipemax/head_place.py`). Prints JSON.

    python benchmarks/shared_head.py --gpus rtx-4090 rtx-5090 l20 > benchmarks/results/shared_head.json
    python benchmarks/shared_head.py --gpus h100-pair --trace benchmarks/workloads/sharegpt_999.csv

What travels for it is in it: of each row that samples, its hidden state and half of its logits, and of each new token
its row of the embedding (`pipemax/cost/roofline.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pipemax.bench import environment
from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.profiles import measured_h100_pair, server_profile
from pipemax.cost.workload import read_lengths
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.planning.simulate import PipelineSettings, simulate_pipeline

HERE = Path(__file__).parent
NUM_GPUS = 8


def simulate(gpu: str, head: HeadPlace, spec: ModelSpec, trace: Path, max_requests: int) -> dict[str, object]:
    server = measured_h100_pair() if gpu == "h100-pair" else server_profile(gpu, NUM_GPUS)
    settings = PipelineSettings(phase_policy=PhasePolicyName.AUTO, kv_offload=KVOffload.ON, heads=(head,))
    requests = read_lengths(trace)[:max_requests]
    started = time.process_time()
    run = simulate_pipeline(model=spec, server=server, workload=requests, settings=settings)
    return {
        "gpu": gpu,
        "num_gpus": server.num_gpus,
        "head": head,
        "trace": trace.name,
        "requests": len(requests),
        "output_tokens_per_second": round(run.output_tokens_per_second, 1),
        "device_blocks": run.capacity.num_device_blocks,
        "stage_layers": run.stage_layers,
        "mean_decode_rows": round(run.mean_decode_rows, 1),
        "stage_utilisation": [round(share, 3) for share in run.stage_utilisation],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model_configs" / "Llama-3.1-70B")
    parser.add_argument("--gpus", nargs="+", required=True)
    parser.add_argument("--trace", type=Path, default=HERE / "traces" / "sharegpt_8k_first_turn.csv")
    parser.add_argument("--max-requests", type=int, default=3000)
    arguments = parser.parse_args()
    spec = ModelSpec.from_pretrained(arguments.model)
    results = [
        simulate(gpu, head, spec, arguments.trace, arguments.max_requests)
        for gpu in arguments.gpus
        for head in HeadPlace
    ]
    print(json.dumps({"environment": environment(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
