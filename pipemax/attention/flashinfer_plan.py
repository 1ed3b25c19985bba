"""`Planner`: has FlashInfer plan a step's attention without standing behind the window's refill.

The library's plan ends with copies up the link, in the current stream. There they would stand in the engine's queue
behind the refill, and everything after them too. So it plans on a stream of its own, into memory that nothing reads,
and a kernel brings what it made (`upload.py`):

    plans' stream   | copies, whenever the engine comes to them |
    compute         | kernel: the plan from pinned memory | step ...

Nobody waits for those copies: while the link is busy they may take several steps. Nor may the library do so, which is
why all that it copies from is pinned (the driver waits for a stream before it copies from other memory).

Also what is particular to the library and concerns whoever calls it. Never here: attention (`flashinfer.py`,
`captured_decode.py`), how captured steps are planned (`captured_plan.py`).
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipemax.worker.upload import copy_by_kernel, mapped

KERNEL = "fa2"
INT_WORKSPACE_BYTES = 8 * 1024**2
# Of the library's planner: blocks on a multiprocessor, for rows whose keys are split among several.
_BLOCKS_PER_MULTIPROCESSOR = 2
# Plans that may be under way at once; more steps than half of this, of two plans each, are never issued ahead.
_NUM_TURNS = 8
# A plan of some hundred rows is a few kilobytes of int32; a larger one is noticed, and copied whole.
_PLAN_WORDS = 32 * 1024
_ALIGNMENT_BYTES = 16
_LONG_ROW = 128
_UNTOUCHED = 0x5A5A5A5A
_UNTOUCHED_WORDS = 64


@dataclass(frozen=True, slots=True)
class KernelInputs:
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


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """Bytes of float workspace that the library's plans may ask for: where keys of one row are split, partial results.

    It keeps one for each query head and tile of queries, in float32 with the sum of their weights, whether the tile is
    full or not.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_multiprocessors: int

    @property
    def any_rows_bytes(self) -> int:
        """For any rows, planned outside graphs: keys are split into as many tiles as run at once, or not at all."""
        return self._bytes(self._tiles_at_once, tile=self._tile(_LONG_ROW))

    def captured_bytes(self, num_rows: int) -> int:
        """For up to that many decode rows in the library's mode for graphs: whatever their keys will be, so there are
        tiles for all."""
        tile = self._tile(self._group)
        num_tiles = -(-num_rows * self._group // tile) + num_rows - 1
        return self._bytes(max(self._tiles_at_once, num_tiles), tile=tile)

    @property
    def most_split_rows(self) -> int:
        """Decode rows of which some may be split, at most; more make as many tiles as run at once, or more."""
        tiles_a_row = -(-self._group // self._tile(self._group))
        return -(-self._tiles_at_once // tiles_a_row) - 1

    @property
    def _group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def _tiles_at_once(self) -> int:
        return _BLOCKS_PER_MULTIPROCESSOR * self.num_multiprocessors // self.num_kv_heads

    def _tile(self, num_packed: int) -> int:
        """Queries in a tile, for rows of that many queries times heads in a group."""
        if num_packed > 64 and self.head_dim < 256:
            return 128
        return 64 if num_packed > 16 else 16

    def _bytes(self, num_tiles: int, *, tile: int) -> int:
        return self.num_heads * num_tiles * tile * (self.head_dim + 1) * 4 + 2 * _ALIGNMENT_BYTES


class _Turn:
    """Pinned memory of one plan. `read`: our copy out of it is done. (The library's own may find the next plan there:
    nothing reads what it makes.)"""

    def __init__(self, device: torch.device) -> None:
        self.pinned = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.words = mapped(self.pinned, device)
        self.read = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._guard = self.pinned.view(torch.int32)[_PLAN_WORDS - _UNTOUCHED_WORDS : _PLAN_WORDS]
        self._guard.fill_(_UNTOUCHED)

    @property
    def num_words(self) -> int:
        """What to copy so that the plan is in it: plans are written from the beginning."""
        return _PLAN_WORDS if bool((self._guard == _UNTOUCHED).all()) else self.words.numel()


class Planner:
    """Has the library plan beside the stream that computes; see the module."""

    def __init__(self, device: torch.device) -> None:
        self._turns = [_Turn(device) for _ in range(_NUM_TURNS)]
        self._next_turn = 0
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.unread_workspace = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan(self, wrapper: Any, *arguments: Any, read: KernelInputs, **options: Any) -> None:
        """As the wrapper's `plan`; its kernels then read `read`, of which this fills the workspace.

        What else the library's plan writes to is the wrapper's, and nothing reads it.
        """
        turn = self._turns[self._next_turn]
        self._next_turn = (self._next_turn + 1) % _NUM_TURNS
        turn.read.synchronize()
        wrapper._int_workspace_buffer = self.unread_workspace
        wrapper._pin_memory_int_workspace_buffer = turn.pinned
        with torch.cuda.stream(self._stream):
            wrapper.plan(*arguments, **options)
        num_words = turn.num_words
        copy_by_kernel(read.int_workspace.view(torch.int32)[:num_words], turn.words[:num_words])
        turn.read.record()
        read.give_to(wrapper)


def plan_for_good(wrapper: Any, *arguments: Any, read: KernelInputs, **options: Any) -> None:
    """As the wrapper's `plan`; its kernels then read `read`, of which this fills the workspace.

    Waits for the library's copies: only where nothing stands before them, and only once for a wrapper.
    """
    wrapper._int_workspace_buffer = read.int_workspace
    wrapper.plan(*arguments, **options)
    torch.cuda.current_stream().synchronize()
    wrapper._pin_memory_int_workspace_buffer = None  # megabytes that only a plan needs
    read.give_to(wrapper)


def pinned_ints(array: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).pin_memory()


def make_maximum_fast(module: Any) -> None:
    """Up to 0.7.0 the library's plan calls Python's `max` on tensors: element by element, milliseconds a step.

    Gives that module a `max` of its own, which asks a tensor for its maximum. Harmless in later versions.
    """

    def maximum(*arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and not options and isinstance(arguments[0], Tensor):
            return arguments[0].max()
        return builtins.max(*arguments, **options)

    module.max = maximum
