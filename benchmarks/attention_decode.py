"""How fast FlashInfer's kernels read KV in decode, by kernel, page size and number of rows; prints JSON.

    python benchmarks/attention_decode.py > benchmarks/results/attention_decode.json

One layer; rows of random lengths, pages shuffled; several pools in turn, so that no cache holds them. Rates are bytes
of the keys and values that the rows have, over the median time of a call.
"""

from __future__ import annotations

import functools
import json
import statistics
from typing import Any

import flashinfer
import numpy as np
import torch

SHAPES = {"8B": (32, 8, 128), "70B": (64, 8, 128)}
NUM_POOLS = 3


def measure(call: Any, num_pools: int, repeats: int = 12) -> float:
    """Median seconds."""
    seconds = []
    for i in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(i % num_pools)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[2:])


def attend(wrapper: Any, query: torch.Tensor, pools: list[torch.Tensor], out: torch.Tensor, turn: int) -> None:
    wrapper.run(query, pools[turn], out=out)


def main() -> None:
    device = torch.device("cuda", 0)
    rng = np.random.default_rng(0)
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    results = []
    for name, (heads, kv_heads, head_dim) in SHAPES.items():
        for num_rows in (64, 256, 512):
            lengths = rng.integers(30, 900, num_rows).astype(np.int32)
            query = torch.randn(num_rows, heads, head_dim, device=device, dtype=torch.bfloat16)
            out = torch.empty_like(query)
            kv_bytes = int(lengths.sum()) * 2 * kv_heads * head_dim * 2
            for page in (16, 32, 64):
                pages = -(-lengths // page)
                total = int(pages.sum())
                pools = [
                    torch.randn(total, 2, page, kv_heads, head_dim, device=device, dtype=torch.bfloat16)
                    for _ in range(NUM_POOLS)
                ]
                indptr = torch.from_numpy(np.cumsum([0, *pages]).astype(np.int32))
                indices = torch.from_numpy(rng.permutation(total).astype(np.int32)).to(device)
                last = torch.from_numpy((lengths - (pages - 1) * page).astype(np.int32))
                shape = (heads, kv_heads, head_dim, page)
                dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
                qo_indptr = torch.arange(num_rows + 1, dtype=torch.int32)
                kernels: dict[str, Any] = {}
                for split, options in (("", {}), (" no split", {"disable_split_kv": True})):
                    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
                    wrapper.plan(qo_indptr, indptr, indices, last, *shape, causal=True, **dtypes, **options)
                    kernels["fa2" + split] = wrapper
                if heads // kv_heads in (1, 2, 3, 4, 8):
                    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=False)
                    decode.plan(indptr, indices, last, *shape, **dtypes)
                    kernels["cuda-core decode"] = decode
                for kernel, wrapper in kernels.items():
                    seconds = measure(functools.partial(attend, wrapper, query, pools, out), NUM_POOLS)
                    results.append(
                        {
                            "shape": name,
                            "rows": num_rows,
                            "page": page,
                            "kernel": kernel,
                            "microseconds": round(seconds * 1e6, 1),
                            "gigabytes_per_second": round(kv_bytes / seconds / 1e9, 1),
                        }
                    )
    print(json.dumps({"device": torch.cuda.get_device_name(0), "results": results}, indent=1))


if __name__ == "__main__":
    main()
