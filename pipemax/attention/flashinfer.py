"""Paged attention by FlashInfer on CUDA: prefill, decode and mixed rows through one paged prefill kernel (fa2).

    plan(rows)      layout to the device, without a wait
    run, layer l    the library's plans for (sliding window, soft cap, scaling), if this step has none; then its kernels

Decode rows and long chunks of a mixed step are planned, and run, apart: the library chooses one tile of queries for all
rows of a plan, and what suits a chunk makes a decode row compute eight times what it needs. (Short chunks run faster
beside the decode rows: by themselves they leave most of the GPU idle.) With PIPEMAX_MIXED_ATTENTION=together in the
environment all rows are planned together, to be compared.

A kernel variant that FlashInfer cannot load here (no compiler, or not for this head size, window or soft cap), and
attention sinks, are served by the torch reference for those layers, and only those.

Never here: how the library plans (`flashinfer_plan.py`), steps from CUDA graphs (`captured_decode.py`), fences, copies,
which backend is used (`stage_process.py`).

Shape letters as in `base`.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.flashinfer_plan import (
    KERNEL,
    KernelInputs,
    Planner,
    SplitWorkspace,
    make_maximum_fast,
    pinned_ints,
)
from pipemax.attention.reference import ReferenceAttention
from pipemax.plan import Int32Array
from pipemax.worker.chosen_path import chosen_path
from pipemax.worker.upload import upload

# At least that much: enough for captured steps of models with few heads.
_LEAST_FLOAT_WORKSPACE_BYTES = 128 * 1024**2

# Of chunks beside decode rows: from here on two kernels take less time than one (`benchmarks/mixed_attention.py`).
LEAST_TOKENS_APART = 512

MIXED_VARIABLE = "PIPEMAX_MIXED_ATTENTION"

_logger = logging.getLogger(__name__)


class MixedAttention(enum.StrEnum):
    """See the module."""

    APART = "apart"
    TOGETHER = "together"


@functools.cache
def mixed_attention() -> MixedAttention:
    """What the environment says, for good. Raises ConfigError for a value that is none."""
    return chosen_path(MIXED_VARIABLE, MixedAttention.APART)


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
class _Group:
    """Rows in a row that are planned together: int32, on the host (pinned) what the library plans with, on the device
    what its kernels read. `tokens`: the step's new tokens that are theirs."""

    tokens: slice
    qo_indptr_host: Tensor
    kv_indptr_host: Tensor
    last_page_lens_host: Tensor
    kv_lens_host: Tensor
    qo_indptr: Tensor
    kv_indptr: Tensor
    last_page_lens: Tensor
    kv_indices: Tensor
    most_new_tokens: int


@dataclass(frozen=True, slots=True)
class _DeviceRows:
    """The layout of all rows as the library wants it, int32 on the device, and the groups they are planned in.

    batch_indices, positions   [T] row and place of each new token
    """

    kv_indptr: Tensor
    last_page_lens: Tensor
    kv_indices: Tensor
    batch_indices: Tensor
    positions: Tensor
    groups: tuple[_Group, ...]


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
        self.split_workspace = SplitWorkspace(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count,
        )
        workspace_bytes = max(_LEAST_FLOAT_WORKSPACE_BYTES, self.split_workspace.any_rows_bytes)
        self.float_workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        self.planner = Planner(device)
        # For each group of a step, as `_planned` has them.
        self._wrappers: dict[tuple[_Variant, int], Any] = {}
        self._int_workspaces: dict[tuple[_Variant, int], Tensor] = {}
        self._kernel_loads: dict[tuple[bool, bool], bool] = {}
        self._reference = ReferenceAttention(device)
        self._reference_is_planned = False
        self._rows: RowLayout | None = None
        self._device_rows: _DeviceRows | None = None
        self._planned: dict[_Variant, list[Any]] = {}

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
        rows = self._device_rows
        assert rows is not None
        wrappers = self._planned.get(variant)
        if wrappers is None:
            wrappers = [self._plan(variant, index, group) for index, group in enumerate(rows.groups)]
            self._planned[variant] = wrappers
        if out_THD is None:
            out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        for wrapper, group in zip(wrappers, rows.groups, strict=True):
            wrapper.run(query_THD[group.tokens], kv_pool, out=out_THD[group.tokens])
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

    def _plan(self, variant: _Variant, index: int, rows: _Group) -> Any:
        layout = self._rows
        assert layout is not None
        key = (variant, index)
        if key not in self._wrappers:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self.float_workspace, "NHD", backend=KERNEL)
            self._wrappers[key] = wrapper
            self._int_workspaces[key] = wrapper._int_workspace_buffer
        wrapper = self._wrappers[key]
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
            seq_lens=rows.kv_lens_host,
            max_token_per_sequence=rows.most_new_tokens,
            read=KernelInputs(
                int_workspace=self._int_workspaces[key],
                qo_indptr=rows.qo_indptr,
                kv_indptr=rows.kv_indptr,
                kv_indices=rows.kv_indices,
                last_page_lens=rows.last_page_lens,
            ),
        )
        return wrapper


def _group_ends(new_tokens: Int32Array) -> list[int]:
    """Where groups of rows begin and end: decode rows, which come first, and the others; or all of them together."""
    num_rows = len(new_tokens)
    is_chunk = new_tokens > 1
    num_decode = int(is_chunk.argmax()) if is_chunk.any() else num_rows
    chunk_tokens = int(new_tokens[num_decode:].sum())
    if not num_decode or chunk_tokens < LEAST_TOKENS_APART or mixed_attention() is MixedAttention.TOGETHER:
        return [0, num_rows]
    return [0, num_decode, num_rows]


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
    ends = _group_ends(new_tokens)
    spans = [slice(first, last + 1) for first, last in itertools.pairwise(ends)]
    indptrs = [array[span] - array[span.start] for span in spans for array in (rows.qo_indptr, rows.kv_indptr)]
    # One copy for all of them.
    arrays = [rows.kv_indptr, last_page_lens, rows.kv_indices, batch_indices, positions, *indptrs]
    packed = upload(np.concatenate(arrays).astype(np.int32), device)
    kv_indptr, device_last_page_lens, kv_indices, device_batch_indices, device_positions, *device_indptrs = (
        packed.tensor_split(np.cumsum([len(array) for array in arrays[:-1]]).tolist())
    )
    groups = []
    for number, (first, last) in enumerate(itertools.pairwise(ends)):
        tokens = slice(int(rows.qo_indptr[first]), int(rows.qo_indptr[last]))
        pages = slice(int(rows.kv_indptr[first]), int(rows.kv_indptr[last]))
        groups.append(
            _Group(
                tokens=tokens,
                qo_indptr_host=pinned_ints(indptrs[2 * number]),
                kv_indptr_host=pinned_ints(indptrs[2 * number + 1]),
                last_page_lens_host=pinned_ints(last_page_lens[first:last]),
                kv_lens_host=pinned_ints(rows.kv_lens[first:last]),
                qo_indptr=device_indptrs[2 * number],
                kv_indptr=device_indptrs[2 * number + 1],
                last_page_lens=device_last_page_lens[first:last],
                kv_indices=kv_indices[pages],
                most_new_tokens=int(new_tokens[first:last].max()),
            )
        )
    return _DeviceRows(
        kv_indptr=kv_indptr,
        last_page_lens=device_last_page_lens,
        kv_indices=kv_indices,
        batch_indices=device_batch_indices,
        positions=device_positions,
        groups=tuple(groups),
    )
