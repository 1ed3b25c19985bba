"""Penalties by hand, over long outputs, in slots used before, and in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.request import SamplingParams
from pipemax.worker import penalties
from pipemax.worker.sampler import Sampler
from tests.worker.sampling import CPU, new_request, run

torch.set_num_threads(1)


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


def test_results_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2)
    prompts = [rng.integers(0, 50, 3 * i) for i in range(9)]
    logits = rng.standard_normal((20, 9, 50))

    def tokens(chunk_entries: int) -> list[list[int]]:
        monkeypatch.setattr(penalties, "_CHUNK_ENTRIES", chunk_entries)
        sampler = Sampler(vocab_size=50, device=CPU)
        for i, prompt in enumerate(prompts):
            sampler.add(new_request(i, sampling if i % 4 else SamplingParams(temperature=0.0), prompt=prompt))
        return [run(sampler, range(9), step) for step in logits]

    together = tokens(1 << 20)
    assert tokens(1) == tokens(100) == together
    assert together != np.argmax(logits, axis=2).tolist()
