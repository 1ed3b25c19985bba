"""`CapturedDecodeAttention`: FlashInfer's paged attention for decode steps from CUDA graphs.

Graphs hold addresses, so all that a step's kernels read is brought to the same place before each replay. Never here:
what is captured beside attention, and when (`decode_graphs.py`); steps that are not captured (`flashinfer.py`).

Shape letters as in `base`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.flashinfer import FlashInferAttention
from pipemax.attention.flashinfer_plan import INT_WORKSPACE_BYTES, KERNEL, KernelInputs, make_maximum_fast, pinned_ints
from pipemax.worker.upload import upload_into

_Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]


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
        self._read = buffers.read_by(num_rows)
        self._unread = buffers.unread(num_rows)
        self._plan_options = {
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
        }
        self._batch_indices = torch.arange(num_rows, dtype=torch.int32, device=buffers.device)
        self._qo_indptr_host = torch.arange(num_rows + 1, dtype=torch.int32).pin_memory()
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            buffers.float_workspace,
            "NHD",
            backend=KERNEL,
            use_cuda_graph=True,
            qo_indptr_buf=self._unread.qo_indptr,
            paged_kv_indptr_buf=self._unread.kv_indptr,
            paged_kv_indices_buf=self._unread.kv_indices,
            paged_kv_last_page_len_buf=self._unread.last_page_lens,
        )
        self._unread.give_to(self._wrapper)  # in place of a workspace of its own: there is a wrapper for each size

    def plan(self, rows: RowLayout) -> None:
        """`rows` are decode rows, at most the captured number of them."""
        idle = self._num_rows - len(rows.kv_lens)
        assert idle >= 0 and rows.qo_indptr[-1] == len(rows.kv_lens)
        num_pages = len(rows.kv_indices)
        kv_indptr = np.concatenate([rows.kv_indptr, np.arange(num_pages + 1, num_pages + idle + 1)])
        kv_lens = np.concatenate([rows.kv_lens, np.ones(idle, np.int32)])
        last_page_lens = kv_lens - (np.diff(kv_indptr) - 1) * rows.block_size
        kv_indices = np.concatenate([rows.kv_indices, np.full(idle, self._scratch_slot, np.int32)])
        self._buffers.fill(kv_indptr, last_page_lens, kv_lens - 1, kv_indices)
        self._unread.give_to(self._wrapper)
        self._buffers.planner.plan(
            self._wrapper,
            self._qo_indptr_host,
            pinned_ints(kv_indptr),
            self._read.kv_indices[: len(kv_indices)],  # of these the plan wants the number
            pinned_ints(last_page_lens),
            seq_lens=pinned_ints(kv_lens),
            **self._plan_options,
            read=self._read,
        )

    def append(self, key_THD: Tensor, value_THD: Tensor, kv_pool: Tensor) -> None:
        self._library.append_paged_kv_cache(
            key_THD,
            value_THD,
            self._batch_indices,
            self._buffers.positions(self._num_rows),
            kv_pool,
            self._read.kv_indices,
            self._read.kv_indptr,
            self._read.last_page_lens,
        )

    def run(self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None = None) -> Tensor:
        if out_THD is None:
            out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        self._wrapper.run(query_THD, kv_pool, out=out_THD)
        return out_THD


class CapturedBuffers:
    """What `CapturedDecodeAttention`s of all sizes share: the device reads it in stream order, so one set does.

    One tensor, so that a step's layout comes by one kernel, R being the most rows:

        kv_indptr [R + 1] | last_page_lens [R] | positions [R] | kv_indices [most_pages]
    """

    def __init__(self, backend: FlashInferAttention, *, most_rows: int, most_pages: int) -> None:
        """`backend`: one whose steps run on the same stream; they share its workspace."""
        self.float_workspace = backend.float_workspace
        self.planner = backend.planner
        self.device = device = backend.float_workspace.device
        self._most_rows = most_rows
        self._layout = torch.zeros(3 * most_rows + 1 + most_pages, dtype=torch.int32, device=device)
        self._unread_layout = torch.zeros_like(self._layout)
        self._qo_indptr = torch.arange(most_rows + 1, dtype=torch.int32, device=device)
        self._int_workspace = torch.zeros(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def read_by(self, num_rows: int) -> KernelInputs:
        """What the kernels of steps of that size read."""
        return self._inputs(self._layout, self._int_workspace, self._qo_indptr[: num_rows + 1])

    def unread(self, num_rows: int) -> KernelInputs:
        """What a plan of that size may write into."""
        qo_indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=self.device)
        return self._inputs(self._unread_layout, self.planner.unread_workspace, qo_indptr)

    def _inputs(self, layout: Tensor, int_workspace: Tensor, qo_indptr: Tensor) -> KernelInputs:
        num_rows, most_rows = len(qo_indptr) - 1, self._most_rows
        return KernelInputs(
            int_workspace=int_workspace,
            qo_indptr=qo_indptr,
            kv_indptr=layout[: num_rows + 1],
            last_page_lens=layout[most_rows + 1 :][:num_rows],
            kv_indices=layout[3 * most_rows + 1 :],
        )

    def positions(self, num_rows: int) -> Tensor:
        """Place of each row's new token, [num_rows]."""
        return self._layout[2 * self._most_rows + 1 :][:num_rows]

    def fill(self, kv_indptr: _Ints, last_page_lens: _Ints, positions: _Ints, kv_indices: _Ints) -> None:
        """Layout of a step's rows."""
        most_rows = self._most_rows
        packed = np.zeros(3 * most_rows + 1 + len(kv_indices), np.int32)
        assert len(packed) <= len(self._layout), "more pages than there are slots"
        packed[: len(kv_indptr)] = kv_indptr
        packed[most_rows + 1 :][: len(last_page_lens)] = last_page_lens
        packed[2 * most_rows + 1 :][: len(positions)] = positions
        packed[3 * most_rows + 1 :] = kv_indices
        upload_into(self._layout[: len(packed)], packed)
