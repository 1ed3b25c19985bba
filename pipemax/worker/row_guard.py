"""`GuardedSampler`: a sampler in which a row that raises is that row's error and nobody else's.

    all rows together                            the usual case: costs nothing
      └─ raises ─► each row by itself            those that raise again get token -1 and an error

What the sampler itself finds wrong (numbers that are none) it reports without raising (`sampler.py`); this is for what
nobody thought of. Never here: sampling. Errors that a GPU reports later, at another place, end the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipemax.plan import Int32Array, Int64Array, NewRequest, TokenLogprobs
from pipemax.worker.sampler import Sampler


class Sampled(Protocol):
    """What sampling gave for S rows; see `SampledTokens`."""

    @property
    def token_ids(self) -> Tensor: ...

    @property
    def host_token_ids(self) -> Int32Array: ...

    @property
    def row_errors(self) -> Mapping[int, str]: ...

    @property
    def logprobs(self) -> tuple[TokenLogprobs | None, ...] | None: ...

    def start_read_back(self) -> None: ...


class GuardedSampler:
    """Has the methods of the sampler that it is around."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._refused: dict[int, str] = {}

    def add(self, request: NewRequest) -> None:
        """Makes a request known; one that the sampler cannot take is remembered with what it said."""
        try:
            self._sampler.add(request)
        except Exception as error:
            self._sampler.forget([request.request_id])
            self._refused[request.request_id] = _message(error)

    def forget(self, request_ids: Iterable[int]) -> None:
        ids = list(request_ids)
        for request_id in ids:
            self._refused.pop(request_id, None)
        self._sampler.forget(ids)

    def warm_up(self, num_rows: int, *, dtype: torch.dtype) -> None:
        """As in `Sampler`; what it raises is nobody's row, and is raised."""
        self._sampler.warm_up(num_rows, dtype=dtype)

    def sample(self, request_ids: Int64Array, logits_SV: Tensor) -> Sampled:
        """The next token of each row. Arguments as in `Sampler.sample`. A row that raises gives -1."""
        if not any(int(request_id) in self._refused for request_id in request_ids if self._refused):
            try:
                return self._sampler.sample(request_ids, logits_SV)
            except Exception:  # which row it was shows below
                pass
        return _RowByRow(self._sampler, self._refused, request_ids, logits_SV)


class _RowByRow:
    """Rows sampled one at a time. What the host has to know is read at once: this is no place to be fast."""

    def __init__(
        self, sampler: Sampler, refused: Mapping[int, str], request_ids: Int64Array, logits_SV: Tensor
    ) -> None:
        self.row_errors: dict[int, str] = {}
        logprobs: list[TokenLogprobs | None] = []
        tokens: list[Tensor] = []
        for row, request_id in enumerate(request_ids.tolist()):
            error = refused.get(request_id)
            if error is None:
                try:
                    sampled = sampler.sample(request_ids[row : row + 1], logits_SV[row : row + 1])
                    self.row_errors.update(sampled.row_errors)
                    logprobs.append(None if sampled.logprobs is None else sampled.logprobs[0])
                    tokens.append(sampled.token_ids)
                    continue
                except Exception as raised:
                    error = _message(raised)
            self.row_errors[request_id] = error
            logprobs.append(None)
            tokens.append(torch.full((1,), -1, dtype=torch.int32, device=logits_SV.device))
        self.token_ids = torch.cat(tokens)
        self.logprobs = tuple(logprobs)
        self.host_token_ids: Int32Array = np.empty(0, dtype=np.int32)

    def start_read_back(self) -> None:
        self.host_token_ids = self.token_ids.cpu().numpy()


def _message(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"the sampler failed for this row: {type(error).__name__}: {first_line}"
