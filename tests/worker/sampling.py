"""What tests of sampling share: devices, requests, a step, and the meaning of the parameters in plain per-row code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipemax.plan import NewRequest
from pipemax.request import SamplingParams
from pipemax.worker.random_draw import uniform_draws
from pipemax.worker.sampler import Sampler

CPU = torch.device("cpu")

on_each_device = pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(
            torch.device("cuda"),
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ],
    ids=str,
)


def new_request(
    request_id: int, sampling: SamplingParams, *, prompt=(0,), seed: int | None = None, stop_token_ids=()
) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        prompt_token_ids=np.array(prompt, np.int32),
        sampling=sampling,
        seed=request_id if seed is None else seed,
        stop_token_ids=tuple(stop_token_ids),
    )


def run(sampler: Sampler, request_ids, logits: np.ndarray) -> list[int]:
    before = torch.tensor(np.asarray(logits, np.float32), device=sampler._device)
    given_logits = before.clone()
    sampled = sampler.sample(np.array(request_ids, np.int64), given_logits)
    assert torch.equal(given_logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    assert sampled.token_ids.dtype == torch.int32 and sampled.row_errors == {}
    return sampled.token_ids.tolist()


# The reference: what each parameter means, one row at a time in float64, with nothing clever.


def reference_logits(logits: np.ndarray, request: NewRequest, outputs: list[int]) -> np.ndarray:
    sampling, x = request.sampling, logits.astype(np.float64)
    if len(outputs) < sampling.min_tokens:
        for token in request.stop_token_ids:
            x[token] = -np.inf
    for token in {*request.prompt_token_ids.tolist(), *outputs}:
        penalty = sampling.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(outputs):
        x[token] -= sampling.frequency_penalty * outputs.count(token) + sampling.presence_penalty
    return x


def reference_probabilities(x: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    x = x / sampling.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0.0
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if sampling.top_k > 0:
        p[order[sampling.top_k :]] = 0.0
    p /= p.sum()
    mass = 0.0
    for token in order:
        if mass >= sampling.top_p and sampling.top_p < 1.0:
            p[token] = 0.0
        mass += p[token]
    return p / p.sum()


def reference_tokens(x: np.ndarray, sampling: SamplingParams, uniform: float) -> set[int]:
    """The token, or the two that float32 weights cannot tell apart at the edges of a filter or of the draw."""
    if sampling.greedy:
        return {int(np.argmax(x))}
    tokens = set()
    for nudge in (-1e-6, 0.0, 1e-6):
        nudged = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=min(1.0, max(1e-12, sampling.top_p + nudge)) if sampling.top_p < 1.0 else 1.0,
            min_p=min(1.0, sampling.min_p * (1.0 + nudge)),
        )
        cdf = np.cumsum(reference_probabilities(x, nudged))
        tokens |= {int(np.searchsorted(cdf, (uniform + u) * cdf[-1], side="right")) for u in (-1e-6, 0.0, 1e-6)}
    return tokens


def uniform(seed: int, output_index: int) -> float:
    return float(uniform_draws(np.array([seed], np.uint64), np.array([output_index], np.uint64))[0])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How far counts are from expected, in standard deviations of the normal that matches chi-square."""
    degrees = len(counts) - 1
    value = float(((counts - expected) ** 2 / expected).sum())
    return (((value / degrees) ** (1 / 3)) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
