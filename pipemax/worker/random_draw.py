"""The random draw: a request's uniform numbers, and the token that such a number falls on.

The draw is an inverse CDF over weights in the order of token ids. Its uniform number is a pure function of the
request's seed and the number of tokens sampled before. Never here: which tokens may be drawn, and their weights.

Shape letters: R rows, V vocabulary, G groups of the vocabulary, E tokens in a group.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Tokens in one group of the two-level inverse CDF.
_GROUP_TOKENS = 512

_SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniform_draws(seeds: NDArray[np.uint64], output_indices: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, index), on a grid of 2**-53. All [R].

    Counter-based: SplitMix64's finaliser turns the seed into a stream's start, and again (start + index * gamma) into
    the bits. The first pass keeps neighbouring seeds, the common case, from giving overlapping streams.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        bits = _splitmix64(_splitmix64(seeds) + (output_indices + np.uint64(1)) * _SPLITMIX_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def inverse_cdf(weights_RV: Tensor, draws_R: Tensor) -> Tensor:
    """int64 [R]: the token in whose stretch of the cumulated weights, in the order of ids, draw * total falls.

    Weights are float32 and not normalised, draws float64 in [0, 1); sums are float64, first over groups of tokens, then
    within the group that was hit. A token of weight 0 is never chosen, unless all are (then the result means nothing).
    """
    num_rows, vocab_size = weights_RV.shape
    num_groups = -(-vocab_size // _GROUP_TOKENS)
    padding = num_groups * _GROUP_TOKENS - vocab_size
    weights_RGE = torch.nn.functional.pad(weights_RV, (0, padding)).view(num_rows, num_groups, _GROUP_TOKENS)
    ends_RG = weights_RGE.sum(dim=2, dtype=torch.float64).cumsum_(dim=1)
    target_R1 = draws_R[:, None] * ends_RG[:, -1:]
    group_R1 = torch.searchsorted(ends_RG, target_R1, right=True).clamp_(max=num_groups - 1)
    before_R1 = torch.nn.functional.pad(ends_RG, (1, 0)).gather(1, group_R1)
    weights_RE = weights_RGE.gather(1, group_R1[:, :, None].expand(-1, 1, _GROUP_TOKENS))[:, 0]
    ends_RE = weights_RE.cumsum(dim=1, dtype=torch.float64)
    # The group's two sums may differ in the last bit; the rest must fall short of the group's own end.
    rest_R1 = torch.minimum(target_R1 - before_R1, torch.nextafter(ends_RE[:, -1:], torch.zeros_like(target_R1)))
    offset_R1 = torch.searchsorted(ends_RE, rest_R1, right=True)
    return (group_R1 * _GROUP_TOKENS + offset_R1)[:, 0].clamp_(max=vocab_size - 1)
