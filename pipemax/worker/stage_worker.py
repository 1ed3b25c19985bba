"""`StageWorker`: one stage's share of a step.

Forget and add requests; wait for the input (tokens on the first stage, activations on others); run the layers with
copies beside them (`transfer.py`); hand the activations on, or sample, or leave sampling to the first stage
(`awaited_halves.py`). Here lives the order of these things.

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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipemax.attention.base import AttentionBackend, RowLayout
from pipemax.plan import Int32Array, Int64Array, NewRequest, StepPlan
from pipemax.worker.attention_hook import StepContext
from pipemax.worker.awaited_halves import AwaitedHalves
from pipemax.worker.awaited_steps import AwaitedSteps, TokenStore
from pipemax.worker.awaited_tokens import AwaitedTokens
from pipemax.worker.copy_log import CopyLog
from pipemax.worker.decode_graphs import DecodeGraphs
from pipemax.worker.device import Device
from pipemax.worker.device_tokens import DeviceTokens
from pipemax.worker.pulse import Pulse, PulsingFences
from pipemax.worker.request_tokens import RequestTokens
from pipemax.worker.row_guard import GuardedSampler, Sampled
from pipemax.worker.running_step import RunningStep
from pipemax.worker.sampler import Sampler
from pipemax.worker.stage_model import StageModel, StageSlice
from pipemax.worker.transfer import KVPools, TransferEngine, layers_per_copy
from pipemax.worker.transport import StageLinks
from pipemax.worker.upload import upload


class _Tokens(TokenStore, Protocol):
    """Tokens of live requests: `request_tokens.py`, `device_tokens.py`."""

    def add(self, request: NewRequest) -> None: ...

    def forget(self, request_ids: Iterable[int]) -> None: ...

    def input_ids(self, plan: StepPlan) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _LastTokens:
    """Of the rows that sample: hidden states after the final norm, and logits, in the stage's part of the head."""

    hidden: Tensor  # [S, H]
    logits: Tensor  # [S, V]


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
        links.set_hidden(model.hidden_size, model.dtype)
        self._tokens: _Tokens | None = _token_store(device.torch_device) if stage.is_first else None
        sampler = None
        if stage.samples:
            sampler = GuardedSampler(Sampler(vocab_size=model.spec.vocab_size, device=device.torch_device))
        # Of the steps that this stage runs: where it samples them itself, in the step.
        self._sampler = sampler if stage.is_last else None
        self._awaited = self._await_steps(sampler) if stage.is_first and not stage.is_last else None

    def _await_steps(self, sampler: GuardedSampler | None) -> AwaitedSteps:
        assert self._tokens is not None
        if sampler is None:
            return AwaitedTokens(self._links, self._tokens, num_stages=self._stage.num_stages)
        model = self._model
        own = model.logits(torch.zeros(1, model.hidden_size, dtype=model.dtype, device=model.device))
        self._links.set_half(model.spec.vocab_size - own.shape[1], own.dtype)
        return AwaitedHalves(
            self._links,
            self._tokens,
            model=model,
            sampler=sampler,
            num_stages=self._stage.num_stages,
            mark=self._device.mark,
        )

    def expect_input(self, plan: StepPlan) -> None:
        """Gets ready for the activations of a coming step, in plan order."""
        if not self._stage.is_first and plan.num_rows:
            self._links.expect_hidden(plan.num_tokens)

    @torch.inference_mode()
    def run_step(self, plan: StepPlan) -> list[RunningStep]:
        """Runs one step; `expect_input` has been called for it. Returns when it is issued and its output handed over.

        Gives the steps that may be reported from now on, in plan order: this one, or none, or some before it too.
        Raises LinkError when another stage is gone, CopyError when a block copy failed.
        """
        began_seconds = time.monotonic()
        self._track_requests(plan)
        came = self._device.mark()
        hidden_TH = None
        if self._awaited is not None:
            self._awaited.receive(plan)
        elif not self._stage.is_first and plan.num_rows:
            hidden_TH = self._links.receive_hidden()
        start = self._device.mark()

        if self._awaited is not None:
            self._awaited.take_in()
        last: _LastTokens | None = None
        sampled: Sampled | None = None
        self._transfers.begin_step(plan)
        if plan.num_rows:
            rows = _row_layout(plan, self._block_size)
            hidden_TH = self._run_layers(plan, hidden_TH, rows)
            if self._stage.is_last and plan.samples.any():
                last = self._last_tokens(plan, rows.qo_indptr, hidden_TH)
                if self._sampler is not None:
                    sampled = self._sampler.sample(plan.request_ids[plan.samples], last.logits)
                    sampled.start_read_back()
        moved = self._transfers.finish_step()
        end = self._device.mark()

        self._hand_over(plan, hidden_TH, last, sampled)
        step = RunningStep(
            step_id=plan.step_id,
            samples=self._stage.samples,
            came=came,
            start=start,
            end=end,
            finished=self._device.mark(),
            issue_seconds=time.monotonic() - began_seconds,
            moved=moved,
            copy_log=self._copy_log,
            sampled=sampled,
        )
        if self._awaited is None:
            return [step]
        self._awaited.hand_on(step, plan)
        return self._awaited.take_complete()

    @property
    def waiting_step_id(self) -> int | None:
        """Of the oldest step that cannot be reported before `finish_waiting_step`; None where there is none."""
        return None if self._awaited is None else self._awaited.oldest_step_id

    def waiting_step_has_come(self) -> bool:
        """Whether to `finish_waiting_step` now, rather than wait for a plan."""
        assert self._awaited is not None
        return self._awaited.oldest_has_come()

    @torch.inference_mode()
    def finish_waiting_step(self) -> list[RunningStep]:
        """With no plan to run: what that step still needs. Gives steps as `run_step` does. Raises LinkError."""
        assert self._awaited is not None
        self._awaited.receive_oldest()
        self._awaited.take_in()
        return self._awaited.take_complete()

    def _run_layers(self, plan: StepPlan, hidden_TH: Tensor | None, rows: RowLayout) -> Tensor:
        device = self._device.torch_device
        input_ids_T = None if self._tokens is None else self._tokens.input_ids(plan).to(device)
        positions_T = upload(_positions(plan, rows.qo_indptr), device)
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

    def _last_tokens(self, plan: StepPlan, qo_indptr: Int32Array, hidden_TH: Tensor) -> _LastTokens:
        last_tokens_S = (qo_indptr[1:] - 1)[plan.samples].astype(np.int64)
        hidden_SH = hidden_TH[upload(last_tokens_S, hidden_TH.device)]
        return _LastTokens(hidden_SH, self._model.logits(hidden_SH))

    def _hand_over(
        self, plan: StepPlan, hidden_TH: Tensor | None, last: _LastTokens | None, sampled: Sampled | None
    ) -> None:
        """Activations to the next stage, or to the first one tokens or what it makes them of, in step order."""
        if not self._stage.is_last:
            if hidden_TH is not None:
                self._links.send_hidden(hidden_TH)
        elif sampled is not None:
            if self._tokens is not None:
                self._tokens.append(plan.request_ids[plan.samples], sampled.token_ids)
            else:
                self._links.send_tokens(sampled.token_ids)
        elif last is not None:
            self._links.send_half(last.hidden, last.logits)


def _token_store(device: torch.device) -> _Tokens:
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
