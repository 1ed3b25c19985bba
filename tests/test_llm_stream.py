"""`LLM.stream`: how far ahead it reads; given up midway, which requests still come out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipemax.llm import LLM, GenerationRequest
from pipemax.request import SamplingParams
from tests.faults.small_job import ENGINE, save_model


def test_giving_up_the_queue_leaves_the_members_of_batches(tmp_path: Path) -> None:
    """Also when most of the queue was prefilled ahead."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    llm = LLM(save_model(tmp_path / "model"), **ENGINE)
    try:
        population = llm._engine.scheduler.population
        given_up = False

        def requests() -> Iterator[GenerationRequest]:
            for number in range(120):
                if given_up:
                    return
                yield GenerationRequest(request_id=str(number), prompt=f"fox {number}", sampling_params=params)

        stream = llm.stream(requests())
        before = [next(stream)]
        while len(population.ready) < 20:
            before.append(next(stream))
        live, in_batches = len(population.requests), population.num_running
        assert live > in_batches + 20
        given_up = True
        llm.drop_queued()
        after = list(stream)
        assert len(after) <= in_batches + len(population.batches) * ENGINE["max_num_seqs"]
        assert len(before) + len(after) < 100
        assert all(len(output.outputs[0].token_ids) == 40 for output in (*before, *after))
        assert len(llm.generate(["fox"] * 3, params)) == 3
    finally:
        llm.shutdown()


def test_requests_are_read_only_as_far_ahead_as_the_engine_needs(tmp_path: Path) -> None:
    """However many there are, no more than a few batches' worth wait to be prefilled."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    most_waiting = num_read = 0
    with LLM(save_model(tmp_path / "model"), **ENGINE) as llm:
        population = llm.engine.scheduler.population

        def requests() -> Iterator[GenerationRequest]:
            nonlocal most_waiting, num_read
            for number in range(1000):
                most_waiting, num_read = max(most_waiting, len(population.waiting) + 1), number + 1
                yield GenerationRequest(request_id=str(number), prompt=f"fox {number}", sampling_params=params)

        stream = llm.stream(requests())
        for _ in range(100):
            next(stream)
        stream.close()
    assert most_waiting == 2 * ENGINE["num_batches"] * ENGINE["max_num_seqs"]
    assert num_read > most_waiting
