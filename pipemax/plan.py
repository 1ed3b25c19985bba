"""The messages of the seam between the planes: what the control plane says, and what it hears back.

Frozen values only: no behaviour beyond derived numbers, no torch, no clock. The same messages drive CUDA workers, CPU
workers and the simulator (DESIGN section 3).

What one plan does, on every stage, layer by layer (l0, l1, ... are the stage's layers):

    step k    compute    |  l0  |  l1  |  l2  | ...        rows of this plan
              home            \\__ l0 \\__ l1 \\__ l2          write_home: slot -> home, once the layer has appended
              refill          \\__ l0 \\__ l1 \\__ l2          refill: home -> slot, once the layer has been left
    step k+1  compute                           |  l0  |  l1  | ...   waits, per layer, for the refill of step k

Order that every executor keeps, per stage and layer, in the order of `step_id`:

    compute(k) -> home(k) -> compute(k+1)              a slot is not written again before its copy has gone home
    compute(k) -> refill(k) -> compute(k+1)            a slot is not refilled before its last reader has left
    home(k) -> refill(k+1)                             a home is not read before it is valid

The control plane relies on that order and on nothing else: it never refills, in plan k, a slot that plan k writes home,
and never reads, in plan k's refill, a home that plan k writes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipemax.request import SamplingParams

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Phase(enum.StrEnum):
    """What a step is made of. COPY has no rows: it only moves blocks."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    COPY = "copy"


NO_BATCH = -1
"""`batch_id` of a step without rows: it belongs to no batch in flight."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an executor offers, in blocks; the same on every stage. Sizes come from here and nowhere else.

    `num_device_blocks` counts every device slot; `num_window_blocks` of them serve as the window at first.
    `num_host_blocks` is 0 where KV stays on the device.
    `block_bytes` is one block over all layers of one stage (the largest stage), the unit of the link's budget.
    """

    num_stages: int
    block_size: int
    num_device_blocks: int
    num_window_blocks: int
    num_host_blocks: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """Block copies of one direction; `slots[i]` (device) pairs with `homes[i]` (host). Both int32 [n]."""

    slots: Int32Array
    homes: Int32Array

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What stages have to know of a request before its first row. `seed` is resolved: never None.

    `stop_token_ids` holds the end tokens too (unless ignore_eos): the sampler suppresses them before min_tokens.
    """

    request_id: int
    prompt_token_ids: Int32Array
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one batch, for every stage. R rows, ragged: row i computes `num_new_tokens[i]` tokens.

    request_ids            int64 [R]    row i belongs to this request; a request has at most one row in a step
    num_computed_tokens    int32 [R]    tokens of the request already in the KV cache before this step
    num_new_tokens         int32 [R]    tokens computed in this step; their ids are the request's tokens at positions
                                        [num_computed, num_computed + num_new): the prompt, then what was sampled
    samples                bool  [R]    whether the row's last new token yields a sampled token
    block_table_indptr     int32 [R+1]  CSR over rows ...
    block_table_indices    int32 [nnz]  ... of device slots; row i has ceil((num_computed + num_new) / block_size)
    write_home             device slot -> home, after the layer has appended this step's keys and values
    refill                 home -> device slot for the step that follows, after the layer has been left
    new_requests           requests whose first row is in this plan
    finished_request_ids   requests whose state the stages may forget (before this step runs)
    sampled_through_step   first stage: sampled tokens of steps up to this id are needed before embedding (-1: none)
    """

    step_id: int
    batch_id: int
    phase: Phase
    request_ids: Int64Array
    num_computed_tokens: Int32Array
    num_new_tokens: Int32Array
    samples: BoolArray
    block_table_indptr: Int32Array
    block_table_indices: Int32Array
    write_home: BlockCopies
    refill: BlockCopies
    new_requests: tuple[NewRequest, ...]
    finished_request_ids: tuple[int, ...]
    sampled_through_step: int

    @property
    def num_rows(self) -> int:
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        return int(self.num_new_tokens.sum())

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that attention reads, summed over rows."""
        return int(self.num_computed_tokens.sum() + self.num_new_tokens.sum())


class CopyDirection(enum.StrEnum):
    """REFILL brings blocks from their homes to the device, HOME writes them there."""

    REFILL = "refill"
    HOME = "home"


@dataclass(frozen=True, slots=True)
class CopyTiming:
    """When one stage's copies of a plan ran, one direction: from the first layer's start to the last one's end.

    In seconds on the executor's clock. Between layers they may have waited for compute.
    """

    step_id: int
    direction: CopyDirection
    num_blocks: int
    num_bytes: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Where one stage's time went in one step, in seconds on the executor's clock.

    `start_seconds` is when the stage took the plan up with its input there; `compute_seconds` covers layers and head;
    the waits are for the window's refill (`window_wait_seconds`) and for activations or tokens
    (`activation_wait_seconds`). Bytes are what the step moved over this stage's host link.

    A step does not wait for its own copies. `copies` are those whose end is known since the stage's last report, of
    this step or of earlier ones; those of the last steps of all may never be told of.

    `issue_seconds` is what the stage's thread needed to issue the step, `copy_issue_seconds` the part of it for copies.
    On a GPU that runs ahead of compute, and bounds the step once it takes longer; a CPU computes meanwhile.
    """

    start_seconds: float
    compute_seconds: float
    window_wait_seconds: float
    activation_wait_seconds: float
    refill_bytes: int
    home_bytes: int
    copies: tuple[CopyTiming, ...] = ()
    issue_seconds: float = 0.0
    copy_issue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs of one sampled token from the raw logits: the sampled token first, then the top ones in order."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave. S = rows with `samples` set, in the plan's row order.

    token_ids   int32 [S]; -1 where the row failed, and then `row_errors[request_id]` says why
    logprobs    one entry a sampled row, None where not asked for; or None when nobody asked
    timings     one StageTiming a stage, in stage order
    """

    step_id: int
    batch_id: int
    request_ids: Int64Array
    token_ids: Int32Array
    logprobs: tuple[TokenLogprobs | None, ...] | None
    row_errors: dict[int, str]
    finished_seconds: float
    timings: tuple[StageTiming, ...]
