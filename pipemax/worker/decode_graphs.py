"""`DecodeGraphs`: decode steps of a GPU stage from CUDA graphs with the attention in them.

A graph holds the layers that share their copies, so the window's fences stand between graphs:

    plan | enter | graph of l0..l3 | leave: copies of l0..l3 | enter | graph of l4..l7 | leave ...

Issuing such a step costs a tenth of issuing it layer by layer (`piece_graphs.py`), which is what short steps are bound
by. Steps with longer rows, or more of them, run as before. Graphs hold addresses of KV pools, so they are captured once
the pools are there. Never here: what a layer computes (`llama_layers.py`), what a plan of attention is.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from pipemax.attention.base import RowLayout
from pipemax.attention.captured_decode import CapturedBuffers, CapturedDecodeAttention
from pipemax.attention.flashinfer import FlashInferAttention
from pipemax.worker.attention_hook import LayerFences, LayerPools
from pipemax.worker.llama_layers import LlamaLayers
from pipemax.worker.piece_graphs import graph_sizes
from pipemax.worker.stage_model import StageSlice
from pipemax.worker.transfer import GPU_LAYERS_PER_COPY, layers_sharing_copies
from pipemax.worker.upload import copy_by_kernel


class DecodeGraphs:
    """Serves steps of up to `max_rows` decode rows. Captures everything when it is made."""

    def __init__(
        self,
        layers: LlamaLayers,
        *,
        stage: StageSlice,
        backend: FlashInferAttention,
        pools: LayerPools,
        scratch_slot: int,
        block_size: int,
        max_rows: int,
    ) -> None:
        """`backend` serves the other steps; the two share a workspace. All layers attend alike.

        `scratch_slot` is a device slot that belongs to no request; slots below it do.
        """
        attention = layers.common_attention
        assert attention is not None
        self._layers = layers
        self._stage = stage
        self._pools = pools
        self._sharing = layers_sharing_copies(stage.layers, GPU_LAYERS_PER_COPY)
        self._sizes = graph_sizes(max_rows)
        self._buffers = layers.buffers(self._sizes[-1])
        most_rows = self._sizes[-1]
        buffers = CapturedBuffers(backend, most_rows=most_rows, most_pages=scratch_slot + most_rows)
        self._backends = {
            size: CapturedDecodeAttention(
                num_rows=size,
                scratch_slot=scratch_slot,
                block_size=block_size,
                layer=attention,
                dtype=layers.dtype,
                buffers=buffers,
                **layers.heads,
            )
            for size in self._sizes
        }
        self._graphs_of: dict[int, list[torch.cuda.CUDAGraph]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for size in reversed(self._sizes):
                self._backends[size].plan(_idle_rows(block_size))
                self._run_all(size)  # libraries choose and load their kernels now, which cannot be captured
                stream.synchronize()
                self._graphs_of[size] = []
                for sharing in self._sharing:
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    self._run(size, sharing)
                    graph.capture_end()
                    self._graphs_of[size].append(graph)
        torch.cuda.synchronize()

    @property
    def num_graphs(self) -> int:
        return sum(len(graphs) for graphs in self._graphs_of.values())

    def serves(self, rows: RowLayout) -> bool:
        num_rows = len(rows.kv_lens)
        return num_rows <= self._sizes[-1] and int(rows.qo_indptr[-1]) == num_rows

    def forward(self, input_: Tensor, positions_T: Tensor, rows: RowLayout, fences: LayerFences) -> Tensor:
        """Hidden states [T, H] of a step that it `serves`; overwritten by the next call."""
        num_rows = len(rows.kv_lens)
        size = self._sizes[bisect.bisect_left(self._sizes, num_rows)]
        buffers = self._buffers.first(num_rows)
        copy_by_kernel(buffers.input, input_)
        copy_by_kernel(buffers.positions, positions_T)
        self._backends[size].plan(rows)
        for sharing, graph in zip(self._sharing, self._graphs_of[size], strict=True):
            fences.enter(sharing.start)
            graph.replay()
            fences.leave(sharing.start)
            for layer in sharing[1:]:  # no fence of its own stands between these
                fences.enter(layer)
                fences.leave(layer)
        return buffers.output

    def _run_all(self, size: int) -> None:
        for sharing in self._sharing:
            self._run(size, sharing)

    def _run(self, size: int, sharing: range) -> None:
        buffers, backend = self._buffers.first(size), self._backends[size]
        enter, *between = self._layers.pieces
        if sharing.start == self._stage.layers.start:
            enter(buffers)
        for index in sharing:
            layer = index - self._stage.layers.start
            self._layers.attend_unfenced(layer, buffers, backend, self._pools.device_pool(index))
            between[layer](buffers)


def _idle_rows(block_size: int) -> RowLayout:
    """No rows: all are idle ones."""
    zero, none = torch.zeros(1, dtype=torch.int32).numpy(), torch.zeros(0, dtype=torch.int32).numpy()
    return RowLayout(qo_indptr=zero, kv_lens=none, kv_indptr=zero, kv_indices=none, block_size=block_size)
