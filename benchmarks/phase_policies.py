"""Phases apart, mixed, or as `auto` chooses: simulated on servers unlike one another; no GPU needed.

    python benchmarks/phase_policies.py

Prints output tokens per second of each policy, with KV offloading and without. docs/simulation.md says what came out.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.profiles import server_profile
from pipemax.cost.workload import read_lengths
from pipemax.model_spec import ModelSpec
from pipemax.planning.simulate import PipelineSettings, simulate_pipeline

HERE = Path(__file__).parent
CASES = (
    ("Llama-3.1-70B", "h100-sxm", 4, "sharegpt_8k_first_turn", 1500),
    ("Llama-3.1-70B", "h100-pcie", 4, "longbench_en", 200),
    ("Llama-3.1-8B", "a10", 2, "sharegpt_8k_first_turn", 800),
    ("Llama-3.1-8B", "rtx-3090", 2, "sharegpt_8k_first_turn", 800),
    ("Llama-3.1-8B", "l20", 2, "longbench_en", 200),
    ("Llama-3.1-70B", "a100-pcie-80gb", 4, "sharegpt_8k_first_turn", 1500),
)


def main() -> None:
    for model, gpu, num_gpus, trace, num_requests in CASES:
        for offload in KVOffload:
            speeds = {}
            for policy in PhasePolicyName:
                run = simulate_pipeline(
                    model=ModelSpec.from_pretrained(HERE / "model_configs" / model),
                    server=server_profile(gpu, num_gpus),
                    workload=read_lengths(HERE / "traces" / f"{trace}.csv")[:num_requests],
                    settings=PipelineSettings(phase_policy=policy, kv_offload=offload),
                )
                speeds[policy.value] = round(run.output_tokens_per_second)
            case = {"model": model, "server": f"{num_gpus} x {gpu}", "trace": trace, "requests": num_requests}
            print(json.dumps({**case, "kv_offload": offload.value, "output_tokens_per_second": speeds}), flush=True)


if __name__ == "__main__":
    main()
