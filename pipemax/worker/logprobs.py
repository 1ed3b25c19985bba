"""`Logprobs`: of the rows that asked, the sampled token and the likeliest ones, from the raw logits.

On the device until they are read. Never here: what is done to logits before a token is chosen.

Shape letters: S sampling rows of a step, R some of them, V vocabulary, N alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipemax.plan import Int64Array, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs of the rows that asked, still on the device.

    rows, num_top   int64 [R] on the host: which rows of the step, and how many top tokens each asked for
    ids, values, ranks   [R, 1 + N], N the largest of num_top
    """

    rows: Int64Array
    num_top: Int64Array
    ids: Tensor
    values: Tensor
    ranks: Tensor

    def start_read_back(self) -> Logprobs:
        """The same with tensors on the host, once the device has passed this point."""
        ids, values, ranks = (t.to("cpu", non_blocking=True) for t in (self.ids, self.values, self.ranks))
        return Logprobs(self.rows, self.num_top, ids, values, ranks)

    def to_host(self, health: NDArray[np.float32]) -> tuple[TokenLogprobs | None, ...]:
        """One entry for each row of the step; health [S] is finite where the row has a token."""
        entries: list[TokenLogprobs | None] = [None] * len(health)
        lists = zip(self.ids.tolist(), self.values.tolist(), self.ranks.tolist(), strict=True)
        for row, num_top, (ids, values, ranks) in zip(self.rows.tolist(), self.num_top.tolist(), lists, strict=True):
            if math.isfinite(health[row]):
                end = 1 + num_top
                entries[row] = TokenLogprobs(tuple(ids[:end]), tuple(values[:end]), tuple(ranks[:end]))
        return tuple(entries)


def top_logprobs(logits_RV: Tensor, token_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (int64), logprobs (float32) and ranks (int64), each [R, 1 + num_top]: the given token, then the top ones.

    logits_RV is float32. Of equal logits the lower id comes first; all of them have the rank of the first.
    """
    token_R1 = token_R[:, None]
    ids, ranks = token_R1, (logits_RV > logits_RV.gather(1, token_R1)).sum(dim=1, keepdim=True) + 1
    if num_top > 0:
        top_RN = _top_ids(logits_RV, num_top)
        value_RN = logits_RV.gather(1, top_RN)
        place_N = torch.arange(num_top, device=logits_RV.device)
        lower_RN = torch.nn.functional.pad(value_RN[:, 1:] < value_RN[:, :-1], (1, 0))
        top_rank_RN = (place_N * lower_RN).cummax(dim=1).values + 1
        ids, ranks = torch.cat([ids, top_RN], dim=1), torch.cat([ranks, top_rank_RN], dim=1)
    return ids, logits_RV.log_softmax(dim=1).gather(1, ids), ranks


def _top_ids(logits_RV: Tensor, num_top: int) -> Tensor:
    """int64 [R, N]: the ids of the largest logits in order.

    topk leaves the order of equal values open, so it sorts integers that are never equal: the float's bits, made to
    order like integers, above the id counted downwards.
    """
    vocab_size = logits_RV.shape[1]
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # a copy; and -0.0 is 0.0 now
    bits_RV ^= (bits_RV >> 31).bitwise_and_(0x7FFFFFFF)
    ordered_RV = bits_RV.to(torch.int64)
    del bits_RV
    ordered_RV.mul_(1 << 32).add_(torch.arange(vocab_size - 1, -1, -1, device=logits_RV.device))
    return ordered_RV.topk(num_top, dim=1).indices
