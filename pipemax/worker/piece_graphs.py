"""`PieceGraphs`: the pieces of `LlamaLayers` captured in CUDA graphs, by number of tokens.

Attention is not captured: it depends on rows and pages, and the fences of the window stand there. So any step of few
enough tokens is served, whatever its rows, and nothing about a graph changes when blocks move.

    replay enter | attend 0 | replay 0 | attend 1 | replay 1 | ...

All graphs share one set of buffers and one memory pool: they run one after another on one stream.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from pipemax.worker.attention_hook import StepContext
from pipemax.worker.llama_layers import LlamaLayers
from pipemax.worker.upload import copy_by_kernel


def graph_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens that are captured, up to 1,024: steps of an eighth to a half, since idle rows cost little."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64)]
    sizes += range(512, 1025, 128)
    return [*(size for size in sizes if size < max_tokens), min(max_tokens, sizes[-1])]


class PieceGraphs:
    """Serves steps of up to `max_tokens` tokens. Captures everything when it is made; only on CUDA."""

    def __init__(self, layers: LlamaLayers, *, max_tokens: int) -> None:
        self._layers = layers
        self._sizes = graph_sizes(max_tokens)
        self._buffers = layers.buffers(self._sizes[-1])
        self._buffers.attended.zero_()
        self._graphs_of: dict[int, list[torch.cuda.CUDAGraph]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.inference_mode(), torch.cuda.stream(stream):
            # The largest first: the smaller ones then find their memory in the pool.
            for size in reversed(self._sizes):
                self._graphs_of[size] = self._capture(size, pool, stream)
        torch.cuda.synchronize()

    @property
    def max_tokens(self) -> int:
        return self._sizes[-1]

    @property
    def num_graphs(self) -> int:
        return sum(len(graphs) for graphs in self._graphs_of.values())

    def forward(self, input_: Tensor, positions_T: Tensor, step_context: StepContext) -> Tensor:
        """As `LlamaLayers.forward`. The result is overwritten by the next call."""
        num_tokens = len(positions_T)
        buffers = self._buffers.first(num_tokens)
        copy_by_kernel(buffers.input, input_)
        copy_by_kernel(buffers.positions, positions_T)
        first, *others = self._graphs_of[self._sizes[bisect.bisect_left(self._sizes, num_tokens)]]
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
