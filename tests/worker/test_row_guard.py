"""A row that makes the sampler raise is that row's error, then and later; the others get what they always get."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipemax.plan import NewRequest
from pipemax.request import SamplingParams
from pipemax.worker.row_guard import GuardedSampler
from pipemax.worker.sampler import Sampler

VOCAB_SIZE = 50
POISON_SEED = 13


class RaisingSampler(Sampler):
    """Raises when a row with the poison seed is drawn, as a kernel would that does not like its input."""

    def _draw(self, step: Any, rows: NDArray[np.int64], **depth: Any) -> list[Any]:
        if (step.rows["seed"][rows] == POISON_SEED).any():
            raise IndexError("index 99 is out of bounds\nmore")
        return super()._draw(step, rows, **depth)


def request(request_id: int, *, seed: int, **sampling: Any) -> NewRequest:
    return NewRequest(
        request_id, np.array([3, 4], dtype=np.int32), SamplingParams(**{"temperature": 1.0, **sampling}), seed, (1,)
    )


def run(sampler: Any, requests: list[NewRequest], num_steps: int = 3) -> list[Any]:
    for one in requests:
        sampler.add(one)
    generator = torch.Generator().manual_seed(2)
    steps = []
    for _ in range(num_steps):
        logits_by_id = torch.randn(100, VOCAB_SIZE, generator=generator)
        ids = np.array([one.request_id for one in requests], dtype=np.int64)
        sampled = sampler.sample(ids, logits_by_id[torch.from_numpy(ids)])
        sampled.start_read_back()
        steps.append(sampled)
    return steps


GOOD = [request(i, seed=i + 100, logprobs=2 if i % 2 else None, frequency_penalty=0.5 * (i % 3)) for i in range(6)]


def test_a_row_that_raises_gets_an_error_and_the_others_their_tokens() -> None:
    expected = run(GuardedSampler(Sampler(vocab_size=VOCAB_SIZE, device=torch.device("cpu"))), GOOD)
    sampler = GuardedSampler(RaisingSampler(vocab_size=VOCAB_SIZE, device=torch.device("cpu")))
    steps = run(sampler, [*GOOD[:3], request(50, seed=POISON_SEED), *GOOD[3:]])
    for step, alone in zip(steps, expected, strict=True):
        tokens = step.host_token_ids.tolist()
        assert tokens.pop(3) == -1 and tokens == alone.host_token_ids.tolist()
        assert step.row_errors == {50: "the sampler failed for this row: IndexError: index 99 is out of bounds"}
        logprobs = list(step.logprobs)
        assert logprobs.pop(3) is None
        assert [one and one.token_ids for one in logprobs] == [one and one.token_ids for one in alone.logprobs]
    # Once it is gone, rows are sampled together again.
    sampler.forget([50])
    ids = np.arange(6, dtype=np.int64)
    assert sampler.sample(ids, torch.zeros(6, VOCAB_SIZE)).row_errors == {}


def test_a_request_that_the_sampler_cannot_take_is_refused_until_it_is_forgotten() -> None:
    expected = run(GuardedSampler(Sampler(vocab_size=VOCAB_SIZE, device=torch.device("cpu"))), GOOD)
    sampler = GuardedSampler(Sampler(vocab_size=VOCAB_SIZE, device=torch.device("cpu")))
    bad = request(50, seed="no number")  # type: ignore[arg-type]
    steps = run(sampler, [bad, *GOOD])
    for step, alone in zip(steps, expected, strict=True):
        assert step.host_token_ids.tolist() == [-1, *alone.host_token_ids.tolist()]
        assert set(step.row_errors) == {50} and "TypeError" in step.row_errors[50]
    sampler.forget([50])
    sampler.add(request(50, seed=1))
    assert sampler.sample(np.array([50]), torch.zeros(1, VOCAB_SIZE)).row_errors == {}
