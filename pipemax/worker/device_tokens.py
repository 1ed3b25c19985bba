"""`DeviceTokens`: on a first stage with a GPU, input ids of rows whose newest token the host has not seen yet.

    step k      sample -> newest[slot] on the device ----> input ids of step k+1: no host in between
                  `--> copy to the host ...... arrives --> history, for a request that is computed anew

Prompts and sampled tokens up to a few steps ago are on the host, the newest token of each request is on the device too.
A decode row needs only that one. A row that needs older ones (its KV was dropped) may have to wait for their copy.

The same verbs as `request_tokens.py`, which serves stages without a GPU. Never here: links, finish rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipemax.plan import Int64Array, NewRequest, StepPlan
from pipemax.worker.upload import upload

_FIRST_SLOTS = 256


@dataclass(slots=True)
class _Request:
    """`history`: tokens on the host. `num_tokens`: those and the ones on their way."""

    slot: int
    history: list[int]
    num_tokens: int


@dataclass(slots=True)
class _Arriving:
    """Sampled tokens, int32 [S], on their way to the host; `event` is None when they are there."""

    request_ids: Int64Array
    token_ids: Tensor
    event: torch.cuda.Event | None

    @property
    def is_there(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]


class DeviceTokens:
    """Token ids by request id. A failed row's token (-1) counts as 0: the control plane drops the row a step later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._requests: dict[int, _Request] = {}
        self._free_slots: list[int] = list(range(_FIRST_SLOTS))
        self._newest = torch.zeros(_FIRST_SLOTS, dtype=torch.int64, device=device)
        self._arriving: deque[_Arriving] = deque()

    def add(self, request: NewRequest) -> None:
        assert request.request_id not in self._requests, f"request {request.request_id} is new twice"
        if not self._free_slots:
            size = len(self._newest)
            self._newest = torch.cat([self._newest, torch.zeros_like(self._newest)])
            self._free_slots.extend(range(size, 2 * size))
        prompt = request.prompt_token_ids.tolist()
        self._requests[request.request_id] = _Request(self._free_slots.pop(), prompt, len(prompt))

    def forget(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            if (request := self._requests.pop(request_id, None)) is not None:
                # Steps before this point may still read the slot; later ones write it before they read it, in order.
                self._free_slots.append(request.slot)

    def append(self, request_ids: Int64Array, token_ids_S: Tensor) -> None:
        """Sampled tokens, int32 [S], on the device or on the host. Those of requests already forgotten are dropped."""
        requests = [self._requests.get(request_id) for request_id in request_ids.tolist()]
        for request in requests:
            if request is not None:
                request.num_tokens += 1
        on_device = token_ids_S.to(self._device, non_blocking=True)
        rows = [row for row, request in enumerate(requests) if request is not None]
        slots = np.array([request.slot for request in requests if request is not None], dtype=np.int64)
        if len(rows) < len(requests):
            on_device = on_device[upload(np.array(rows, dtype=np.int64), self._device)]
        self._newest.index_copy_(0, upload(slots, self._device), on_device.clamp(min=0).to(torch.int64))
        event = None
        if token_ids_S.device.type == "cuda":
            token_ids_S = token_ids_S.to("cpu", non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        self._arriving.append(_Arriving(request_ids, token_ids_S, event))

    def input_ids(self, plan: StepPlan) -> Tensor:
        """Input ids of the plan's rows, int64 [T], on the device."""
        while self._arriving and self._arriving[0].is_there:
            self._arrive()
        host_ids: list[int] = []
        device_tokens: list[int] = []
        device_slots: list[int] = []
        rows = zip(
            plan.request_ids.tolist(), plan.num_computed_tokens.tolist(), plan.num_new_tokens.tolist(), strict=True
        )
        for request_id, first, count in rows:
            request = self._requests[request_id]
            end = first + count
            assert end <= request.num_tokens, f"step {plan.step_id} needs a token of request {request_id} too early"
            if count == 1 and end == request.num_tokens > len(request.history):
                device_tokens.append(len(host_ids))
                device_slots.append(request.slot)
                host_ids.append(0)
                continue
            while len(request.history) < end:
                if (event := self._arriving[0].event) is not None:
                    event.synchronize()
                self._arrive()
            host_ids += request.history[first:end]
        ids_T = upload(np.array(host_ids, dtype=np.int64), self._device)
        if device_tokens:
            slots = upload(np.array(device_slots, dtype=np.int64), self._device)
            tokens = upload(np.array(device_tokens, dtype=np.int64), self._device)
            ids_T.index_copy_(0, tokens, self._newest[slots])
        return ids_T

    def _arrive(self) -> None:
        arrived = self._arriving.popleft()
        for request_id, token_id in zip(arrived.request_ids.tolist(), arrived.token_ids.tolist(), strict=True):
            if (request := self._requests.get(request_id)) is not None:
                request.history.append(max(token_id, 0))
