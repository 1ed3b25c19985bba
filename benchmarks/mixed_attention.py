"""What attention of a mixed step takes on one GPU: decode rows and a chunk of prefill, planned together or apart.

    python benchmarks/mixed_attention.py > mixed_attention.jsonl

Decode rows of 30 to 1,500 keys and one chunk in the middle of its prompt, through `FlashInferAttention` as a stage
calls it, over several layers' pools (more than any cache holds). One JSON line a case: microseconds a layer, for the
decode rows alone, for the chunk alone, and for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import numpy as np
import torch

from pipemax.attention import flashinfer
from pipemax.attention.base import LayerAttention, RowLayout

BLOCK_SIZE = 16
HEAD_DIM = 128
NUM_LAYERS = 8
REPEATS = 7


def layout(kv_lens: list[int], new_tokens: list[int], rng: np.random.Generator) -> RowLayout:
    lens = np.array(kv_lens, np.int32)
    num_pages = -(-lens // BLOCK_SIZE)
    return RowLayout(
        qo_indptr=np.cumsum([0, *new_tokens]).astype(np.int32),
        kv_lens=lens,
        kv_indptr=np.cumsum([0, *num_pages]).astype(np.int32),
        kv_indices=rng.permutation(int(num_pages.sum())).astype(np.int32),
        block_size=BLOCK_SIZE,
    )


def microseconds_a_layer(backend: flashinfer.FlashInferAttention, rows: RowLayout, heads: int, kv_heads: int) -> float:
    """The kernels alone: the layout is planned before, and the plan's part that the first layer makes."""
    device = torch.device("cuda")
    num_slots = len(rows.kv_indices)
    shape = (num_slots, 2, BLOCK_SIZE, kv_heads, HEAD_DIM)
    pools = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(NUM_LAYERS)]
    query = torch.randn(int(rows.qo_indptr[-1]), heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
    out, layer = torch.empty_like(query), LayerAttention(scaling=HEAD_DIM**-0.5)
    backend.plan(rows)
    backend.run(query, pools[0], layer, out)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for pool in pools:
            backend.run(query, pool, layer, out)
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 1e6 * statistics.median(seconds) / NUM_LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 96, 160, 256, 512, 1024])
    args = parser.parse_args()
    flashinfer.LEAST_TOKENS_APART = 0  # short chunks too, to see where it begins to pay
    rng = np.random.default_rng(0)
    backend = flashinfer.FlashInferAttention(
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=HEAD_DIM,
    )
    for num_rows in args.rows:
        lens = rng.integers(30, 1500, num_rows).tolist()
        for chunk in args.chunks:
            mixed = layout([*lens, 200 + chunk], [*([1] * num_rows), chunk], rng)
            cases = {
                "decode": layout(lens, [1] * num_rows, rng),
                "chunk": layout([200 + chunk], [chunk], rng),
            }
            found = {
                name: microseconds_a_layer(backend, rows, args.heads, args.kv_heads) for name, rows in cases.items()
            }
            for choice in flashinfer.MixedAttention:
                os.environ[flashinfer.MIXED_VARIABLE] = choice
                flashinfer.mixed_attention.cache_clear()
                found[choice.value] = microseconds_a_layer(backend, mixed, args.heads, args.kv_heads)
            figures = {f"{name}_microseconds": round(value, 1) for name, value in found.items()}
            print(json.dumps({"rows": num_rows, "keys": sum(lens), "chunk": chunk, **figures}), flush=True)


if __name__ == "__main__":
    main()
