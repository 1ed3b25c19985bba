"""`SampledTokens`: what sampling gave for the rows of a step: tokens on the device, errors and logprobs on the host.

Never here: how tokens are chosen.

Shape letters: S sampling rows of a step.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipemax.plan import Int32Array, Int64Array, TokenLogprobs
from pipemax.worker.logprobs import Logprobs


class SampledTokens:
    """What `Sampler.sample` gave for S rows.

    token_ids   int32 [S] on the device; -1 where the row failed

    `row_errors` and `logprobs` wait for the device when they are first read, and not before; or not at all, if
    `start_read_back` was called and the device has passed that point.
    """

    def __init__(
        self,
        *,
        request_ids: Int64Array,
        output_indices: Int64Array,
        token_ids: Tensor,
        health_S: Tensor,
        logprobs: Logprobs | None,
    ) -> None:
        self.token_ids = token_ids
        self._request_ids = request_ids
        self._output_indices = output_indices
        self._health_S = health_S
        self._logprobs = logprobs

    def start_read_back(self) -> None:
        """Starts copies to the host of all that it will read: `host_token_ids`, `row_errors`, `logprobs`."""
        self._host_token_ids = self.token_ids.to("cpu", non_blocking=True)
        self._health_S = self._health_S.to("cpu", non_blocking=True)
        if self._logprobs is not None:
            self._logprobs = self._logprobs.start_read_back()

    @property
    def host_token_ids(self) -> Int32Array:
        """`token_ids`, once the device has passed `start_read_back`."""
        token_ids: Int32Array = self._host_token_ids.numpy()
        return token_ids

    @cached_property
    def _health(self) -> NDArray[np.float32]:
        health: NDArray[np.float32] = self._health_S.cpu().numpy()
        return health

    @cached_property
    def row_errors(self) -> dict[int, str]:
        """Request id to one line, for each row whose token is -1."""
        return {
            int(self._request_ids[row]): _row_error(float(self._health[row]), int(self._output_indices[row]) + 1)
            for row in np.flatnonzero(~np.isfinite(self._health))
        }

    @cached_property
    def logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """One entry a row, None where not asked for or failed; None when no row asked."""
        return None if self._logprobs is None else self._logprobs.to_host(self._health)


def _row_error(health: float, output_number: int) -> str:
    if health == -math.inf:
        return f"no token is left to choose as output token {output_number}: the logits of all others are -inf"
    value = "NaN" if math.isnan(health) else "+inf"
    return f"the model gave {value} logits for output token {output_number}; try dtype float32 or bfloat16"
