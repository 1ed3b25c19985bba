"""What each GEMM of a decoder layer takes in cuBLAS and in cuBLASLt, by tokens in the step; prints JSON, microseconds.

    python benchmarks/gemm_libraries.py --model benchmarks/model_configs/Llama-3.1-70B > gemm_libraries.json

Random bfloat16 weights, timed as a stage times them at its start (`pipemax/worker/gemm_timer.py`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from gemm_floor import LAYERS, layer_shapes, matrices
from torch import Tensor

from pipemax.bench import environment
from pipemax.worker.gemm_library import BlasLibrary
from pipemax.worker.gemm_timer import GemmTimer, num_timed

NAMES = ("qkv", "out", "gate_up", "down")
TOKENS = [1, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]


@dataclass(frozen=True, slots=True)
class Weight:
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(x, self.weight.t(), out=out)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    layers = [[Weight(weight) for weight in layer] for layer in matrices(layer_shapes(config), LAYERS)]
    timer = GemmTimer([gemm for layer in layers for gemm in layer], most_tokens=max(arguments.tokens))
    results = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for place, name in enumerate(NAMES):
            alike = [layer[place] for layer in layers]
            for num_tokens in arguments.tokens:
                count = min(len(alike), num_timed(alike[0].weight, num_tokens))
                seconds = {library: timer.seconds(alike, num_tokens, library) / count for library in BlasLibrary}
                times = {library.name.lower(): round(1e6 * value, 1) for library, value in seconds.items()}
                results.append({"gemm": name, "tokens": num_tokens, **times})
    print(json.dumps({"model": str(arguments.model), "environment": environment(), "by_gemm": results}))


if __name__ == "__main__":
    main()
