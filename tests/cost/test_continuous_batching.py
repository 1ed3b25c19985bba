"""Continuous batching, step by step on small caches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipemax.cost.continuous_batching import BatchingLimits, ContinuousBatching
from pipemax.cost.workload import RequestLengths


def batching(lengths, *, blocks=100, seqs=8, tokens=100) -> ContinuousBatching:
    limits = BatchingLimits(num_blocks=blocks, block_size=4, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    return ContinuousBatching(workload=[RequestLengths(*pair) for pair in lengths], limits=limits)


def rows(step) -> dict[int, int]:
    return dict(zip(step.requests, step.num_new, strict=True))


def all_steps(engine) -> list[dict[int, int]]:
    steps = []
    while not engine.is_done:
        step = engine.schedule()
        steps.append(rows(step))
        engine.complete(step)
    return steps


def test_prompts_are_chunked_beside_decoding():
    assert all_steps(batching([(3, 3), (7, 2)], tokens=6)) == [
        {0: 3, 1: 3},
        {0: 1, 1: 4},
        {0: 1, 1: 1},
    ]


def test_rows_are_limited():
    assert all_steps(batching([(2, 1), (2, 1), (2, 1)], seqs=2)) == [{0: 2, 1: 2}, {2: 2}]


def test_the_last_admitted_starts_over_when_memory_is_short():
    engine = batching([(4, 6), (4, 6)], blocks=4)
    # Two blocks each hold up to 8 tokens; for the ninth request 0 takes request 1's memory, which comes back with all
    # of its tokens to compute again.
    assert all_steps(engine) == [
        {0: 4, 1: 4},
        {0: 1, 1: 1},
        {0: 1, 1: 1},
        {0: 1, 1: 1},
        {0: 1, 1: 1},
        {0: 1},
        {1: 9},
    ]
    assert engine.num_preemptions == 1


def test_requests_in_flight_are_passed_over():
    engine = batching([(4, 2), (4, 2)], tokens=4)
    first, second = engine.schedule(), engine.schedule()
    assert (rows(first), rows(second)) == ({0: 4}, {1: 4})
    assert engine.schedule() is None
    engine.complete(first)
    assert rows(engine.schedule()) == {0: 1}


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12)


@given(lengths, st.integers(6, 20), st.integers(1, 6), st.integers(1, 30))
def test_every_token_is_yielded_once_however_short_memory_is(pairs, blocks, seqs, tokens):
    engine = batching(pairs, blocks=blocks, seqs=seqs, tokens=tokens)
    samples = 0
    while not engine.is_done:
        step = engine.schedule()
        assert step.load.num_tokens <= tokens and step.load.num_rows <= seqs
        samples += step.load.num_samples
        engine.complete(step)
    assert samples == sum(output for _, output in pairs)
    assert engine._free_blocks == blocks
