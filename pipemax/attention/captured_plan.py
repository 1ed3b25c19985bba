"""`CapturedPlan`: how attention of captured decode steps of one size is planned, once for all or anew for each step.

FlashInfer splits keys of long rows where multiprocessors would idle, so a plan depends on how long the rows are. In
its mode for graphs it writes partial results in float32, which another kernel merges, whether it splits anything or
not. But where the rows alone make as many tiles as run at once, it can split nothing. Those steps are planned outside
that mode, without splits, and such a plan depends on the number of rows only:

    fewer rows      | plan | layout | graph | plan | layout | graph |     `PlannedEachStep`
    others   plan   | layout | graph | layout | graph |                   `PlannedOnce`

With PIPEMAX_CAPTURED_PLANS=each-step in the environment all are planned anew, to be compared. Never here: a step's
layout (`captured_buffers.py`), what is particular to the library's plans (`flashinfer_plan.py`).
"""

from __future__ import annotations

import enum
import functools
from typing import Any, Protocol

import torch

from pipemax.attention.captured_buffers import CapturedBuffers, CapturedLayout
from pipemax.attention.flashinfer import FlashInferAttention
from pipemax.attention.flashinfer_plan import KERNEL, KernelInputs, SplitWorkspace, pinned_ints, plan_for_good
from pipemax.worker.chosen_path import chosen_path

PLANS_VARIABLE = "PIPEMAX_CAPTURED_PLANS"

# A plan without splits is four numbers for each tile: 4 KiB for 256 rows. The library says so if one does not fit.
_PLAN_BYTES = 64 * 1024


class CapturedPlans(enum.StrEnum):
    """See the module. ONCE: where nothing can be split."""

    ONCE = "once"
    EACH_STEP = "each-step"


@functools.cache
def captured_plans() -> CapturedPlans:
    """What the environment says, for good. Raises ConfigError for a value that is none."""
    return chosen_path(PLANS_VARIABLE, CapturedPlans.ONCE)


def captures(backend: FlashInferAttention, num_rows: int) -> bool:
    """Whether the workspace is large enough for captured steps of up to that many decode rows."""
    split = backend.split_workspace
    most_rows = _most_planned_each_step(split, num_rows)
    return split.captured_bytes(most_rows) <= backend.float_workspace.numel()


class CapturedPlan(Protocol):
    """`wrapper`: the library's, whose `run` attends by this plan, over what is in `read`."""

    read: KernelInputs
    wrapper: Any

    def renew(self, rows: CapturedLayout) -> None:
        """Makes it right for the rows that the next replay is for."""


def captured_plan(buffers: CapturedBuffers, num_rows: int, options: dict[str, Any]) -> CapturedPlan:
    """`options`: what the library's plan wants to know of a layer."""
    if num_rows <= _most_planned_each_step(buffers.split_workspace, num_rows):
        return PlannedEachStep(buffers, num_rows, options)
    return PlannedOnce(buffers, num_rows, options)


def _most_planned_each_step(split: SplitWorkspace, num_rows: int) -> int:
    """The largest size that is, of all up to `num_rows`."""
    return num_rows if captured_plans() is CapturedPlans.EACH_STEP else min(num_rows, split.most_split_rows)


class PlannedEachStep:
    """In the library's mode for graphs: where the kernels' inputs are, and their grid, stay as captured."""

    def __init__(self, buffers: CapturedBuffers, num_rows: int, options: dict[str, Any]) -> None:
        import flashinfer

        self.read = buffers.read_by(num_rows, int_workspace=buffers.int_workspace)
        self._planner = buffers.planner
        self._options = options
        self._unread = buffers.unread(num_rows)
        self._qo_indptr = torch.arange(num_rows + 1, dtype=torch.int32).pin_memory()
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            buffers.float_workspace,
            "NHD",
            backend=KERNEL,
            use_cuda_graph=True,
            qo_indptr_buf=self._unread.qo_indptr,
            paged_kv_indptr_buf=self._unread.kv_indptr,
            paged_kv_indices_buf=self._unread.kv_indices,
            paged_kv_last_page_len_buf=self._unread.last_page_lens,
        )
        self._unread.give_to(self.wrapper)  # in place of a workspace of its own: there is a wrapper for each size

    def renew(self, rows: CapturedLayout) -> None:
        self._unread.give_to(self.wrapper)
        self._planner.plan(
            self.wrapper,
            self._qo_indptr,
            pinned_ints(rows.kv_indptr),
            self.read.kv_indices[: len(rows.kv_indices)],  # of these the plan wants the number
            pinned_ints(rows.last_page_lens),
            seq_lens=pinned_ints(rows.kv_lens),
            **self._options,
            read=self.read,
        )


class PlannedOnce:
    """Without splits, for rows of any length: the plan says which row a tile is of, and no more.

    It stays where it is, so it has a workspace of its own.
    """

    def __init__(self, buffers: CapturedBuffers, num_rows: int, options: dict[str, Any]) -> None:
        import flashinfer

        int_workspace = torch.zeros(_PLAN_BYTES, dtype=torch.uint8, device=buffers.device)
        self.read = buffers.read_by(num_rows, int_workspace=int_workspace)
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(buffers.float_workspace, "NHD", backend=KERNEL)
        indptr = torch.arange(num_rows + 1, dtype=torch.int32)
        one_key = torch.ones(num_rows, dtype=torch.int32)
        plan_for_good(
            self.wrapper,
            indptr,
            indptr,
            self.read.kv_indices[:num_rows],
            one_key,
            seq_lens=one_key,
            disable_split_kv=True,
            **options,
            read=self.read,
        )

    def renew(self, rows: CapturedLayout) -> None:
        pass
