"""`StageWorker`: one stage's share of a step.

Forget and add requests; wait for the input (tokens on the first stage, activations on others); run the layers with
copies beside them (`transfer.py`); hand the activations on, or sample. Here lives the order of these things.

Never here: what to run (plans), the process around it (`stage_process.py`), how layers, attention, copies, links and
sampling work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import AttentionBackend, RowLayout
from pipemax.plan import Int32Array, Int64Array, StageTiming, StepPlan, TokenLogprobs
from pipemax.worker.attention_hook import StepContext
from pipemax.worker.device import Device
from pipemax.worker.request_tokens import RequestTokens
from pipemax.worker.sampler import Sampler
from pipemax.worker.stage_model import StageModel, StageSlice
from pipemax.worker.transfer import KVPools, TransferEngine
from pipemax.worker.transport import StageLinks, Transfer

# More than any sensible number of plans in flight: the oldest have long arrived, waiting for them costs nothing.
_MAX_AWAITED_TOKEN_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage says of a step it has run. The last stage adds token ids (int32 [S]), logprobs, row errors."""

    step_id: int
    timing: StageTiming
    finished_seconds: float
    token_ids: Int32Array | None = None
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    row_errors: Mapping[int, str] | None = None


@dataclass(slots=True)
class _AwaitedTokens:
    """A step's sampled tokens on their way to the first stage."""

    step_id: int
    request_ids: Int64Array
    transfer: Transfer


class StageWorker:
    """Runs steps of one stage, in plan order.

    Shapes: T new tokens, H hidden size, S rows with samples, V vocabulary.
    """

    def __init__(
        self,
        *,
        stage: StageSlice,
        model: StageModel,
        device: Device,
        pools: KVPools,
        block_size: int,
        backend: AttentionBackend,
        links: StageLinks,
    ) -> None:
        self._stage = stage
        self._model = model
        self._device = device
        self._block_size = block_size
        self._backend = backend
        self._links = links
        self._transfers = TransferEngine(device=device, pools=pools, layers=stage.layers)
        self._context = StepContext(backend, pools, self._transfers)
        self._sampler = Sampler(vocab_size=model.spec.vocab_size, device=device.torch_device) if stage.is_last else None
        self._tokens = RequestTokens() if stage.is_first else None
        self._awaited: deque[_AwaitedTokens] = deque()
        links.set_hidden(model.hidden_size, model.dtype)

    def post_input(self, plan: StepPlan) -> bool:
        """Gets ready for the activations of a coming step, in plan order; False when too many are awaited already."""
        return self._stage.is_first or plan.num_rows == 0 or self._links.post_hidden(plan.num_tokens)

    @torch.inference_mode()
    def run_step(self, plan: StepPlan) -> StageReport:
        """Runs one step; `post_input` has been called for it. Returns when its output is handed over (copies go on).

        Raises LinkError when another stage is gone, CopyError when a block copy failed.
        """
        self._track_requests(plan)
        came_seconds = time.monotonic()
        input_ids_T = self._input_ids(plan) if self._stage.is_first else None
        hidden_TH = self._links.receive_hidden() if not self._stage.is_first and plan.num_rows else None
        start_seconds = time.monotonic()

        sampled: _Sampled | None = None
        compute = self._device.stopwatch()
        compute.start()
        self._transfers.begin_step(plan)
        if plan.num_rows:
            device = self._device.torch_device
            rows = _row_layout(plan, self._block_size)
            self._backend.plan(rows)
            hidden_TH = self._model.forward(
                input_ids_T=None if input_ids_T is None else input_ids_T.to(device),
                hidden_TH=None if hidden_TH is None else hidden_TH.to(device),
                positions_T=_positions(plan, rows.qo_indptr).to(device),
                step_context=self._context,
            )
            if self._stage.is_last:
                sampled = self._sample(plan, rows.qo_indptr, hidden_TH)
        elif self._stage.is_last:
            sampled = _Sampled(np.empty(0, dtype=np.int32), None, {})
        moved = self._transfers.finish_step()
        compute.stop()
        compute_seconds = compute.seconds() - moved.window_wait_seconds

        send_seconds = time.monotonic()
        self._hand_over(plan, hidden_TH, sampled)
        finished_seconds = time.monotonic()
        timing = StageTiming(
            start_seconds=start_seconds,
            compute_seconds=compute_seconds,
            window_wait_seconds=moved.window_wait_seconds,
            activation_wait_seconds=start_seconds - came_seconds + finished_seconds - send_seconds,
            refill_bytes=moved.refill_bytes,
            home_bytes=moved.home_bytes,
        )
        if sampled is None:
            return StageReport(plan.step_id, timing, finished_seconds)
        return StageReport(
            plan.step_id, timing, finished_seconds, sampled.token_ids, sampled.logprobs, sampled.row_errors
        )

    def _track_requests(self, plan: StepPlan) -> None:
        for holder in (self._tokens, self._sampler):
            if holder is not None:
                holder.forget(plan.finished_request_ids)
                for request in plan.new_requests:
                    holder.add(request)

    def _input_ids(self, plan: StepPlan) -> Tensor | None:
        assert self._tokens is not None
        while self._awaited and (
            self._awaited[0].step_id <= plan.sampled_through_step or len(self._awaited) > _MAX_AWAITED_TOKEN_MESSAGES
        ):
            awaited = self._awaited.popleft()
            self._tokens.append(awaited.request_ids, awaited.transfer.wait())
        return self._tokens.input_ids(plan) if plan.num_rows else None

    def _sample(self, plan: StepPlan, qo_indptr: Int32Array, hidden_TH: Tensor) -> _Sampled:
        assert self._sampler is not None
        last_tokens_S = (qo_indptr[1:] - 1)[plan.samples].astype(np.int64)
        if not len(last_tokens_S):
            return _Sampled(np.empty(0, dtype=np.int32), None, {})
        logits_SV = self._model.logits(hidden_TH[torch.from_numpy(last_tokens_S).to(hidden_TH.device)])
        sampled = self._sampler.sample(plan.request_ids[plan.samples], logits_SV)
        return _Sampled(sampled.token_ids.cpu().numpy(), sampled.logprobs, sampled.row_errors)

    def _hand_over(self, plan: StepPlan, hidden_TH: Tensor | None, sampled: _Sampled | None) -> None:
        """Activations to the next stage or tokens to the first, in step order."""
        if not plan.num_rows:
            return
        sampled_ids = plan.request_ids[plan.samples]
        if sampled is None:
            assert hidden_TH is not None
            self._links.send_hidden(hidden_TH.cpu())
            if self._tokens is not None and len(sampled_ids):
                # Posted now, not when needed: the last stage must never wait for a plan that is still to come.
                transfer = self._links.post_tokens(len(sampled_ids))
                self._awaited.append(_AwaitedTokens(plan.step_id, sampled_ids, transfer))
        elif len(sampled_ids):
            token_ids_S = torch.from_numpy(sampled.token_ids)
            if self._tokens is not None:
                self._tokens.append(sampled_ids, token_ids_S)
            else:
                self._links.send_tokens(token_ids_S)


@dataclass(frozen=True, slots=True)
class _Sampled:
    token_ids: Int32Array
    logprobs: tuple[TokenLogprobs | None, ...] | None
    row_errors: Mapping[int, str]


def _row_layout(plan: StepPlan, block_size: int) -> RowLayout:
    qo_indptr = np.zeros(plan.num_rows + 1, dtype=np.int32)
    np.cumsum(plan.num_new_tokens, out=qo_indptr[1:])
    return RowLayout(
        qo_indptr=qo_indptr,
        kv_lens=plan.num_computed_tokens + plan.num_new_tokens,
        kv_indptr=plan.block_table_indptr,
        kv_indices=plan.block_table_indices,
        block_size=block_size,
    )


def _positions(plan: StepPlan, qo_indptr: Int32Array) -> Tensor:
    """Position of each new token in its request, int64 [T]."""
    shift = np.repeat(plan.num_computed_tokens - qo_indptr[:-1], plan.num_new_tokens)
    return torch.from_numpy(np.arange(qo_indptr[-1], dtype=np.int64) + shift)
