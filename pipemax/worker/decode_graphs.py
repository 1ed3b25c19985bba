"""`DecodeGraphs`: decode steps of a GPU stage from CUDA graphs with the attention in them.

A graph holds the layers that share their copies, so the window's fences stand between graphs:

    plan | enter | graph of l0..l3 | leave: copies of l0..l3 | enter | graph of l4..l7 | leave ...

Issuing such a step costs a tenth of issuing it layer by layer (`piece_graphs.py`), which is what short steps are bound
by. Steps with longer rows, or more of them, run as before. Graphs hold addresses of KV pools, so they are captured once
the pools are there. Never here: what a layer computes (`llama_layers.py`), what a plan of attention is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipemax.attention.base import RowLayout
from pipemax.attention.captured_buffers import CapturedBuffers
from pipemax.attention.captured_decode import CapturedDecodeAttention
from pipemax.attention.flashinfer import FlashInferAttention
from pipemax.worker.attention_hook import LayerFences, LayerPools
from pipemax.worker.graph_sizes import QuickestSizes, graph_sizes, replay_seconds
from pipemax.worker.llama_layers import LlamaLayers
from pipemax.worker.stage_model import StageSlice
from pipemax.worker.transfer import GPU_LAYERS_PER_COPY, layers_sharing_copies
from pipemax.worker.upload import copy_by_kernel


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    """A graph for each group of layers that share their copies, and the attention in them, which is told of steps."""

    attention: CapturedDecodeAttention
    graphs: list[torch.cuda.CUDAGraph]


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
        common_attention = layers.common_attention
        assert common_attention is not None
        self._layers = layers
        self._stage = stage
        self._pools = pools
        self._sharing = layers_sharing_copies(stage.layers, GPU_LAYERS_PER_COPY)
        sizes = graph_sizes(max_rows)
        self._buffers = layers.buffers(sizes[-1])
        buffers = CapturedBuffers(backend, most_rows=sizes[-1], most_pages=scratch_slot + sizes[-1])
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

        def capture(size: int) -> _CapturedStep:
            attention = CapturedDecodeAttention(
                num_rows=size,
                scratch_slot=scratch_slot,
                block_size=block_size,
                layer=common_attention,
                dtype=layers.dtype,
                buffers=buffers,
                **layers.heads,
            )
            attention.plan(_idle_rows(block_size))
            graphs = []
            with torch.inference_mode():
                for sharing in self._sharing:
                    self._run(size, sharing, attention)  # libraries choose and load kernels now: not to be captured
                stream.synchronize()
                for sharing in self._sharing:
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    self._run(size, sharing, attention)
                    graph.capture_end()
                    graphs.append(graph)
            return _CapturedStep(attention, graphs)

        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            self._steps = QuickestSizes(sizes, capture=capture, seconds=lambda step: replay_seconds(step.graphs[:1]))
        torch.cuda.synchronize()

    @property
    def num_graphs(self) -> int:
        return sum(len(step.graphs) for step in self._steps.all())

    def serves(self, rows: RowLayout) -> bool:
        num_rows = len(rows.kv_lens)
        return num_rows <= self._steps.largest and int(rows.qo_indptr[-1]) == num_rows

    def forward(self, input_: Tensor, positions_T: Tensor, rows: RowLayout, fences: LayerFences) -> Tensor:
        """Hidden states [T, H] of a step that it `serves`; overwritten by the next call."""
        num_rows = len(rows.kv_lens)
        step = self._steps.serving(num_rows)
        buffers = self._buffers.first(num_rows)
        copy_by_kernel(buffers.input, input_)
        copy_by_kernel(buffers.positions, positions_T)
        step.attention.plan(rows)
        for sharing, graph in zip(self._sharing, step.graphs, strict=True):
            fences.enter(sharing.start)
            graph.replay()
            fences.leave(sharing.start)
            for layer in sharing[1:]:  # no fence of its own stands between these
                fences.enter(layer)
                fences.leave(layer)
        return buffers.output

    def _run(self, size: int, sharing: range, attention: CapturedDecodeAttention) -> None:
        buffers = self._buffers.first(size)
        enter, *between = self._layers.pieces
        if sharing.start == self._stage.layers.start:
            enter(buffers)
        for index in sharing:
            layer = index - self._stage.layers.start
            self._layers.attend_unfenced(layer, buffers, attention, self._pools.device_pool(index))
            between[layer](buffers)


def _idle_rows(block_size: int) -> RowLayout:
    """No rows: all are idle ones."""
    zero, none = torch.zeros(1, dtype=torch.int32).numpy(), torch.zeros(0, dtype=torch.int32).numpy()
    return RowLayout(qo_indptr=zero, kv_lens=none, kv_indptr=zero, kv_indices=none, block_size=block_size)
