"""`RequestTokens`: on the first stage, the tokens of every live request: its prompt, then what was sampled.

The first stage turns a plan's rows into input ids with it. Sampled tokens arrive in step order from the last stage.
Never here: sampling history (`sampler.py` keeps its own), links, finish rules.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipemax.plan import Int64Array, NewRequest, StepPlan


class RequestTokens:
    """Token ids by request id. A failed row's token (-1) is kept as 0: the control plane drops the row a step later."""

    def __init__(self) -> None:
        self._tokens_of: dict[int, list[int]] = {}

    def add(self, request: NewRequest) -> None:
        assert request.request_id not in self._tokens_of, f"request {request.request_id} is new twice"
        self._tokens_of[request.request_id] = request.prompt_token_ids.tolist()

    def forget(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            self._tokens_of.pop(request_id, None)

    def append(self, request_ids: Int64Array, token_ids_S: Tensor) -> None:
        """Sampled tokens, int32 [S] in host memory. Those of requests already forgotten are dropped."""
        for request_id, token_id in zip(request_ids.tolist(), token_ids_S.tolist(), strict=True):
            if (tokens := self._tokens_of.get(request_id)) is not None:
                tokens.append(max(token_id, 0))

    def input_ids(self, plan: StepPlan) -> Tensor:
        """Input ids of the plan's rows, int64 [T], in host memory."""
        input_ids: list[int] = []
        rows = zip(
            plan.request_ids.tolist(), plan.num_computed_tokens.tolist(), plan.num_new_tokens.tolist(), strict=True
        )
        for request_id, first, count in rows:
            tokens = self._tokens_of[request_id]
            assert first + count <= len(tokens), f"step {plan.step_id} needs a token of request {request_id} too early"
            input_ids += tokens[first : first + count]
        return torch.from_numpy(np.array(input_ids, dtype=np.int64))
