"""Logprobs: of the raw logits, with ranks, whatever neighbours ask for and whenever they are read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipemax.request import SamplingParams
from pipemax.worker.sampler import Sampler
from tests.worker.sampling import CPU, new_request, on_each_device

torch.set_num_threads(1)


@on_each_device
def test_logprobs_are_of_the_raw_logits(device: torch.device) -> None:
    rng = np.random.default_rng(4)
    vocab_size = 600
    logits = (rng.standard_normal((4, vocab_size)) * 3).astype(np.float32)
    sampler = Sampler(vocab_size=vocab_size, device=device)
    sampler.add(new_request(0, SamplingParams(logprobs=5, temperature=3.0)))
    sampler.add(new_request(1, SamplingParams()))
    sampler.add(new_request(2, SamplingParams(logprobs=0, temperature=0.0, repetition_penalty=3.0), prompt=range(600)))
    sampler.add(new_request(3, SamplingParams(logprobs=1024, top_k=2)))
    sampled = sampler.sample(np.arange(4), torch.from_numpy(logits).to(device))
    assert sampled.logprobs is not None and sampled.logprobs[1] is None
    expected = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    for row, num_top in ((0, 5), (2, 0), (3, 600)):
        entry = sampled.logprobs[row]
        assert entry is not None
        order = np.argsort(-logits[row], kind="stable")
        token = int(sampled.token_ids[row])
        assert entry.token_ids == (token, *order[:num_top])
        assert entry.ranks == (int(np.flatnonzero(order == token)[0]) + 1, *range(1, num_top + 1))
        assert entry.logprobs == pytest.approx(expected[row][list(entry.token_ids)], abs=1e-5)


def test_logprobs_of_equal_logits() -> None:
    """Lower ids first, equal ones share a rank, and how many the neighbours ask for changes nothing."""
    logits = np.array([[1.0, 3.0, -0.0, 3.0, 0.0, -5.0]] * 2, np.float32)
    sampler = Sampler(vocab_size=6, device=CPU)
    sampler.add(new_request(0, SamplingParams(temperature=0.0, logprobs=2)))
    sampler.add(new_request(1, SamplingParams(temperature=0.0, logprobs=6)))
    first, second = sampler.sample(np.arange(2), torch.from_numpy(logits)).logprobs
    assert first.token_ids == (1, 1, 3) and first.ranks == (1, 1, 1)
    assert second.token_ids == (1, 1, 3, 0, 2, 4, 5) and second.ranks == (1, 1, 1, 3, 4, 4, 6)


@on_each_device
def test_results_read_back_early_are_the_same(device: torch.device) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    logits[1, 7] = math.nan
    results = []
    for early in (False, True):
        sampler = Sampler(vocab_size=50, device=device)
        for i in range(3):
            sampler.add(new_request(i, SamplingParams(logprobs=2)))
        sampled = sampler.sample(np.arange(3), logits)
        tokens = sampled.token_ids.tolist()
        if early:
            sampled.start_read_back()
            if device.type == "cuda":
                torch.cuda.synchronize()
            assert sampled.host_token_ids.tolist() == tokens and sampled.host_token_ids.dtype == np.int32
        results.append((tokens, sampled.row_errors, sampled.logprobs))
    assert results[0] == results[1] and results[0][0][1] == -1


def test_no_logprobs_asked_for() -> None:
    sampler = Sampler(vocab_size=3, device=CPU)
    sampler.add(new_request(0, SamplingParams()))
    assert sampler.sample(np.arange(1), torch.zeros(1, 3)).logprobs is None
