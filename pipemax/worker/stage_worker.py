"""`StageWorker`: one stage's share of a step.

Forget and add requests; wait for the input (tokens on the first stage, activations on others); run the layers with
copies beside them (`transfer.py`); hand the activations on, or sample. Here lives the order of these things.

On a GPU all of this is issued and not waited for, so that the next step is issued while this one runs; what became of
it is read later, on another thread:

    this thread   | issue k | issue k+1 | issue k+2 ...
    GPU             | run k          | run k+1          | ...
    reporter                         | report k         | report k+1

Never here: what to run (plans), the process around it (`stage_process.py`), how layers, attention, copies, links and
sampling work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import AttentionBackend, RowLayout
from pipemax.plan import Int32Array, Int64Array, NewRequest, StageTiming, StepPlan, TokenLogprobs
from pipemax.worker.attention_hook import StepContext
from pipemax.worker.copy_log import CopyLog
from pipemax.worker.decode_graphs import DecodeGraphs
from pipemax.worker.device import Device, Mark
from pipemax.worker.device_tokens import DeviceTokens
from pipemax.worker.pulse import Pulse, PulsingFences
from pipemax.worker.request_tokens import RequestTokens
from pipemax.worker.row_guard import GuardedSampler, Sampled
from pipemax.worker.sampler import Sampler
from pipemax.worker.stage_model import StageModel, StageSlice
from pipemax.worker.transfer import KVPools, StepTransfers, TransferEngine, layers_per_copy
from pipemax.worker.transport import StageLinks
from pipemax.worker.upload import upload


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage says of a step it has run. The last stage adds token ids (int32 [S]), logprobs, row errors."""

    step_id: int
    timing: StageTiming
    finished_seconds: float
    token_ids: Int32Array | None = None
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    row_errors: Mapping[int, str] | None = None


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that is issued and handed over. Compute passes `came`, then its waits for input, `start`, the layers,
    `end`, what handing over waits for, `finished`."""

    step_id: int
    is_last_stage: bool
    came: Mark
    start: Mark
    end: Mark
    finished: Mark
    issue_seconds: float
    moved: StepTransfers
    copy_log: CopyLog
    sampled: Sampled | None

    def report(self) -> StageReport:
        """What became of it; blocks until the device is through with it. Once a step, in step order."""
        self.copy_log.add(self.moved.copies)
        finished_seconds = self.finished.seconds()
        start_seconds, end_seconds = self.start.seconds(), self.end.seconds()
        window_wait_seconds = self.moved.window_wait_seconds
        timing = StageTiming(
            start_seconds=start_seconds,
            compute_seconds=end_seconds - start_seconds - window_wait_seconds,
            window_wait_seconds=window_wait_seconds,
            activation_wait_seconds=start_seconds - self.came.seconds() + finished_seconds - end_seconds,
            refill_bytes=self.moved.refill_bytes,
            home_bytes=self.moved.home_bytes,
            copies=self.copy_log.take_ended(),
            issue_seconds=self.issue_seconds,
            copy_issue_seconds=self.moved.issue_seconds,
        )
        if not self.is_last_stage:
            return StageReport(self.step_id, timing, finished_seconds)
        if self.sampled is None:
            return StageReport(self.step_id, timing, finished_seconds, np.empty(0, dtype=np.int32), None, {})
        sampled = self.sampled
        return StageReport(
            self.step_id, timing, finished_seconds, sampled.host_token_ids, sampled.logprobs, sampled.row_errors
        )


class _TokenStore(Protocol):
    """Tokens of live requests: `request_tokens.py`, `device_tokens.py`."""

    def add(self, request: NewRequest) -> None: ...

    def forget(self, request_ids: Iterable[int]) -> None: ...

    def append(self, request_ids: Int64Array, token_ids_S: Tensor) -> None: ...

    def input_ids(self, plan: StepPlan) -> Tensor: ...


@dataclass(slots=True)
class _AwaitedTokens:
    """A step's sampled tokens on their way to the first stage."""

    step_id: int
    request_ids: Int64Array


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
        pulse: Pulse | None = None,
        decode_graphs: DecodeGraphs | None = None,
    ) -> None:
        """`decode_graphs`: what runs the decode steps that it serves, in the place of model and backend."""
        self._stage = stage
        self._model = model
        self._device = device
        self._block_size = block_size
        self._backend = backend
        self._links = links
        self._decode_graphs = decode_graphs
        self._transfers = TransferEngine(
            device=device,
            pools=pools,
            layers=stage.layers,
            layers_per_copy=layers_per_copy(device.torch_device),
        )
        self._copy_log = CopyLog()
        fences = self._transfers if pulse is None else PulsingFences(self._transfers, pulse)
        self._context = StepContext(backend, pools, fences)
        self._sampler = (
            GuardedSampler(Sampler(vocab_size=model.spec.vocab_size, device=device.torch_device))
            if stage.is_last
            else None
        )
        self._tokens = _token_store(device.torch_device) if stage.is_first else None
        self._awaited: deque[_AwaitedTokens] = deque()
        links.set_hidden(model.hidden_size, model.dtype)

    def expect_input(self, plan: StepPlan) -> None:
        """Gets ready for the activations of a coming step, in plan order."""
        if not self._stage.is_first and plan.num_rows:
            self._links.expect_hidden(plan.num_tokens)

    @torch.inference_mode()
    def run_step(self, plan: StepPlan) -> RunningStep:
        """Runs one step; `expect_input` has been called for it. Returns when it is issued and its output handed over.

        Raises LinkError when another stage is gone, CopyError when a block copy failed.
        """
        began_seconds = time.monotonic()
        self._track_requests(plan)
        came = self._device.mark()
        device = self._device.torch_device
        input_ids_T = hidden_TH = None
        if self._stage.is_first:
            input_ids_T = self._input_ids(plan)
        elif plan.num_rows:
            hidden_TH = self._links.receive_hidden()
        start = self._device.mark()

        sampled: Sampled | None = None
        self._transfers.begin_step(plan)
        if plan.num_rows:
            rows = _row_layout(plan, self._block_size)
            if input_ids_T is not None:
                input_ids_T = input_ids_T.to(device)
            positions_T = upload(_positions(plan, rows.qo_indptr), device)
            hidden_TH = self._run_layers(input_ids_T, hidden_TH, positions_T, rows)
            if self._stage.is_last:
                sampled = self._sample(plan, rows.qo_indptr, hidden_TH)
        moved = self._transfers.finish_step()
        end = self._device.mark()

        self._hand_over(plan, hidden_TH, sampled)
        return RunningStep(
            step_id=plan.step_id,
            is_last_stage=self._stage.is_last,
            came=came,
            start=start,
            end=end,
            finished=self._device.mark(),
            issue_seconds=time.monotonic() - began_seconds,
            moved=moved,
            copy_log=self._copy_log,
            sampled=sampled,
        )

    def _run_layers(
        self, input_ids_T: Tensor | None, hidden_TH: Tensor | None, positions_T: Tensor, rows: RowLayout
    ) -> Tensor:
        graphs = self._decode_graphs
        if graphs is not None and graphs.serves(rows):
            input_ = input_ids_T if input_ids_T is not None else hidden_TH
            assert input_ is not None
            return graphs.forward(input_, positions_T, rows, self._context.fences)
        self._backend.plan(rows)
        return self._model.forward(
            input_ids_T=input_ids_T, hidden_TH=hidden_TH, positions_T=positions_T, step_context=self._context
        )

    def _track_requests(self, plan: StepPlan) -> None:
        for holder in (self._tokens, self._sampler):
            if holder is not None:
                holder.forget(plan.finished_request_ids)
                for request in plan.new_requests:
                    holder.add(request)

    def _input_ids(self, plan: StepPlan) -> Tensor | None:
        assert self._tokens is not None
        # Those of prefill steps may not be needed for long. They are received all the same once this stage is further
        # ahead than the pipeline is long, when waiting for one costs nothing: a link holds only so many.
        most_awaited = self._stage.num_stages + 1
        while self._awaited and (
            self._awaited[0].step_id <= plan.sampled_through_step or len(self._awaited) > most_awaited
        ):
            awaited = self._awaited.popleft()
            self._tokens.append(awaited.request_ids, self._links.receive_tokens())
        return self._tokens.input_ids(plan) if plan.num_rows else None

    def _sample(self, plan: StepPlan, qo_indptr: Int32Array, hidden_TH: Tensor) -> Sampled | None:
        assert self._sampler is not None
        last_tokens_S = (qo_indptr[1:] - 1)[plan.samples].astype(np.int64)
        if not len(last_tokens_S):
            return None
        hidden_SH = hidden_TH[upload(last_tokens_S, hidden_TH.device)]
        sampled = self._sampler.sample(plan.request_ids[plan.samples], self._model.logits(hidden_SH))
        sampled.start_read_back()
        return sampled

    def _hand_over(self, plan: StepPlan, hidden_TH: Tensor | None, sampled: Sampled | None) -> None:
        """Activations to the next stage or tokens to the first, in step order."""
        if not plan.num_rows:
            return
        sampled_ids = plan.request_ids[plan.samples]
        if not self._stage.is_last:
            assert hidden_TH is not None
            self._links.send_hidden(hidden_TH)
            if self._tokens is not None and len(sampled_ids):
                self._links.expect_tokens(len(sampled_ids))
                self._awaited.append(_AwaitedTokens(plan.step_id, sampled_ids))
        elif sampled is not None:
            if self._tokens is not None:
                self._tokens.append(sampled_ids, sampled.token_ids)
            else:
                self._links.send_tokens(sampled.token_ids)


def _token_store(device: torch.device) -> _TokenStore:
    return DeviceTokens(device) if device.type == "cuda" else RequestTokens()


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


def _positions(plan: StepPlan, qo_indptr: Int32Array) -> Int64Array:
    """Position of each new token in its request, [T]."""
    shift = np.repeat(plan.num_computed_tokens - qo_indptr[:-1], plan.num_new_tokens)
    return np.arange(qo_indptr[-1], dtype=np.int64) + shift
