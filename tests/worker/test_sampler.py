"""The sampler against plain per-row float64 code, against Transformers' processors, and against statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipemax.plan import NewRequest
from pipemax.request import SamplingParams
from pipemax.worker.sampler import Sampler, _inverse_cdf, uniform_draws

torch.set_num_threads(1)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


CPU = torch.device("cpu")


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


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, -1, 1, 2, 7, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.4]),
    min_tokens=st.sampled_from([0, 2]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(samplings=st.lists(SAMPLING, min_size=1, max_size=6), seed=st.integers(0, 2**32), vocab_size=st.integers(8, 700))
def test_agrees_with_per_row_reference(samplings: list[SamplingParams], seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    sampler = Sampler(vocab_size=vocab_size, device=CPU)
    requests = {
        i: new_request(
            i,
            sampling,
            prompt=rng.integers(0, vocab_size, 5),
            seed=int(rng.integers(0, 2**63)),
            stop_token_ids=rng.integers(0, vocab_size, 2).tolist(),
        )
        for i, sampling in enumerate(samplings)
    }
    outputs: dict[int, list[int]] = {i: [] for i in requests}
    for request in requests.values():
        sampler.add(request)
    for _ in range(4):
        ids = rng.permutation([i for i in requests if rng.random() < 0.8]).astype(np.int64)
        logits = (rng.standard_normal((len(ids), vocab_size)) * rng.choice([0.5, 4.0])).astype(np.float32)
        for row, (i, token) in enumerate(zip(ids.tolist(), run(sampler, ids, logits), strict=True)):
            x = reference_logits(logits[row], requests[i], outputs[i])
            assert token in reference_tokens(x, requests[i].sampling, uniform(requests[i].seed, len(outputs[i])))
            outputs[i].append(token)


@pytest.mark.parametrize("scale", [0.0, 0.3, 6.0])
def test_agrees_with_reference_on_a_wide_vocabulary(device: torch.device, scale: float) -> None:
    """More tokens than the candidates a top_p looks at first; scale 0.3 and 0 need the whole vocabulary, 6 does not."""
    rng = np.random.default_rng(3)
    vocab_size = 5003
    samplings = [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.9, top_k=50),
        SamplingParams(top_p=0.5, top_k=3000),
        SamplingParams(top_k=1),
        SamplingParams(top_k=4000, min_p=0.01),
        SamplingParams(top_p=0.999, min_p=0.3, temperature=0.4),
        SamplingParams(temperature=0.0),
    ]
    sampler = Sampler(vocab_size=vocab_size, device=device)
    for i, sampling in enumerate(samplings):
        sampler.add(new_request(i, sampling))
    for step in range(5):
        logits = (rng.standard_normal((len(samplings), vocab_size)) * scale).astype(np.float32)
        for i, token in enumerate(run(sampler, range(len(samplings)), logits)):
            assert token in reference_tokens(logits[i].astype(np.float64), samplings[i], uniform(i, step)), (i, step)


def test_coarse_logits_tie_at_the_filters_edge(device: torch.device) -> None:
    """bfloat16 heads give many equal logits: exactly top_k of them stay, the lower ids."""
    logits = np.zeros((2, 3000), np.float32)
    logits[:, 100::100] = 1.0
    sampler = Sampler(vocab_size=3000, device=device)
    seen: tuple[set[int], set[int]] = (set(), set())
    # top_k 31: the 29 ones and two zeros. top_p over 28 ones, exactly half their mass: 14 of them.
    samplings = [SamplingParams(top_k=31), SamplingParams(top_k=28, top_p=0.5)]
    for i, sampling in enumerate(samplings):
        sampler.add(new_request(i, sampling))
    for _ in range(400):
        for tokens, token in zip(seen, run(sampler, [0, 1], logits), strict=True):
            tokens.add(token)
    assert seen[0] == {*range(100, 3000, 100), 0, 1}
    assert seen[1] == set(range(100, 1500, 100))


# Statistics


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How far counts are from expected, in standard deviations of the normal that matches chi-square."""
    degrees = len(counts) - 1
    value = float(((counts - expected) ** 2 / expected).sum())
    return (((value / degrees) ** (1 / 3)) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


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


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.4, top_k=12, top_p=0.9, min_p=0.03),
    ],
    ids=lambda sampling: f"T{sampling.temperature}-k{sampling.top_k}-p{sampling.top_p}-m{sampling.min_p}",
)
def test_frequencies_follow_the_filtered_distribution(sampling: SamplingParams) -> None:
    vocab_size, num_requests, num_steps = 40, 1000, 20
    logits = np.random.default_rng(11).standard_normal(vocab_size).astype(np.float32) * 1.5
    sampler = Sampler(vocab_size=vocab_size, device=CPU)
    for i in range(num_requests):
        sampler.add(new_request(i, sampling))
    counts = np.zeros(vocab_size, np.int64)
    for _ in range(num_steps):
        tokens = run(sampler, range(num_requests), np.broadcast_to(logits, (num_requests, vocab_size)))
        counts += np.bincount(tokens, minlength=vocab_size)
    p = reference_probabilities(logits.astype(np.float64), sampling)
    assert counts[p == 0.0].sum() == 0
    assert chi_square(counts[p > 0], p[p > 0] * num_requests * num_steps) < 4


def test_draws_at_the_ends_never_hit_a_token_of_weight_zero(device: torch.device) -> None:
    weights = torch.zeros(4, 1600, device=device)
    weights[:, 700:1100] = torch.rand(400, generator=torch.Generator().manual_seed(0)).to(device) + 1e-3
    weights[:, 800:900] = 0.0
    weights[2, :] = 0.0
    weights[2, 5] = 1e-30
    ends = weights.double().cumsum(dim=1)
    at_gap = float(ends[3, 850] / ends[3, -1])
    draws = torch.tensor([0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-53, at_gap], dtype=torch.float64, device=device)
    tokens = _inverse_cdf(weights, draws).tolist()
    assert tokens[:3] == [700, 1099, 5] and tokens[3] in (799, 900)
    # Weights of very different size: the last group's two sums differ in the last bit in many of these rows.
    weights = (-40 * torch.rand(500, 700, generator=torch.Generator().manual_seed(1))).exp().to(device)
    weights[:, 649] = 0.5
    weights[:, 650:] = 0.0
    tokens = _inverse_cdf(weights, torch.full((500,), 1.0 - 2.0**-53, dtype=torch.float64, device=device))
    assert tokens.unique().tolist() == [649]


# The same request, whatever is around it


def test_tokens_do_not_depend_on_the_batch(device: torch.device) -> None:
    """One request alone, then again among others that come and go, in another row each step: the same tokens."""
    rng = np.random.default_rng(5)
    vocab_size, num_steps = 2500, 12
    sampling = SamplingParams(top_p=0.9, top_k=30, repetition_penalty=1.2, frequency_penalty=0.3, temperature=0.8)
    logits = (rng.standard_normal((num_steps, vocab_size)) * 3).astype(np.float32)
    prompt = rng.integers(0, vocab_size, 40)

    def alone() -> list[int]:
        sampler = Sampler(vocab_size=vocab_size, device=device)
        sampler.add(new_request(7, sampling, prompt=prompt, seed=99))
        return [run(sampler, [7], logits[step : step + 1])[0] for step in range(num_steps)]

    def in_company() -> list[int]:
        sampler = Sampler(vocab_size=vocab_size, device=device)
        others = [
            SamplingParams(temperature=0.0, logprobs=3),
            SamplingParams(top_k=2000),
            SamplingParams(presence_penalty=1.0, min_tokens=3),
            SamplingParams(top_p=0.99, temperature=1.5),
            SamplingParams(),
        ]
        sampler.add(new_request(1000, SamplingParams(frequency_penalty=1.0)))
        sampler.add(new_request(7, sampling, prompt=prompt, seed=99))
        sampler.forget([1000])
        tokens = []
        for step in range(num_steps):
            for j, other in enumerate(others):
                other_prompt = rng.integers(0, vocab_size, 200 * j)
                sampler.add(new_request(100 * step + 10 + j, other, prompt=other_prompt, stop_token_ids=[1]))
            company = [100 * s + 10 + j for s in range(max(0, step - 1), step + 1) for j in range(len(others))]
            row = int(rng.integers(0, len(company) + 1))
            ids = [*company[:row], 7, *company[row:]]
            batch = rng.standard_normal((len(ids), vocab_size)).astype(np.float32)
            batch[row] = logits[step]
            tokens.append(run(sampler, ids, batch)[row])
            if step > 0:
                sampler.forget([100 * (step - 1) + 10 + j for j in range(len(others))])
        return tokens

    assert in_company() == alone()


def test_same_seed_same_tokens_other_seed_others() -> None:
    logits = np.zeros((3, 1000), np.float32)
    sampler = Sampler(vocab_size=1000, device=CPU)
    for request_id, seed in ((0, 5), (1, 5), (2, -5)):
        sampler.add(new_request(request_id, SamplingParams(), seed=seed))
    rows = np.array([run(sampler, [0, 1, 2], logits) for _ in range(20)]).T
    assert rows[0].tolist() == rows[1].tolist() != rows[2].tolist()
    assert len(set(rows[0].tolist())) > 15


# Greedy


def test_greedy_takes_the_lowest_of_equal_logits(device: torch.device) -> None:
    vocab_size = 4099
    rng = np.random.default_rng(2)
    logits = rng.integers(0, 3, (64, vocab_size)).astype(np.float32)
    sampler = Sampler(vocab_size=vocab_size, device=device)
    for i in range(64):
        sampler.add(new_request(i, SamplingParams(temperature=0.0)))
    assert run(sampler, range(64), logits) == [int(np.flatnonzero(row == 2.0)[0]) for row in logits]


def test_extreme_temperatures_are_not_errors() -> None:
    logits = np.array([[1.0, 2.0, 1.5, -np.inf]] * 4, np.float32)
    sampler = Sampler(vocab_size=4, device=CPU)
    temperatures = [1e-300, 1e-30, 1e30, 1e300]
    for i, temperature in enumerate(temperatures):
        sampler.add(new_request(i, SamplingParams(temperature=temperature, min_p=0.5)))
    tokens = np.array([run(sampler, range(4), logits) for _ in range(60)]).T
    assert set(tokens[0]) == set(tokens[1]) == {1}
    assert set(tokens[2]) == set(tokens[3]) == {0, 1, 2}


# Penalties and min_tokens


def test_penalties_by_hand() -> None:
    """Prompt 0 0 1; output 2 2 3. Each step's logits make the next output and the penalised rest visible."""
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(vocab_size=6, device=CPU)
    sampler.add(new_request(0, sampling, prompt=[0, 0, 1]))

    def step(logits: list[float]) -> int:
        return run(sampler, [0], np.array([logits]))[0]

    # Nothing in the output: the prompt's 0 and 1 are halved (5.9 -> 2.95), or doubled below zero.
    assert step([5.9, 5.9, 3.0, 0.0, 0.0, 0.0]) == 2
    # 2 is once in the output: 8 -> 8/2 - 0.25 - 0.5 = 3.25.
    assert step([0.0, 0.0, 8.0, 3.26, 0.0, 0.0]) == 3
    # 2 once: -0.1 -> -0.2 - 0.75 = -0.95; 3 once: -0.95; the prompt's 0: -0.4 -> -0.8; 4 and 5 untouched.
    assert step([-0.4, -9.0, -0.1, -0.1, -0.9, -0.81]) == 0
    assert step([-9.0, -9.0, 8.0, 3.0, 3.24, 3.26]) == 5
    assert step([0.0, 0.0, 8.0, 0.0, 3.24, 0.0]) == 2
    # 2 is twice in the output: 8 -> 4 - 0.5 - 0.5 = 3.
    assert step([0.0, 0.0, 8.0, 0.0, 3.01, 0.0]) == 4
    assert step([0.0, 0.0, 8.0, 0.0, 0.0, 0.0]) == 2


def test_presence_and_frequency_leave_the_prompt_alone() -> None:
    sampler = Sampler(vocab_size=3, device=CPU)
    sampler.add(new_request(0, SamplingParams(temperature=0.0, presence_penalty=2.0), prompt=[1, 1]))
    sampler.add(new_request(1, SamplingParams(temperature=0.0, frequency_penalty=2.0), prompt=[1, 1]))
    logits = np.array([[0.0, 3.5, 1.8]] * 2, np.float32)
    assert [run(sampler, [0, 1], logits) for _ in range(4)] == [[1, 1], [2, 2], [1, 1], [1, 0]]


def test_long_outputs_count_on() -> None:
    """History outgrows its first allocation several times; greedy under frequency penalty cycles through all tokens."""
    vocab_size, num_steps = 300, 900
    sampler = Sampler(vocab_size=vocab_size, device=CPU)
    sampler.add(new_request(0, SamplingParams(temperature=0.0, frequency_penalty=0.5)))
    logits = np.zeros((1, vocab_size), np.float32)
    tokens = [run(sampler, [0], logits)[0] for _ in range(num_steps)]
    assert tokens == [step % vocab_size for step in range(num_steps)]


def test_penalty_slots_are_clean_when_reused() -> None:
    """One leaves counts of its output behind, where the other has tokens of its prompt."""
    sampler = Sampler(vocab_size=3, device=CPU)
    for request_id in range(60):
        sampler.add(new_request(request_id, SamplingParams(temperature=0.0, presence_penalty=1.0), prompt=[1]))
        assert [run(sampler, [request_id], np.array([[2.0, 1.1, 0.5]]))[0] for _ in range(2)] == [0, 1]
        sampler.forget([request_id, 12345])
        sampling = SamplingParams(temperature=0.0, presence_penalty=1.0, repetition_penalty=1.01)
        sampler.add(new_request(100 + request_id, sampling, prompt=[0, 1]))
        assert run(sampler, [100 + request_id], np.array([[2.0, 1.1, 1.5]])) == [0]
        sampler.forget([100 + request_id])


def test_prompt_tokens_outside_the_vocabulary_are_passed_over() -> None:
    sampler = Sampler(vocab_size=4, device=CPU)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.0, min_tokens=1)
    for request_id, prompt in enumerate(([9, 3], [9], [0])):
        sampler.add(new_request(request_id, sampling, prompt=prompt, stop_token_ids=[70, 2]))
    assert run(sampler, [0, 1, 2], np.array([[1.1, 1.0, 3.0, 2.0], [1.1, 1.0, 3.0, 0.9], [1.1, 1.0, 3.0, 0.9]])) == [
        0,
        0,
        1,
    ]


def test_absurd_penalties_are_not_errors() -> None:
    sampler = Sampler(vocab_size=3, device=CPU)
    for request_id, penalty in enumerate((1e-300, 1e-39, 1e300)):
        sampler.add(new_request(request_id, SamplingParams(repetition_penalty=penalty, temperature=0.0), prompt=[1]))
    assert run(sampler, [0, 1, 2], np.array([[9.5, 9.0, 0.0]] * 3)) == [1, 1, 0]


def test_min_tokens_hold_back_end_tokens(device: torch.device) -> None:
    logits = np.array([[0.0, 9.0, 8.0, 1.0]] * 3, np.float32)
    sampler = Sampler(vocab_size=4, device=device)
    sampler.add(new_request(0, SamplingParams(temperature=0.0, min_tokens=2), stop_token_ids=[1, 2]))
    sampler.add(new_request(1, SamplingParams(temperature=0.3, min_tokens=1, top_k=2), stop_token_ids=[1]))
    sampler.add(new_request(2, SamplingParams(temperature=0.0), stop_token_ids=[1]))
    steps = [run(sampler, [0, 1, 2], logits) for _ in range(3)]
    assert [tokens[0] for tokens in steps] == [3, 3, 1]
    assert steps[0][1] in (2, 3)
    assert [tokens[2] for tokens in steps] == [1, 1, 1]


@pytest.mark.parametrize(
    ("sampling", "processor"),
    [
        (SamplingParams(temperature=0.7), TemperatureLogitsWarper(0.7)),
        (SamplingParams(top_k=9), TopKLogitsWarper(9)),
        (SamplingParams(top_p=0.7), TopPLogitsWarper(0.7)),
        (SamplingParams(min_p=0.15), MinPLogitsWarper(0.15)),
        (SamplingParams(repetition_penalty=1.7), RepetitionPenaltyLogitsProcessor(1.7)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_agrees_with_transformers(sampling: SamplingParams, processor) -> None:
    rng = np.random.default_rng(8)
    vocab_size, num_requests = 300, 200
    prompts = rng.integers(0, vocab_size, (num_requests, 60))
    sampler = Sampler(vocab_size=vocab_size, device=CPU)
    for i in range(num_requests):
        sampler.add(new_request(i, sampling, prompt=prompts[i]))
    logits = (rng.standard_normal((num_requests, vocab_size)) * 2).astype(np.float32)
    scores = processor(torch.from_numpy(prompts), torch.from_numpy(logits))
    cdf = scores.double().softmax(dim=1).cumsum(dim=1).numpy()
    checked = 0
    for i, token in enumerate(run(sampler, range(num_requests), logits)):
        u = uniform(i, 0)
        if np.abs(cdf[i] - u).min() > 1e-6:
            assert token == np.searchsorted(cdf[i], u, side="right")
            checked += 1
    assert checked > num_requests * 0.9


# Logprobs


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


# Bad rows


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(top_p=0.9, logprobs=2),
        SamplingParams(top_k=3, min_p=0.1, repetition_penalty=1.1, min_tokens=5, logprobs=2),
    ],
    ids=["greedy", "top_p", "everything"],
)
def test_bad_rows_fail_alone(device: torch.device, sampling: SamplingParams) -> None:
    rng = np.random.default_rng(6)
    vocab_size = 1500
    good = (rng.standard_normal((6, vocab_size)) * 2).astype(np.float32)
    bad = good.copy()
    bad[0, 0] = np.nan  # also where min_tokens would hide it
    bad[2, 1499] = np.inf
    bad[3, :] = -np.inf
    bad[5, :] = np.nan
    bad[4, 7:] = -np.inf  # not bad: some are left

    def sample(logits: np.ndarray):
        sampler = Sampler(vocab_size=vocab_size, device=device)
        for i in range(6):
            sampler.add(new_request(10 + i, sampling, prompt=[3, 4], stop_token_ids=[0]))
        results = [sampler.sample(np.arange(10, 16), torch.from_numpy(logits).to(device))]
        results.append(sampler.sample(np.arange(10, 16), torch.from_numpy(good).to(device)))  # and life goes on
        return results

    (clean, clean_after), (mixed, mixed_after) = sample(good), sample(bad)
    assert mixed.token_ids[[0, 2, 3, 5]].tolist() == [-1] * 4
    assert set(mixed.row_errors) == {10, 12, 13, 15}
    assert "NaN" in mixed.row_errors[10] and "+inf" in mixed.row_errors[12] and "no token" in mixed.row_errors[13]
    assert all("output token 1" in message and "\n" not in message for message in mixed.row_errors.values())
    assert [entry is None for entry in mixed.logprobs] == [True, False, True, True, False, True]
    assert int(mixed.token_ids[1]) == int(clean.token_ids[1])
    assert 0 <= int(mixed.token_ids[4]) < 7
    assert clean.row_errors == clean_after.row_errors == mixed_after.row_errors == {}
    assert int(mixed_after.token_ids[1]) == int(clean_after.token_ids[1])


def test_nothing_left_after_min_tokens() -> None:
    sampler = Sampler(vocab_size=3, device=CPU)
    for i, temperature in enumerate((0.0, 1.0)):
        sampler.add(new_request(i, SamplingParams(min_tokens=1, temperature=temperature), stop_token_ids=[1, 2]))
    sampled = sampler.sample(np.arange(2), torch.tensor([[-math.inf, 1.0, 2.0]] * 2))
    assert sampled.token_ids.tolist() == [-1, -1] and set(sampled.row_errors) == {0, 1}


def test_step_without_sampling_rows() -> None:
    sampled = Sampler(vocab_size=3, device=CPU).sample(np.zeros(0, np.int64), torch.zeros(0, 3))
    assert sampled.token_ids.shape == (0,) and sampled.row_errors == {} and sampled.logprobs is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_does_not_wait_for_the_device() -> None:
    """Greedy, penalties, min_tokens, seeds, top_k and logprobs: no synchronisation before results are read."""
    device = torch.device("cuda")
    vocab_size = 32_000
    samplings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, min_tokens=4, logprobs=3),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
        SamplingParams(),
    ]
    sampler = Sampler(vocab_size=vocab_size, device=device)
    logits = torch.randn(len(samplings), vocab_size, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, sampling in enumerate(samplings):
            sampler.add(new_request(i, sampling, prompt=[5, 6, 7], stop_token_ids=[2]))
        results = [sampler.sample(np.arange(len(samplings)), logits) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.row_errors == {} for result in results)
