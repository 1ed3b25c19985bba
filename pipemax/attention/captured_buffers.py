"""`CapturedBuffers`: where the kernels of captured decode steps find a step's layout, always at the same addresses.

Graphs hold addresses, so what a step's kernels read is brought there before each replay, by one kernel. Never here: how
attention is planned (`captured_plan.py`), its kernels (`captured_decode.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import RowLayout
from pipemax.attention.flashinfer import FlashInferAttention
from pipemax.attention.flashinfer_plan import INT_WORKSPACE_BYTES, KernelInputs
from pipemax.plan import Int32Array
from pipemax.worker.upload import upload_into


@dataclass(frozen=True, slots=True)
class CapturedLayout:
    """Decode rows of a step, filled up to a captured number of them; arrays as those of `RowLayout`."""

    kv_indptr: Int32Array
    last_page_lens: Int32Array
    kv_lens: Int32Array
    kv_indices: Int32Array

    @classmethod
    def of(cls, rows: RowLayout, *, num_rows: int, scratch_slot: int) -> CapturedLayout:
        """`rows` are decode rows, at most `num_rows`. Idle ones behind them have one key each, in `scratch_slot`."""
        idle = num_rows - len(rows.kv_lens)
        assert idle >= 0 and rows.qo_indptr[-1] == len(rows.kv_lens)
        num_pages = len(rows.kv_indices)
        idle_indptr = np.arange(num_pages + 1, num_pages + idle + 1, dtype=np.int32)
        kv_indptr = np.concatenate([rows.kv_indptr, idle_indptr])
        kv_lens = np.concatenate([rows.kv_lens, np.ones(idle, np.int32)])
        return cls(
            kv_indptr=kv_indptr,
            last_page_lens=kv_lens - (np.diff(kv_indptr) - 1) * rows.block_size,
            kv_lens=kv_lens,
            kv_indices=np.concatenate([rows.kv_indices, np.full(idle, scratch_slot, np.int32)]),
        )


class CapturedBuffers:
    """What captured steps of all sizes share: the device reads it in stream order, so one set does.

    One tensor, so that a step's layout comes by one kernel, R being the most rows:

        kv_indptr [R + 1] | last_page_lens [R] | positions [R] | kv_indices [most_pages]
    """

    def __init__(self, backend: FlashInferAttention, *, most_rows: int, most_pages: int) -> None:
        """`backend`: one whose steps run on the same stream; they share its workspace."""
        self.float_workspace = backend.float_workspace
        self.split_workspace = backend.split_workspace
        self.planner = backend.planner
        self.device = device = backend.float_workspace.device
        self._most_rows = most_rows
        self._layout = torch.zeros(3 * most_rows + 1 + most_pages, dtype=torch.int32, device=device)
        self._unread_layout = torch.zeros_like(self._layout)
        self._qo_indptr = torch.arange(most_rows + 1, dtype=torch.int32, device=device)
        # Of the sizes that are planned anew for each step.
        self.int_workspace = torch.zeros(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def read_by(self, num_rows: int, *, int_workspace: Tensor) -> KernelInputs:
        """What the kernels of steps of that size read, and their plan."""
        return self._inputs(self._layout, int_workspace, self._qo_indptr[: num_rows + 1])

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

    def fill(self, rows: CapturedLayout) -> None:
        """What the next replay reads."""
        most_rows, num_rows = self._most_rows, len(rows.kv_lens)
        packed = np.zeros(3 * most_rows + 1 + len(rows.kv_indices), np.int32)
        assert len(packed) <= len(self._layout), "more pages than there are slots"
        packed[: num_rows + 1] = rows.kv_indptr
        packed[most_rows + 1 :][:num_rows] = rows.last_page_lens
        packed[2 * most_rows + 1 :][:num_rows] = rows.kv_lens - 1
        packed[3 * most_rows + 1 :] = rows.kv_indices
        upload_into(self._layout[: len(packed)], packed)
