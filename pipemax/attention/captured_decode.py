"""`CapturedDecodeAttention`: FlashInfer's paged attention for decode steps from CUDA graphs.

Graphs hold addresses, so all that a step's kernels read is brought to the same place before each replay
(`captured_buffers.py`). Never here: what is captured beside attention, and when (`decode_graphs.py`); which steps are
planned anew (`captured_plan.py`); steps that are not captured (`flashinfer.py`).

Shape letters as in `base`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.captured_buffers import CapturedBuffers, CapturedLayout
from pipemax.attention.captured_plan import captured_plan
from pipemax.attention.flashinfer_plan import make_maximum_fast


class CapturedDecodeAttention:
    """AttentionBackend for decode steps of one size, whose `append` and `run` are captured in CUDA graphs.

    `plan` comes before each replay and only refills buffers: where they are, and the kernels' grid, stay as captured.
    A step of fewer rows is filled up with idle ones, each with one key in `scratch_slot`, which belongs to no request.
    Several of these share `buffers` and run one after another on one stream.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        scratch_slot: int,
        block_size: int,
        layer: LayerAttention,
        dtype: torch.dtype,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        buffers: CapturedBuffers,
    ) -> None:
        import flashinfer

        make_maximum_fast(flashinfer.prefill)
        self._library = flashinfer
        self._num_rows = num_rows
        self._scratch_slot = scratch_slot
        self._buffers = buffers
        self._batch_indices = torch.arange(num_rows, dtype=torch.int32, device=buffers.device)
        self._plan = captured_plan(
            buffers,
            num_rows,
            {
                "num_qo_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim_qk": head_dim,
                "page_size": block_size,
                "causal": True,
                "sm_scale": layer.scaling,
                "window_left": -1 if layer.sliding_window is None else layer.sliding_window - 1,
                "logits_soft_cap": layer.soft_cap or 0.0,
                "q_data_type": dtype,
                "kv_data_type": dtype,
                "max_token_per_sequence": 1,
            },
        )

    def plan(self, rows: RowLayout) -> None:
        """`rows` are decode rows, at most the captured number of them."""
        layout = CapturedLayout.of(rows, num_rows=self._num_rows, scratch_slot=self._scratch_slot)
        self._buffers.fill(layout)
        self._plan.renew(layout)

    def append(self, key_THD: Tensor, value_THD: Tensor, kv_pool: Tensor) -> None:
        read = self._plan.read
        self._library.append_paged_kv_cache(
            key_THD,
            value_THD,
            self._batch_indices,
            self._buffers.positions(self._num_rows),
            kv_pool,
            read.kv_indices,
            read.kv_indptr,
            read.last_page_lens,
        )

    def run(self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None = None) -> Tensor:
        if out_THD is None:
            out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        self._plan.wrapper.run(query_THD, kv_pool, out=out_THD)
        return out_THD
