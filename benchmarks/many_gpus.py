"""Runs of 70B models over N GPUs with the KV memory of smaller cards, and what the simulator says of the same server.

    python benchmarks/many_gpus.py blocks --model benchmarks/model_configs/Llama-3.1-70B --card rtx-4090 --num-gpus 8
    python benchmarks/many_gpus.py table --num-gpus 8 --folder benchmarks/results/many_gpus

`many_gpus.sh` asks for `blocks` and makes the measurements; `table` puts them beside the prediction: N of the GPUs that
they ran on, each with the memory of the card. Measured over predicted should be 0.9 to 1.1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from pipemax.config import ConfigError, KVOffload, PhasePolicyName
from pipemax.cost.hardware import ServerProfile
from pipemax.cost.profiles import server_profile
from pipemax.cost.workload import MeanLengths, read_lengths
from pipemax.local_hardware import profile_name
from pipemax.model_spec import ModelSpec
from pipemax.planning.simulate import PipelineSettings, plan_pipeline, simulate_pipeline

HERE = Path(__file__).parent
VARIANTS = {
    "all": (PhasePolicyName.AUTO, KVOffload.ON),
    "no-offload": (PhasePolicyName.AUTO, KVOffload.OFF),
    "mixed": (PhasePolicyName.MIXED, KVOffload.ON),
    "no-offload-mixed": (PhasePolicyName.MIXED, KVOffload.OFF),
}
WORKLOADS = {
    "sharegpt": (HERE / "workloads" / "sharegpt_999.csv", 999),
    "longbench": (HERE / "traces" / "longbench_en.csv", 1000),
}


def capped_server(gpu: str, card: str, num_gpus: int) -> ServerProfile:
    """Servers of `gpu`, with the memory of `card`."""
    server = server_profile(gpu, num_gpus)
    memory_gib = server_profile(card, num_gpus).gpu.memory_gib
    return dataclasses.replace(server, gpu=dataclasses.replace(server.gpu, memory_gib=memory_gib))


def settings_of(variant: str) -> PipelineSettings:
    policy, offload = VARIANTS[variant]
    return PipelineSettings(phase_policy=policy, kv_offload=offload)


def print_blocks(args: argparse.Namespace) -> None:
    """KV blocks that N cards have beside the weights, the window included."""
    requests = read_lengths(WORKLOADS["sharegpt"][0])
    plan = plan_pipeline(
        model=ModelSpec.from_pretrained(args.model),
        server=server_profile(args.card, args.num_gpus),
        settings=settings_of("all"),
        lengths=MeanLengths.of(requests),
        num_requests=len(requests),
    )
    print(plan.capacity.num_device_blocks)


def print_table(args: argparse.Namespace) -> None:
    print("| model | workload | memory of | what | measured out tok/s | predicted | measured / predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(args.folder.glob(f"{args.num_gpus}x_*.json")):
        _, model, workload, card, variant = path.stem.split("_")
        measured = json.loads(path.read_text())
        gpu = profile_name(measured["environment"]["device"])
        csv, count = WORKLOADS[workload]
        run = simulate_pipeline(
            model=ModelSpec.from_pretrained(HERE / "model_configs" / model),
            server=capped_server(gpu, card, args.num_gpus),
            workload=read_lengths(csv)[:count],
            settings=settings_of(variant),
        )
        speed, predicted = measured["output_tokens_per_second"], run.output_tokens_per_second
        print(
            f"| {model} | {workload} | {card} | {variant} | {speed:,.0f} | {predicted:,.0f} | {speed / predicted:.2f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    blocks = commands.add_parser("blocks")
    blocks.add_argument("--model", type=Path, required=True)
    blocks.add_argument("--card", required=True)
    blocks.set_defaults(run=print_blocks)
    table = commands.add_parser("table")
    table.add_argument("--folder", type=Path, required=True)
    table.set_defaults(run=print_table)
    for command in (blocks, table):
        command.add_argument("--num-gpus", type=int, required=True)
    args = parser.parse_args()
    try:
        args.run(args)
    except ConfigError as error:
        print(f"many_gpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
