"""The filters that need the largest logits in order: top_k, then top_p among what it left.

Of equal logits those of lower ids stay. Never here: min_p (no order needed), the draw.

Shape letters: R rows, V vocabulary, D candidates of a row: its largest logits, sorted.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipemax.plan import Int64Array
from pipemax.worker.upload import upload


def keep_top(
    logits_RV: Tensor,
    top_R: Tensor,
    inverse_temperature_R: Tensor,
    *,
    top_k: Int64Array,
    top_p: NDArray[np.float64],
    depth: int,
) -> Tensor | None:
    """Applies top_k, then top_p, in place (-inf for the tokens that fall away), looking at `depth` candidates of a row.

    logits_RV    float32 [R, V], top_R each row's largest
    top_k        int64 [R] on the host, V: off. At most `depth`, or off
    top_p        float64 [R] on the host, 1: off
    depth        D; V sorts the whole vocabulary

    Gives bool [R] on the device: rows whose candidates did not reach top_p, so that too few tokens are left; or None,
    where that cannot be. The device is not waited for.
    """
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    if depth == vocab_size:
        sorted_RD = logits_RV.sort(dim=1, descending=True).values
    else:
        sorted_RD = logits_RV.topk(depth, dim=1).values
    kept_RD = torch.arange(depth, device=device) < upload(top_k, device)[:, None]
    needs_more_R = None
    if (top_p < 1.0).any():
        shift_R1, scale_R1 = top_R[:, None], inverse_temperature_R[:, None]
        weight_RD = sorted_RD.sub(shift_R1).mul_(scale_R1).exp_().mul_(kept_RD)
        mass_RD = weight_RD.double()
        del weight_RD
        mass_RD.cumsum_(dim=1)
        limit_R1 = upload(top_p, device)[:, None]
        unlimited = (top_k == vocab_size) & (top_p < 1.0)
        if depth < vocab_size and unlimited.any():
            whole_R1 = logits_RV.sub(shift_R1).mul_(scale_R1).exp_().sum(dim=1, keepdim=True, dtype=torch.float64)
            unlimited_R1 = upload(unlimited, device)[:, None]
            limit_R1 = limit_R1 * torch.where(unlimited_R1, whole_R1, mass_RD[:, -1:])
            needs_more_R = (unlimited_R1 & (mass_RD[:, -1:] < limit_R1))[:, 0]
        else:
            limit_R1 = limit_R1 * mass_RD[:, -1:]
        # A token stays while the mass before it is below top_p: the smallest set that reaches top_p, and never none.
        kept_RD[:, 1:].logical_and_(mass_RD[:, :-1] < limit_R1)
        del mass_RD
    num_kept_R1 = kept_RD.sum(dim=1, keepdim=True)
    edge_R1 = sorted_RD.gather(1, num_kept_R1 - 1)
    num_equal_R1 = num_kept_R1 - (sorted_RD > edge_R1).sum(dim=1, keepdim=True)
    del sorted_RD, kept_RD
    _cut(logits_RV, edge_R1, num_equal_R1)
    return needs_more_R


def _cut(logits_RV: Tensor, edge_R1: Tensor, num_equal_R1: Tensor) -> None:
    """Logits above a row's edge stay, and of those equal to it the first `num_equal`; the others become -inf."""
    at_edge_RV = logits_RV == edge_R1
    place_RV = at_edge_RV.to(torch.int32)
    place_RV.cumsum_(dim=1, dtype=torch.int32)
    dropped_RV = place_RV > num_equal_R1.to(torch.int32)  # of one dtype: else one of them is copied to the other
    del place_RV
    dropped_RV.logical_and_(at_edge_RV).logical_or_(logits_RV < edge_R1)
    logits_RV.masked_fill_(dropped_RV, -torch.inf)
