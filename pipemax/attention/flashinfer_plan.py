"""`Planner`: has FlashInfer plan a step's attention without standing behind the window's refill.

The library's plan ends with copies up the link, in the current stream. There they would stand in the engine's queue
behind the refill, and everything after them too. So it plans on a stream of its own, into memory that nothing reads,
and a kernel brings what it made (`upload.py`):

    plans' stream   | copies, whenever the engine comes to them |
    compute         | kernel: the plan from pinned memory | step ...

Also what is particular to the library and concerns whoever calls it. Never here: attention (`flashinfer.py`,
`captured_decode.py`).
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
# Plans that may be under way at once; more steps than this are never issued ahead of the device.
_NUM_TURNS = 4
# A plan of some hundred rows is a few kilobytes of int32; a larger one is noticed, and copied whole.
_PLAN_WORDS = 32 * 1024
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


class _Turn:
    """Pinned memory of one plan. `copied`: the library's own copy out of it is done; `read`: so is ours."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.words = mapped(self.pinned, device)
        self.copied, self.read = (torch.cuda.Event(blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
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
