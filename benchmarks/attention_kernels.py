"""How fast decode attention reads paged KV on one GPU: fa2 as PipeMax runs it, XQA, BatchAttention, fa3.

    python benchmarks/attention_kernels.py > attention_kernels.jsonl
    python benchmarks/attention_kernels.py --seconds 52 --variants fa2,xqa --rows 16,32 --heads 64 --layouts strided

Every variant is captured in a CUDA graph of several layers with distinct pools; prints one JSON line a measurement:
microseconds a layer, GB/s of the rows' keys and values, largest error of some rows against float32 torch, relative to
the largest output of the same row and head. A failing variant prints its error; a CUDA error that sticks ends the run.

Layouts: "strided" is [blocks, 4 layers, 2, 16, 8, 128] and a layer's view of it; "plain" is [blocks, 2, 16, 8, 128].
Variants:
    fa2            paged prefill wrapper, CUDA-graph mode, planned outside, as pipemax/attention/flashinfer.py
    fa2_nosplit    the same kernel planned outside graph mode with disable_split_kv=True: no float partials, no merge
                   pass. (In graph mode that is unsafe: the grid is padded, and nothing masks the rest.)
    fa2_chunkN     the same kernel planned outside graph mode with fixed_split_size=N pages: the grid depends on lengths
    xqa            XQA as it splits by itself (SMs / (rows * KV heads), at least 1)
    xqa_nopdl      the same without programmatic dependent launch
    xqa_s2/s3/s4   every row in 2/3/4 interleaved parts (256 keys a turn), by telling it of more SMs
    holistic       flashinfer.BatchAttention, the persistent kernel with a balanced plan, if its module is there
    fa3            paged prefill wrapper, backend fa3, CUDA-graph mode, if its module is there
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

START = time.monotonic()
PAGE = 16
KV_HEADS = 8
HEAD_DIM = 128
LAYERS_A_GROUP = 4
MOST_PAGES_A_ROW = 128  # width of XQA's page table: wider than needed, as a captured graph would have it
PAGE_ELEMENTS = 2 * PAGE * KV_HEADS * HEAD_DIM
SCALING = HEAD_DIM**-0.5
FLOAT_WORKSPACE_BYTES = 256 * 2**20
BIG_WORKSPACE_BYTES = 1024 * 2**20
INT_WORKSPACE_BYTES = 8 * 2**20
XQA_SCRATCH_BYTES = 128 * 2**20
LEAST_GRAPH_BYTES = 1200 * 2**20  # of KV a replay, far more than any L2
MOST_LAYERS = 40

DEFAULT_VARIANTS = "fa2,xqa,xqa_s2,xqa_s3,xqa_s4,fa2_nosplit,fa2_chunk16,fa2_chunk32,xqa_nopdl,holistic,fa3"


def emit(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


@dataclass
class Rows:
    """Decode rows of random lengths and where their pages are, for every variant's taste."""

    lengths: np.ndarray
    pages_of_row: list[np.ndarray]
    num_pages: int
    num_layers: int
    kv_bytes: int
    qo_indptr_host: Tensor
    kv_indptr_host: Tensor
    last_page_lens_host: Tensor
    kv_lens_host: Tensor
    kv_indices: Tensor
    page_table: Tensor
    seq_lens: Tensor


def draw_lengths(num_rows: int) -> np.ndarray:
    rng = np.random.default_rng(num_rows)
    lengths = rng.lognormal(math.log(450) - 0.7**2 / 2, 0.7, num_rows)
    return np.clip(lengths, 30, 1500).astype(np.int32)


def make_rows(num_rows: int, device: torch.device, pin: bool = True) -> Rows:
    lengths = draw_lengths(num_rows)
    counts = -(-lengths // PAGE)
    num_pages = int(counts.sum())
    order = np.random.default_rng(1000 + num_rows).permutation(num_pages).astype(np.int32)
    ends = np.cumsum(counts)
    pages_of_row = np.split(order, ends[:-1])
    table = np.zeros((num_rows, MOST_PAGES_A_ROW), np.int32)
    for row, pages in enumerate(pages_of_row):
        table[row, : len(pages)] = pages
    layer_bytes = num_pages * PAGE_ELEMENTS * 2
    groups = max(2, -(-LEAST_GRAPH_BYTES // (layer_bytes * LAYERS_A_GROUP)))

    def host(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return tensor.pin_memory() if pin else tensor

    return Rows(
        lengths=lengths,
        pages_of_row=pages_of_row,
        num_pages=num_pages,
        num_layers=min(MOST_LAYERS, groups * LAYERS_A_GROUP),
        kv_bytes=int(lengths.sum()) * 2 * KV_HEADS * HEAD_DIM * 2,
        qo_indptr_host=host(np.arange(num_rows + 1)),
        kv_indptr_host=host(np.concatenate([[0], ends])),
        last_page_lens_host=host(lengths - (counts - 1) * PAGE),
        kv_lens_host=host(lengths),
        kv_indices=torch.from_numpy(order).to(device),
        page_table=torch.from_numpy(table).to(device),
        seq_lens=torch.from_numpy(lengths).to(device).view(num_rows, 1),
    )


def pools_of(flat: Tensor, rows: Rows, layout: str) -> list[Tensor]:
    """One [blocks, 2, 16, 8, 128] view a layer, of distinct memory."""
    used = flat[: rows.num_layers * rows.num_pages * PAGE_ELEMENTS]
    tail = (2, PAGE, KV_HEADS, HEAD_DIM)
    if layout == "plain":
        return list(used.view(rows.num_layers, rows.num_pages, *tail))
    groups = used.view(-1, rows.num_pages, LAYERS_A_GROUP, *tail)
    pools = [group[:, layer] for group in groups for layer in range(LAYERS_A_GROUP)]
    assert len(pools) == rows.num_layers and pools[0].stride(0) == LAYERS_A_GROUP * PAGE_ELEMENTS
    return pools


def reference(query: Tensor, pool: Tensor, rows: Rows, row: int) -> Tensor:
    """[heads, 128] in float32."""
    length = int(rows.lengths[row])
    pages = torch.from_numpy(rows.pages_of_row[row].astype(np.int64)).to(pool.device)
    kv = pool[pages].float()  # [pages, 2, 16, 8, 128]
    key, value = (kv[:, i].reshape(-1, KV_HEADS, HEAD_DIM)[:length] for i in range(2))
    grouped = query[row].float().view(KV_HEADS, -1, HEAD_DIM)
    scores = torch.einsum("hgd,khd->hgk", grouped, key) * SCALING
    return torch.einsum("hgk,khd->hgd", scores.softmax(-1), value).reshape(-1, HEAD_DIM)


def worst_error(query: Tensor, pool: Tensor, rows: Rows, out: Tensor) -> float:
    order = np.argsort(rows.lengths)
    chosen = {int(order[0]), int(order[len(order) // 2]), int(order[-1]), 0, len(order) - 1}
    worst = 0.0
    for row in sorted(chosen):
        expected = reference(query, pool, rows, row)
        error = (out[row].float() - expected).abs().amax(-1) / expected.abs().amax(-1)
        worst = max(worst, float(error.max()) if bool(torch.isfinite(error).all()) else math.inf)
    return worst


class Bench:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.workspace = torch.empty(BIG_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.xqa_scratch = torch.empty(XQA_SCRATCH_BYTES, dtype=torch.uint8, device=device)

    def int_zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def make(self, variant: str, rows: Rows, query: Tensor, out: Tensor) -> Callable[[Tensor], Any]:
        """Plans what is to be planned and returns what attends in one layer, given its pool."""
        if variant in ("fa2", "fa3"):
            return self._graph_prefill(variant, rows, query, out)
        if variant == "fa2_nosplit":
            return self._plain_prefill(rows, query, out, disable_split_kv=True)
        if variant.startswith("fa2_chunk"):
            return self._plain_prefill(rows, query, out, fixed_split_size=int(variant.removeprefix("fa2_chunk")))
        if variant == "holistic":
            return self._holistic(rows, query, out)
        assert variant.startswith("xqa"), f"no variant {variant}"
        return self._xqa(variant, rows, query, out)

    def _shape_options(self, heads: int) -> dict[str, Any]:
        return {
            "num_qo_heads": heads,
            "num_kv_heads": KV_HEADS,
            "head_dim_qk": HEAD_DIM,
            "page_size": PAGE,
            "causal": True,
            "sm_scale": SCALING,
            "window_left": -1,
            "logits_soft_cap": 0.0,
            "q_data_type": torch.bfloat16,
            "kv_data_type": torch.bfloat16,
            "max_token_per_sequence": 1,
        }

    def _graph_prefill(self, variant: str, rows: Rows, query: Tensor, out: Tensor) -> Callable[[Tensor], Any]:
        import flashinfer

        num_rows, heads = query.shape[:2]
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self.workspace[:FLOAT_WORKSPACE_BYTES],
            "NHD",
            backend=variant,
            use_cuda_graph=True,
            qo_indptr_buf=self.int_zeros(num_rows + 1),
            paged_kv_indptr_buf=self.int_zeros(num_rows + 1),
            paged_kv_indices_buf=self.int_zeros(num_rows * MOST_PAGES_A_ROW),
            paged_kv_last_page_len_buf=self.int_zeros(num_rows),
        )
        wrapper.plan(
            rows.qo_indptr_host,
            rows.kv_indptr_host,
            rows.kv_indices,
            rows.last_page_lens_host,
            **self._shape_options(heads),
        )
        return lambda pool: wrapper.run(query, pool, out=out)

    def _plain_prefill(self, rows: Rows, query: Tensor, out: Tensor, **split_options: Any) -> Callable[[Tensor], Any]:
        import flashinfer

        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend="fa2")
        wrapper.plan(
            rows.qo_indptr_host,
            rows.kv_indptr_host,
            rows.kv_indices,
            rows.last_page_lens_host,
            **self._shape_options(query.shape[1]),
            **split_options,
        )
        return lambda pool: wrapper.run(query, pool, out=out)

    def _holistic(self, rows: Rows, query: Tensor, out: Tensor) -> Callable[[Tensor], Any]:
        import flashinfer

        attention = flashinfer.BatchAttention("NHD", device=str(self.device))
        attention.plan(
            rows.qo_indptr_host,
            rows.kv_indptr_host,
            rows.kv_indices,
            rows.kv_lens_host,
            query.shape[1],
            KV_HEADS,
            HEAD_DIM,
            HEAD_DIM,
            PAGE,
            causal=True,
            sm_scale=SCALING,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=self.device)
        return lambda pool: attention.run(query, pool, out=out, lse=lse)

    def _xqa(self, variant: str, rows: Rows, query: Tensor, out: Tensor) -> Callable[[Tensor], Any]:
        from flashinfer.xqa import xqa  # `flashinfer.xqa` as an attribute is the function itself

        num_rows = query.shape[0]
        query_4d, out_4d = query.unsqueeze(1), out.unsqueeze(1)
        semaphores = self.int_zeros(num_rows * KV_HEADS)  # zero before the first launch; each launch leaves zeros
        # Parts a row = sm_count // (rows * KV heads), at least 1, at most the page table's keys / 256.
        sm_count = int(variant.removeprefix("xqa_s")) * num_rows * KV_HEADS if "_s" in variant else None
        options = {"sm_count": sm_count, "enable_pdl": variant != "xqa_nopdl"}

        def attend(pool: Tensor) -> None:
            xqa(
                query_4d,
                pool[:, 0],
                pool[:, 1],
                rows.page_table,
                rows.seq_lens,
                out_4d,
                self.xqa_scratch,
                semaphores,
                KV_HEADS,
                PAGE,
                q_scale=SCALING * math.sqrt(HEAD_DIM),  # it divides by sqrt(head_dim) itself
                kv_scale=1.0,
                kv_layout="NHD",
                **options,
            )

        return attend

    def measure(self, variant: str, rows: Rows, pools: list[Tensor], heads: int) -> dict[str, Any]:
        generator = torch.Generator(device=self.device).manual_seed(heads + len(rows.lengths))
        query = torch.randn(
            len(rows.lengths), heads, HEAD_DIM, device=self.device, dtype=torch.bfloat16, generator=generator
        )
        out = torch.full_like(query, math.nan)
        attend = self.make(variant, rows, query, out)
        attend(pools[0])  # loads the module and what it sets up once, which capture would not allow
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which empties the caching allocator (and may collect garbage) before each capture.
        with torch.cuda.stream(self.stream):
            graph.capture_begin()
            try:
                for pool in pools:
                    attend(pool)
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        out.fill_(math.nan)
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        seconds = [self._replay_seconds(graph) for _ in range(7)]
        layer_seconds = statistics.median(seconds) / len(pools)
        error = worst_error(query, pools[-1], rows, out)
        del graph
        return {
            "microseconds": round(layer_seconds * 1e6, 1),
            "gigabytes_per_second": round(rows.kv_bytes / layer_seconds / 1e9),
            "max_relative_error": round(error, 5),
        }

    def _replay_seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def read_roof(flat: Tensor) -> float:
    """GB/s of a plain reduction over the buffer."""
    words = flat.view(torch.int32)
    seconds = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        words.amax()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return words.numel() * 4 / min(seconds) / 1e9


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int, str]]:
    for variant in arguments.variants.split(","):
        for heads in map(int, arguments.heads.split(",")):
            for num_rows in map(int, arguments.rows.split(",")):
                for layout in arguments.layouts.split(","):
                    yield variant, heads, num_rows, layout


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=52.0, help="no case begins later than this")
    parser.add_argument("--variants", default=DEFAULT_VARIANTS)
    parser.add_argument("--rows", default="16,32,64,96,128,192,256")
    parser.add_argument("--heads", default="64,32")
    parser.add_argument("--layouts", default="strided,plain")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    import flashinfer

    emit(
        gpu=torch.cuda.get_device_name(device),
        sms=properties.multi_processor_count,
        torch=torch.__version__,
        flashinfer=flashinfer.__version__,
    )
    sizes = sorted({int(rows) for rows in arguments.rows.split(",")})
    rows_of = {num_rows: make_rows(num_rows, device) for num_rows in sizes}
    most = max(rows.num_layers * rows.num_pages for rows in rows_of.values()) * PAGE_ELEMENTS
    flat = torch.empty(most, dtype=torch.bfloat16, device=device)
    for piece in flat.split(2**28):
        piece.normal_()
    for num_rows, rows in rows_of.items():
        emit(
            rows=num_rows,
            mean_keys=round(float(rows.lengths.mean())),
            most_keys=int(rows.lengths.max()),
            layers=rows.num_layers,
            megabytes_a_layer=round(rows.kv_bytes / 1e6, 1),
        )
    emit(read_roof_gigabytes_per_second=round(read_roof(flat)), at=round(time.monotonic() - START, 1))
    bench = Bench(device)
    failures: dict[str, int] = {}
    for variant, heads, num_rows, layout in cases(arguments):
        if time.monotonic() - START > arguments.seconds:
            emit(stopped="out of time", before=[variant, heads, num_rows, layout])
            break
        if failures.get(variant, 0) >= 2:
            continue
        rows = rows_of[num_rows]
        head = {"variant": variant, "heads": heads, "kv_heads": KV_HEADS, "rows": num_rows, "layout": layout}
        try:
            emit(**head, **bench.measure(variant, rows, pools_of(flat, rows, layout), heads))
        except Exception as error:  # whatever a variant does, the others are measured
            failures[variant] = failures.get(variant, 0) + 1
            first = error.__context__ or error  # ending a failed capture fails too: the first error is the one to read
            emit(**head, error=f"{type(first).__name__}: {first}"[:600])
            try:
                torch.cuda.synchronize()
            except Exception as stuck:
                emit(stopped="a CUDA error that sticks; run the other variants with --variants", error=str(stuck)[:200])
                break
    emit(done=True, seconds=round(time.monotonic() - START, 1))


if __name__ == "__main__":
    main()
