"""`GemmTimer`: what GEMMs of captured steps take in one of torch's BLAS libraries, on the GPU that holds the weights.

They are timed as they will run: from a CUDA graph, over weights of one layer after another, since what a layer reads
has left the GPU's cache when the layer comes again. Never here: what follows from it (`gemm_library.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipemax.worker.gemm_library import BlasLibrary, Gemm, computing_in
from pipemax.worker.graph_sizes import replay_seconds

# Weights that a replay reads: far more than fits a cache, some tenths of a millisecond.
_TIMED_BYTES = 768 * 1024**2
# From about so many tokens on a GEMM takes as long as its arithmetic, not as reading its weight; then fewer will do.
_ARITHMETIC_TOKENS = 256


class GemmTimer:
    """Captures on the current stream, in inference mode. What it computes with and into is there as long as it is."""

    def __init__(self, gemms: Sequence[Gemm], *, most_tokens: int) -> None:
        most_outputs, most_inputs = (max(gemm.weight.shape[side] for gemm in gemms) for side in (0, 1))
        self._x = gemms[0].weight.new_ones(most_tokens * most_inputs)
        self._out = gemms[0].weight.new_empty(most_tokens * most_outputs)

    def seconds(self, gemms: Sequence[Gemm], num_tokens: int, library: BlasLibrary) -> float:
        """Of some of these, as many for the one library as for the other. All have one shape."""
        timed = gemms[: num_timed(gemms[0].weight, num_tokens)]
        num_outputs, num_inputs = gemms[0].weight.shape
        x = self._x[: num_tokens * num_inputs].view(num_tokens, num_inputs)
        out = self._out[: num_tokens * num_outputs].view(num_tokens, num_outputs)
        graph = torch.cuda.CUDAGraph()
        with computing_in(library):
            timed[0](x, out)  # the library chooses and loads its kernel now, which cannot be captured
            torch.cuda.current_stream().synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            for gemm in timed:
                gemm(x, out)
            graph.capture_end()
        return replay_seconds([graph])


def num_timed(weight: Tensor, num_tokens: int) -> int:
    """How many weights like this one a replay is to read, for the time that it takes."""
    work_bytes = weight.numel() * weight.element_size() * max(1.0, num_tokens / _ARITHMETIC_TOKENS)
    return math.ceil(_TIMED_BYTES / work_bytes)
