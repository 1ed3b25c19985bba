"""The random draw: uniform numbers that are, and no token of weight zero."""

from __future__ import annotations

import math

import numpy as np
import torch

from pipemax.worker.random_draw import inverse_cdf, uniform_draws
from tests.worker.sampling import chi_square, on_each_device

torch.set_num_threads(1)


def test_uniform_draws_are_uniform_and_independent() -> None:
    n = 1 << 16
    counter = np.arange(n, dtype=np.uint64)
    zero = np.zeros(n, np.uint64)
    streams = {
        "neighbouring seeds, first token": uniform_draws(counter, zero),
        "one seed, all tokens": uniform_draws(zero + np.uint64(12345), counter),
        "both advance": uniform_draws(counter, counter),
        "seeds a power of two apart": uniform_draws(counter << np.uint64(40), zero),
        "seeds gamma apart": uniform_draws(counter * np.uint64(0x9E3779B97F4A7C15), zero),
    }
    for name, draws in streams.items():
        assert draws.min() >= 0.0 and draws.max() < 1.0 and len(np.unique(draws)) == n, name
        assert chi_square(np.bincount((draws * 256).astype(int), minlength=256), np.full(256, n / 256)) < 4, name
        low = np.floor(draws * 2.0**53).astype(np.uint64) & np.uint64(255)
        assert chi_square(np.bincount(low.astype(int), minlength=256), np.full(256, n / 256)) < 4, name
        pairs = (draws[:-1] * 16).astype(int) * 16 + (draws[1:] * 16).astype(int)
        assert chi_square(np.bincount(pairs, minlength=256), np.full(256, (n - 1) / 256)) < 4, name
        for lag in (1, 2, 7):
            assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 4 / math.sqrt(n), name
    first, second = uniform_draws(counter, zero), uniform_draws(counter, zero + np.uint64(1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(n)
    # Streams share no value over their first tokens: neighbouring seeds, seeds a counter's stride apart.
    for stride in (1, 0x9E3779B97F4A7C15):
        seeds = np.repeat(counter[:256] * np.uint64(stride), 256)
        assert len(np.unique(uniform_draws(seeds, np.tile(counter[:256], 256)))) == n


@on_each_device
def test_draws_at_the_ends_never_hit_a_token_of_weight_zero(device: torch.device) -> None:
    weights = torch.zeros(4, 1600, device=device)
    weights[:, 700:1100] = torch.rand(400, generator=torch.Generator().manual_seed(0)).to(device) + 1e-3
    weights[:, 800:900] = 0.0
    weights[2, :] = 0.0
    weights[2, 5] = 1e-30
    ends = weights.double().cumsum(dim=1)
    at_gap = float(ends[3, 850] / ends[3, -1])
    draws = torch.tensor([0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-53, at_gap], dtype=torch.float64, device=device)
    tokens = inverse_cdf(weights, draws).tolist()
    assert tokens[:3] == [700, 1099, 5] and tokens[3] in (799, 900)
    # Weights of very different size: the last group's two sums differ in the last bit in many of these rows.
    weights = (-40 * torch.rand(500, 700, generator=torch.Generator().manual_seed(1))).exp().to(device)
    weights[:, 649] = 0.5
    weights[:, 650:] = 0.0
    tokens = inverse_cdf(weights, torch.full((500,), 1.0 - 2.0**-53, dtype=torch.float64, device=device))
    assert tokens.unique().tolist() == [649]
