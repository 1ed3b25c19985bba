"""`PieceGraphs`: the pieces of `LlamaLayers` captured in CUDA graphs, by number of tokens.

Attention is not captured: it depends on rows and pages, and the fences of the window stand there. So any step of few
enough tokens is served, whatever its rows, and nothing about a graph changes when blocks move.

    replay enter | attend 0 | replay 0 | attend 1 | replay 1 | ...

All graphs share one set of buffers and one memory pool: they run one after another on one stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipemax.worker.attention_hook import StepContext
from pipemax.worker.graph_sizes import QuickestSizes, graph_sizes, replay_seconds
from pipemax.worker.llama_layers import LlamaLayers
from pipemax.worker.upload import copy_by_kernel

# Layers that are timed to tell sizes apart: their weights must not fit the GPU's cache together.
_TIMED_LAYERS = 4


class PieceGraphs:
    """Serves steps of up to `max_tokens` tokens. Captures everything when it is made; only on CUDA."""

    def __init__(self, layers: LlamaLayers, *, max_tokens: int) -> None:
        self._layers = layers
        sizes = graph_sizes(max_tokens)
        self._buffers = layers.buffers(sizes[-1])
        self._buffers.attended.zero_()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.inference_mode(), torch.cuda.stream(stream):
            layers.choose_libraries(sizes)
            self._graphs = QuickestSizes(
                sizes,
                capture=lambda size: self._capture(size, pool, stream),
                seconds=lambda graphs: replay_seconds(graphs[1 : 1 + _TIMED_LAYERS]),
            )
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what ran before captures had memory of that stream, which no other uses

    @property
    def max_tokens(self) -> int:
        return self._graphs.largest

    @property
    def num_graphs(self) -> int:
        return sum(map(len, self._graphs.all()))

    def forward(self, input_: Tensor, positions_T: Tensor, step_context: StepContext) -> Tensor:
        """As `LlamaLayers.forward`. The result is overwritten by the next call."""
        num_tokens = len(positions_T)
        buffers = self._buffers.first(num_tokens)
        copy_by_kernel(buffers.input, input_)
        copy_by_kernel(buffers.positions, positions_T)
        first, *others = self._graphs.serving(num_tokens)
        first.replay()
        for layer, graph in enumerate(others):
            self._layers.attend(layer, buffers, step_context)
            graph.replay()
        return buffers.output

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> list[torch.cuda.CUDAGraph]:
        buffers = self._buffers.first(size)
        for piece in self._layers.pieces:
            piece(buffers)  # libraries choose and load their kernels now, which cannot be captured
        stream.synchronize()
        graphs = []
        for piece in self._layers.pieces:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            piece(buffers)
            graph.capture_end()
            graphs.append(graph)
        return graphs
