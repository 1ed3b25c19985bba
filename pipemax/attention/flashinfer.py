"""Paged attention by FlashInfer on CUDA: prefill, decode and mixed rows through one paged prefill kernel (fa2).

    plan(rows)      layout to the device, without a wait
    run, layer l    the library's plan for (sliding window, soft cap, scaling), if this step has none; then its kernel

A kernel variant that FlashInfer cannot load here (no compiler, or not for this head size, window or soft cap), and
attention sinks, are served by the torch reference for those layers, and only those.

Planning ends with copies up the link, which would stand behind the window's refill with everything after them. So the
library plans on a stream of its own, into memory that nothing reads, and kernels bring what it made (`upload.py`):

    plans' stream   | copies, whenever the engine comes to them |
    compute         | kernel: the plan from pinned memory | step ...

Never here: fences, copies, which backend is used (`stage_process.py`).

Shape letters as in `base`.
"""

from __future__ import annotations

import builtins
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.reference import ReferenceAttention
from pipemax.worker.upload import copy_by_kernel, mapped, upload, upload_into

_KERNEL = "fa2"
_FLOAT_WORKSPACE_BYTES = 256 * 1024**2
_INT_WORKSPACE_BYTES = 8 * 1024**2
# Plans that may be under way at once; more steps than this are never issued ahead of the device.
_NUM_TURNS = 4
# A plan of some hundred rows is a few kilobytes of int32; a larger one is noticed, and copied whole.
_PLAN_WORDS = 32 * 1024
_UNTOUCHED = 0x5A5A5A5A
_UNTOUCHED_WORDS = 64

_logger = logging.getLogger(__name__)

_Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]


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
class _KernelInputs:
    """What the library's kernels read, int32 on the device; or memory like it that its plan may write into."""

    int_workspace: Tensor
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_lens: Tensor

    def give_to(self, wrapper: Any) -> None:
        wrapper._int_workspace_buffer = self.int_workspace
        wrapper._qo_indptr_buf = self.qo_indptr
        wrapper._paged_kv_indptr_buf = self.kv_indptr
        wrapper._paged_kv_indices_buf = self.kv_indices
        wrapper._paged_kv_last_page_len_buf = self.last_page_lens


class _Turn:
    """Pinned memory of one plan. `copied`: the library's own copy out of it is done; `read`: so is ours."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.words = mapped(self.pinned, device)
        self.copied, self.read = (torch.cuda.Event(blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._guard = self.pinned.view(torch.int32)[_PLAN_WORDS - _UNTOUCHED_WORDS : _PLAN_WORDS]
        self._guard.fill_(_UNTOUCHED)

    @property
    def num_words(self) -> int:
        """What to copy so that the plan is in it: plans are written from the beginning."""
        return _PLAN_WORDS if bool((self._guard == _UNTOUCHED).all()) else self.words.numel()


class _Planner:
    """Has the library plan beside the stream that computes; see the module."""

    def __init__(self, device: torch.device) -> None:
        self._turns = [_Turn(device) for _ in range(_NUM_TURNS)]
        self._next_turn = 0
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.unread_workspace = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan(self, wrapper: Any, *arguments: Any, read: _KernelInputs, **options: Any) -> None:
        """As the wrapper's `plan`; its kernels then read `read`, of which this fills the workspace.

        What else the library's plan writes to is the wrapper's, and nothing reads it.
        """
        turn = self._turns[self._next_turn]
        self._next_turn = (self._next_turn + 1) % _NUM_TURNS
        turn.copied.synchronize()
        turn.read.synchronize()
        wrapper._int_workspace_buffer = self.unread_workspace
        wrapper._pin_memory_int_workspace_buffer = turn.pinned
        with torch.cuda.stream(self._stream):
            wrapper.plan(*arguments, **options)
            turn.copied.record()
        num_words = turn.num_words
        copy_by_kernel(read.int_workspace.view(torch.int32)[:num_words], turn.words[:num_words])
        turn.read.record()
        read.give_to(wrapper)


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
        _make_maximum_fast(flashinfer.prefill)
        self._library = flashinfer
        self._device = device
        self._dtype = dtype
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self.float_workspace = torch.empty(_FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.planner = _Planner(device)
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
                self._library.prefill.get_batch_prefill_module(_KERNEL, *arguments, *kind, False)
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
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self.float_workspace, "NHD", backend=_KERNEL)
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
            read=_KernelInputs(
                int_workspace=self._int_workspaces[variant],
                qo_indptr=rows.qo_indptr,
                kv_indptr=rows.kv_indptr,
                kv_indices=rows.kv_indices,
                last_page_lens=rows.last_page_lens,
            ),
        )
        return wrapper


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

        _make_maximum_fast(flashinfer.prefill)
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
            backend=_KERNEL,
            use_cuda_graph=True,
            qo_indptr_buf=self._unread.qo_indptr,
            paged_kv_indptr_buf=self._unread.kv_indptr,
            paged_kv_indices_buf=self._unread.kv_indices,
            paged_kv_last_page_len_buf=self._unread.last_page_lens,
        )

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
            _pinned(kv_indptr),
            self._read.kv_indices[: len(kv_indices)],  # of these the plan wants the number
            _pinned(last_page_lens),
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
        self._int_workspace = torch.zeros(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def read_by(self, num_rows: int) -> _KernelInputs:
        """What the kernels of steps of that size read."""
        return self._inputs(self._layout, self._int_workspace, self._qo_indptr[: num_rows + 1])

    def unread(self, num_rows: int) -> _KernelInputs:
        """What a plan of that size may write into."""
        qo_indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=self.device)
        return self._inputs(self._unread_layout, self.planner.unread_workspace, qo_indptr)

    def _inputs(self, layout: Tensor, int_workspace: Tensor, qo_indptr: Tensor) -> _KernelInputs:
        num_rows, most_rows = len(qo_indptr) - 1, self._most_rows
        return _KernelInputs(
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
        qo_indptr_host=_pinned(rows.qo_indptr),
        kv_indptr_host=_pinned(rows.kv_indptr),
        last_page_lens_host=_pinned(last_page_lens),
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        last_page_lens=device_last_page_lens,
        kv_indices=kv_indices,
        batch_indices=device_batch_indices,
        positions=device_positions,
        most_new_tokens=int(new_tokens.max()),
    )


def _pinned(array: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).pin_memory()


def _make_maximum_fast(module: Any) -> None:
    """Up to 0.7.0 the library's plan calls Python's `max` on tensors: element by element, milliseconds a step.

    Gives that module a `max` of its own, which asks a tensor for its maximum. Harmless in later versions.
    """

    def maximum(*arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and not options and isinstance(arguments[0], Tensor):
            return arguments[0].max()
        return builtins.max(*arguments, **options)

    module.max = maximum
