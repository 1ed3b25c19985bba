"""The floor of a decode step: what the GEMMs of one decoder layer take, by tokens in the step; prints JSON.

    python benchmarks/gemm_floor.py --model benchmarks/model_configs/Llama-3.1-70B > benchmarks/results/gemm_floor.json

Random bfloat16 weights, q, k and v merged, gate and up merged, nothing between the GEMMs, captured in a CUDA graph over
several layers with weights of their own, so that none is found in the cache. The model's head is timed likewise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipemax.bench import environment

TOKENS = [1, 16, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 1024, 2048]
LAYERS = 6
REPEATS = 10


def layer_shapes(config: dict[str, int]) -> list[tuple[int, int]]:
    """(outputs, inputs) of each GEMM of a Llama-shaped layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    intermediate = config["intermediate_size"]
    return [(queries + 2 * keys, hidden), (hidden, queries), (2 * intermediate, hidden), (hidden, intermediate)]


def milliseconds(work: Callable[[], None]) -> float:
    """Of one replay of the captured work, over REPEATS replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(REPEATS):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / REPEATS


def matrices(shapes: list[tuple[int, int]], copies: int) -> list[list[Tensor]]:
    return [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02) for shape in shapes] for _ in range(copies)
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    layers = matrices(layer_shapes(config), LAYERS)
    heads = matrices([(config["vocab_size"], config["hidden_size"])], 1)
    results = {}
    for num_tokens in arguments.tokens:
        rows = {
            width: torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
            for width in {weight.shape[1] for layer in layers for weight in layer}
        }

        def run(weights: list[list[Tensor]], rows: dict[int, Tensor] = rows) -> None:
            for layer in weights:
                for weight in layer:
                    torch.nn.functional.linear(rows[weight.shape[1]], weight)

        results[num_tokens] = {
            "layer_milliseconds": round(milliseconds(lambda: run(layers)) / LAYERS, 4),
            "head_milliseconds": round(milliseconds(lambda: run(heads)), 4),
        }
    print(json.dumps({"model": str(arguments.model), "environment": environment(), "by_tokens": results}))


if __name__ == "__main__":
    main()
