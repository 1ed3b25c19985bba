"""The sampler against plain per-row float64 code, against Transformers' processors, and against statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

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

from pipemax.request import SamplingParams
from pipemax.worker import sampler as sampler_module
from pipemax.worker.sampler import Sampler
from tests.worker.sampling import (
    CPU,
    chi_square,
    new_request,
    on_each_device,
    reference_logits,
    reference_probabilities,
    reference_tokens,
    run,
    uniform,
)

torch.set_num_threads(1)


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
@on_each_device
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


@on_each_device
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


# The same request, whatever is around it


@on_each_device
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


def test_tokens_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every kind, flat ones too, where top_p has to sort; all at once, one by one, and a few at a time."""
    rng = np.random.default_rng(7)
    vocab_size = 2000
    samplings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, frequency_penalty=0.5, min_tokens=2, logprobs=4),
        SamplingParams(),
        SamplingParams(top_p=0.9, logprobs=1),
        SamplingParams(top_p=0.9, temperature=9.0),
        SamplingParams(top_k=1500, top_p=0.8, temperature=9.0),
        SamplingParams(top_k=30, min_p=0.05, repetition_penalty=1.2, min_tokens=1),
    ]
    logits = (rng.standard_normal((4, 3 * len(samplings), vocab_size)) * 3).astype(np.float32)

    def results(chunk_logits: int, sorted_chunk_logits: int):
        monkeypatch.setattr(sampler_module, "_CHUNK_LOGITS", chunk_logits)
        monkeypatch.setattr(sampler_module, "_SORTED_CHUNK_LOGITS", sorted_chunk_logits)
        sampler = Sampler(vocab_size=vocab_size, device=CPU)
        for i in range(logits.shape[1]):
            sampler.add(new_request(i, samplings[i % len(samplings)], stop_token_ids=[1]))
        sampled = [sampler.sample(np.arange(logits.shape[1]), torch.from_numpy(step)) for step in logits]
        return [(one.token_ids.tolist(), one.logprobs) for one in sampled]

    together = results(1 << 22, 1 << 20)
    assert results(1, 1) == results(4 * vocab_size, 2 * vocab_size) == together


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_each_device
def test_half_logits_give_what_their_float32_values_give(device: torch.device, dtype: torch.dtype) -> None:
    vocab_size = 3001
    samplings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=0),
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.9, temperature=5.0),
        SamplingParams(top_k=40, min_p=0.01, presence_penalty=0.4, logprobs=2),
    ]
    logits = torch.randn(3 * len(samplings), vocab_size, generator=torch.Generator().manual_seed(3)).mul(2).to(dtype)
    logits.clamp_(max=5.0)  # equal ones at the top
    logits[7, 5], logits[11, 6], logits[13] = math.nan, math.inf, -math.inf

    def results(given: torch.Tensor):
        sampler = Sampler(vocab_size=vocab_size, device=device)
        for i in range(len(given)):
            sampler.add(new_request(i, samplings[i % len(samplings)], prompt=[3, 4]))
        before = given.clone()
        sampled = [sampler.sample(np.arange(len(given)), given) for _ in range(3)]
        assert torch.equal(given.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
        return [(one.token_ids.tolist(), one.row_errors, one.logprobs) for one in sampled]

    got = results(logits.to(device))
    assert got == results(logits.to(device).float())
    assert set(got[0][1]) == {7, 11, 13}


def test_same_seed_same_tokens_other_seed_others() -> None:
    logits = np.zeros((3, 1000), np.float32)
    sampler = Sampler(vocab_size=1000, device=CPU)
    for request_id, seed in ((0, 5), (1, 5), (2, -5)):
        sampler.add(new_request(request_id, SamplingParams(), seed=seed))
    rows = np.array([run(sampler, [0, 1, 2], logits) for _ in range(20)]).T
    assert rows[0].tolist() == rows[1].tolist() != rows[2].tolist()
    assert len(set(rows[0].tolist())) > 15


# Greedy


@on_each_device
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


# min_tokens


@on_each_device
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


# Memory


def peak_bytes(work: Callable[[], object], folder: Path) -> int:
    """The most that `work` had allocated at once, of tensors on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    path = folder / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    assert changes
    return int(np.cumsum(changes).max())


def test_memory_does_not_grow_with_rows_and_is_had_after_a_warm_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vocab_size, num_rows, chunk_logits = 8192, 96, 1 << 16
    monkeypatch.setattr(sampler_module, "_CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(sampler_module, "_SORTED_CHUNK_LOGITS", chunk_logits // 4)
    sampler = Sampler(vocab_size=vocab_size, device=CPU)
    warm_up = peak_bytes(lambda: sampler.warm_up(num_rows, dtype=torch.bfloat16), tmp_path)
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_bytes = logits.numel() * 2
    assert warm_up < logits_bytes + 20 * chunk_logits
    for sampling in (
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
        SamplingParams(temperature=0.0, logprobs=20),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=50, top_p=0.9),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.9, temperature=100.0),
    ):
        for i in range(num_rows):
            sampler.add(new_request(i, sampling))
        sampler.sample(np.arange(num_rows), logits)
        step = peak_bytes(lambda: sampler.sample(np.arange(num_rows), logits), tmp_path)
        assert 2 * chunk_logits < step <= warm_up - logits_bytes, sampling
        sampler.forget(range(num_rows))


def test_greedy_rows_take_no_memory_of_the_vocabularys_size(tmp_path: Path) -> None:
    sampler = Sampler(vocab_size=8192, device=CPU)
    for i in range(96):
        sampler.add(new_request(i, SamplingParams(temperature=0.0)))
    logits = torch.zeros(96, 8192, dtype=torch.bfloat16)
    assert peak_bytes(lambda: sampler.sample(np.arange(96), logits), tmp_path) < 8192


@on_each_device
def test_a_warm_up_leaves_no_trace(device: torch.device) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 700))

    def tokens(num_warm_rows: int) -> list[list[int]]:
        sampler = Sampler(vocab_size=700, device=device)
        if num_warm_rows:
            sampler.warm_up(num_warm_rows, dtype=torch.float32)
        for i in range(4):
            sampler.add(new_request(i, SamplingParams(top_p=0.8, repetition_penalty=1.4), prompt=range(i)))
        return [run(sampler, range(4), logits) for _ in range(5)]

    assert tokens(0) == tokens(1) == tokens(7)


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
@on_each_device
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
