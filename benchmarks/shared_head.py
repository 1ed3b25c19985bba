"""What it would be worth to share the model's head among stages, in simulation; nothing of it is built. Prints JSON.

    python benchmarks/shared_head.py --gpus rtx-4090 rtx-5090 l20 --max-requests 3000 > shared_head.json
    python benchmarks/shared_head.py --gpus h100-pair --trace benchmarks/workloads/sharegpt_999.csv

Two matrices of the vocabulary's size are on the ends of a pipeline, and the last stage multiplies by one of them. Ways:

    as built             the embedding on the first stage, the head on the last
    embedding in host    the embedding in host memory, where a kernel reads the few rows that a step needs
    two halves           that, and half of the head on either end, which means that the first stage samples
    all                  that, and an equal part of the head on every stage

What activations and logits would have to travel for it is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from pipemax.bench import environment
from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.profiles import measured_h100_pair, server_profile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.cost.weights import LayerWeights
from pipemax.cost.workload import read_lengths
from pipemax.model_spec import ModelSpec
from pipemax.planning.simulate import PipelineSettings, simulate_pipeline

HERE = Path(__file__).parent
NUM_GPUS = 8
SETTINGS = PipelineSettings(phase_policy=PhasePolicyName.AUTO, kv_offload=KVOffload.ON)


@dataclasses.dataclass(frozen=True, slots=True)
class Ends:
    """Of the vocabulary's matrices: how many a stage holds, and what part of the head it computes."""

    held: Callable[[StageShape, int], float]
    computed: Callable[[StageShape, int], float]


WAYS = {
    "as built": Ends(lambda stage, _: stage.has_embedding + stage.has_head, lambda stage, _: stage.has_head),
    "embedding in host": Ends(lambda stage, _: stage.has_head, lambda stage, _: stage.has_head),
    "two halves": Ends(
        lambda stage, _: (stage.has_embedding + stage.has_head) / 2,
        lambda stage, _: (stage.has_embedding + stage.has_head) / 2,
    ),
    "all": Ends(lambda _, num_stages: 1 / num_stages, lambda _, num_stages: 1 / num_stages),
}


def simulate(gpu: str, way: Ends, spec: ModelSpec, trace: Path, max_requests: int) -> dict[str, object]:
    server = measured_h100_pair() if gpu == "h100-pair" else server_profile(gpu, NUM_GPUS)
    of_whole_head = RooflineCostModel.step_seconds

    def step_seconds(model: RooflineCostModel, load: StepLoad, stage: StageShape) -> float:
        without, with_head = (of_whole_head(model, load, dataclasses.replace(stage, has_head=h)) for h in (False, True))
        return without + way.computed(stage, server.num_gpus) * (with_head - without)

    def stage_parameters(weights: LayerWeights, stage: StageShape, *, tied_ends: bool) -> int:
        assert not tied_ends
        return int(stage.num_layers * weights.layer + way.held(stage, server.num_gpus) * weights.embedding)

    started = time.process_time()
    with (
        patch.object(RooflineCostModel, "step_seconds", step_seconds),
        patch.object(LayerWeights, "stage_parameters", stage_parameters),
    ):
        requests = read_lengths(trace)[:max_requests]
        run = simulate_pipeline(model=spec, server=server, workload=requests, settings=SETTINGS)
    return {
        "gpu": gpu,
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
        {"way": name, **simulate(gpu, way, spec, arguments.trace, arguments.max_requests)}
        for gpu in arguments.gpus
        for name, way in WAYS.items()
    ]
    print(json.dumps({"environment": environment(), "trace": arguments.trace.name, "results": results}, indent=1))


if __name__ == "__main__":
    main()
