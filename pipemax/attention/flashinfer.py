"""Paged attention by FlashInfer on CUDA: prefill, decode and mixed rows through one paged prefill kernel (fa2).

    plan(rows)      layout to the device, without a wait
    run, layer l    the library's plan for (sliding window, soft cap, scaling), if this step has none; then its kernel

A kernel variant that FlashInfer cannot load here (no compiler, or not for this head size, window or soft cap), and
attention sinks, are served by the torch reference for those layers, and only those.

Never here: how the library plans (`flashinfer_plan.py`), steps from CUDA graphs (`captured_decode.py`), fences, copies,
which backend is used (`stage_process.py`).

Shape letters as in `base`.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.flashinfer_plan import KERNEL, KernelInputs, Planner, make_maximum_fast, pinned_ints
from pipemax.attention.reference import ReferenceAttention
from pipemax.worker.upload import upload

_FLOAT_WORKSPACE_BYTES = 256 * 1024**2

_logger = logging.getLogger(__name__)


def is_available() -> bool:
    """Whether FlashInfer is installed."""
    return importlib.util.find_spec("flashinfer") is not None


@dataclass(frozen=True, slots=True)
class _Variant:
    """What the library's plan depends on beside the rows. `window_left`: -1 for all keys; `soft_cap`: 0 for none."""

    window_left: int
    soft_cap: float
    scaling: float


@dataclass(frozen=True, slots=True)
class _DeviceRows:
    """The layout as the library wants it: int32, on the host (pinned) what it plans with, on the device what it reads.

    batch_indices, positions   [T] row and place of each new token
    """

    qo_indptr_host: Tensor
    kv_indptr_host: Tensor
    last_page_lens_host: Tensor
    qo_indptr: Tensor
    kv_indptr: Tensor
    last_page_lens: Tensor
    kv_indices: Tensor
    batch_indices: Tensor
    positions: Tensor
    most_new_tokens: int


class FlashInferAttention:
    """AttentionBackend for bfloat16 and float16 on one GPU."""

    def __init__(
        self, *, device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        import flashinfer

        assert dtype in (torch.bfloat16, torch.float16)
        make_maximum_fast(flashinfer.prefill)
        self._library = flashinfer
        self._device = device
        self._dtype = dtype
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self.float_workspace = torch.empty(_FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.planner = Planner(device)
        self._wrappers: dict[_Variant, Any] = {}
        self._int_workspaces: dict[_Variant, Tensor] = {}
        self._kernel_loads: dict[tuple[bool, bool], bool] = {}
        self._reference = ReferenceAttention(device)
        self._reference_is_planned = False
        self._rows: RowLayout | None = None
        self._device_rows: _DeviceRows | None = None
        self._planned: dict[_Variant, Any] = {}

    def plan(self, rows: RowLayout) -> None:
        self._rows = rows
        self._device_rows = _to_device(rows, self._device)
        self._planned = {}
        self._reference_is_planned = False

    def append(self, key_THD: Tensor, value_THD: Tensor, kv_pool: Tensor) -> None:
        rows = self._device_rows
        assert rows is not None
        self._library.append_paged_kv_cache(
            key_THD,
            value_THD,
            rows.batch_indices,
            rows.positions,
            kv_pool,
            rows.kv_indices,
            rows.kv_indptr,
            rows.last_page_lens,
        )

    def run(self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None = None) -> Tensor:
        """`out_THD`: where the result goes, if given; [T, Hq, D], contiguous."""
        if not self.serves(layer):
            return self._run_reference(query_THD, kv_pool, layer, out_THD)
        window_left = -1 if layer.sliding_window is None else layer.sliding_window - 1
        variant = _Variant(window_left, layer.soft_cap or 0.0, layer.scaling)
        wrapper = self._planned.get(variant)
        if wrapper is None:
            wrapper = self._planned[variant] = self._plan(variant)
        if out_THD is None:
            out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        wrapper.run(query_THD, kv_pool, out=out_THD)
        return out_THD

    def _run_reference(
        self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None
    ) -> Tensor:
        assert self._rows is not None
        if not self._reference_is_planned:
            self._reference.plan(self._rows)
            self._reference_is_planned = True
        output_THD = self._reference.run(query_THD, kv_pool, layer)
        return output_THD if out_THD is None else out_THD.copy_(output_THD)

    def serves(self, layer: LayerAttention) -> bool:
        """Whether the library's kernels serve such a layer here, rather than the reference."""
        return layer.sinks is None and self._loads(layer.sliding_window is not None, layer.soft_cap is not None)

    def _loads(self, has_window: bool, has_soft_cap: bool) -> bool:
        """Whether the kernel of this kind can be had here. Tried once: it may be compiled now."""
        kind = (has_window, has_soft_cap)
        if kind not in self._kernel_loads:
            arguments = (self._dtype, self._dtype, self._dtype, torch.int32, self._head_dim, self._head_dim, 0)
            try:
                self._library.prefill.get_batch_prefill_module(KERNEL, *arguments, *kind, False)
            except Exception as error:  # the compiler's, the loader's, the library's: whatever it is, it is not there
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                _logger.warning(
                    "no FlashInfer kernel for head size %d, window %s, soft cap %s here, torch attention is used: %s",
                    self._head_dim,
                    *kind,
                    reason,
                )
                self._kernel_loads[kind] = False
            else:
                self._kernel_loads[kind] = True
        return self._kernel_loads[kind]

    def _plan(self, variant: _Variant) -> Any:
        rows, layout = self._device_rows, self._rows
        assert rows is not None and layout is not None
        if variant not in self._wrappers:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self.float_workspace, "NHD", backend=KERNEL)
            self._wrappers[variant] = wrapper
            self._int_workspaces[variant] = wrapper._int_workspace_buffer
        wrapper = self._wrappers[variant]
        self.planner.plan(
            wrapper,
            rows.qo_indptr_host,
            rows.kv_indptr_host,
            rows.kv_indices,
            rows.last_page_lens_host,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            layout.block_size,
            causal=True,
            sm_scale=variant.scaling,
            window_left=variant.window_left,
            logits_soft_cap=variant.soft_cap,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            max_token_per_sequence=rows.most_new_tokens,
            read=KernelInputs(
                int_workspace=self._int_workspaces[variant],
                qo_indptr=rows.qo_indptr,
                kv_indptr=rows.kv_indptr,
                kv_indices=rows.kv_indices,
                last_page_lens=rows.last_page_lens,
            ),
        )
        return wrapper


def _to_device(rows: RowLayout, device: torch.device) -> _DeviceRows:
    new_tokens = np.diff(rows.qo_indptr)
    num_pages = np.diff(rows.kv_indptr)
    assert (new_tokens > 0).all() and (rows.kv_lens >= new_tokens).all(), "every row has new tokens"
    assert (num_pages == -(-rows.kv_lens // rows.block_size)).all(), "page table and key count disagree"
    last_page_lens = (rows.kv_lens - (num_pages - 1) * rows.block_size).astype(np.int32)
    num_rows, num_tokens = len(new_tokens), int(rows.qo_indptr[-1])
    batch_indices = np.repeat(np.arange(num_rows, dtype=np.int32), new_tokens)
    shift = np.repeat(rows.kv_lens - new_tokens - rows.qo_indptr[:-1], new_tokens)
    positions = np.arange(num_tokens, dtype=np.int32) + shift.astype(np.int32)
    # One copy for all of them.
    packed = upload(
        np.concatenate(
            [rows.qo_indptr, rows.kv_indptr, last_page_lens, rows.kv_indices, batch_indices, positions]
        ).astype(np.int32),
        device,
    )
    ends = np.cumsum([num_rows + 1, num_rows + 1, num_rows, len(rows.kv_indices), num_tokens]).tolist()
    qo_indptr, kv_indptr, device_last_page_lens, kv_indices, device_batch_indices, device_positions = (
        packed.tensor_split(ends)
    )
    return _DeviceRows(
        qo_indptr_host=pinned_ints(rows.qo_indptr),
        kv_indptr_host=pinned_ints(rows.kv_indptr),
        last_page_lens_host=pinned_ints(last_page_lens),
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        last_page_lens=device_last_page_lens,
        kv_indices=kv_indices,
        batch_indices=device_batch_indices,
        positions=device_positions,
        most_new_tokens=int(new_tokens.max()),
    )
