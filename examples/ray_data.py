"""A Parquet table through Ray Data: every `prompt` answered, other columns carried along, on all GPUs of a cluster.

python examples/ray_data.py /models/Llama-3.1-8B-Instruct questions.parquet answers --stages 4 --actors 2

One actor is one pipeline of `--stages` GPUs on one node. On a cluster, run it where Ray is running; alone, Ray starts
here by itself. Interrupted, the same command goes on: rows whose answers are written are not run again.
"""

import argparse

import ray.data

from pipemax.ray import PipeMaxEngineProcessorConfig, build_processor

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("input", help="Parquet: columns id and prompt")
parser.add_argument("output", help="folder for Parquet files, which all nodes see")
parser.add_argument("--checkpoint", help="folder, which all nodes see; default: OUTPUT.checkpoint")
parser.add_argument("--stages", type=int, default=1)
parser.add_argument("--actors", type=int, default=1)
parser.add_argument("--device", default="cuda")
parser.add_argument("--host-memory-gib", type=float, help="of an actor, for KV blocks")
args = parser.parse_args()

config = PipeMaxEngineProcessorConfig(
    model_source=args.model,
    engine_kwargs={
        "pipeline_parallel_size": args.stages,
        "device": args.device,
        "host_memory_gib": args.host_memory_gib,
    },
    concurrency=args.actors,
    id_column="id",
)
answer = build_processor(
    config,
    preprocess=lambda row: {
        "messages": [{"role": "user", "content": row["prompt"]}],
        "sampling_params": {"temperature": 0.7, "max_tokens": 200},
    },
    postprocess=lambda row: {"id": row["id"], "answer": row["generated_text"], "ended_by": row["finish_reason"]},
)

ray.data.DataContext.get_current().checkpoint_config = ray.data.checkpoint.CheckpointConfig(
    id_column="id", checkpoint_path=args.checkpoint or f"{args.output}.checkpoint"
)
answer(ray.data.read_parquet(args.input)).write_parquet(args.output, mode="append")
