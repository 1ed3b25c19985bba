"""A pipeline whose ends share the head gives what one with the head on its last stage gives: tokens of all kinds of
rows, logprobs, errors, ends, whether steps are planned ahead of them or not. (Greedy tokens of all families:
`test_exactness.py`.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from pipemax import LLM, SamplingParams
from pipemax.config import ConfigError
from pipemax.executor import process
from pipemax.head_place import HEAD_VARIABLE, HeadPlace, possible_heads
from pipemax.request import RequestOutput
from pipemax.worker import loader
from pipemax.worker.model_slice import StageSlice, can_cut_head
from tests.worker.families import VOCAB_SIZE, config_of, random_model, save_model

NUM_PROMPTS = 20
THIRDS, FIFTHS = list(range(1, VOCAB_SIZE, 3)), list(range(0, VOCAB_SIZE, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB_SIZE, rng.integers(1, 40)).tolist() for _ in range(NUM_PROMPTS)]


def params() -> list[SamplingParams]:
    """Rows of every kind, of lengths that differ; some end by a token, which is in neither half alone."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.8, "top_p": 0.9},
        {
            "temperature": 0.0,
            "repetition_penalty": 1.3,
            "min_tokens": 4,
            "stop_token_ids": list(range(0, VOCAB_SIZE, 5)),
        },
        {"temperature": 1.0, "top_k": 7, "logprobs": 2},
        {"temperature": 0.0, "stop_token_ids": THIRDS},
    ]
    return [
        SamplingParams(**kinds[row % len(kinds)], seed=row, max_tokens=4 + 5 * row % 17, ignore_eos=True)
        for row in range(NUM_PROMPTS)
    ]


def generate(model: Path, head: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[RequestOutput]:
    monkeypatch.setenv(HEAD_VARIABLE, head)
    memory = {"block_size": 4, "num_device_blocks": 34, "num_window_blocks": 12, "host_memory_gib": 0.05}
    with LLM(
        model,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        threads_per_stage=1,
        **memory,
        **settings,
    ) as llm:
        outputs = llm.generate(prompts(), params())
        assert llm.stats().blocks_refilled > 50
    return outputs


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize(("num_stages", "num_batches"), [(2, 2), (3, 4)])
def test_rows_of_all_kinds_come_out_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, num_stages: int, num_batches: int, async_scheduling: bool
) -> None:
    settings = {
        "pipeline_parallel_size": num_stages,
        "num_batches": num_batches,
        "async_scheduling": async_scheduling,
    }
    seen: list[list[StageSlice]] = []
    start_group = process.StageGroup
    monkeypatch.setattr(
        process,
        "StageGroup",
        lambda stages, **options: seen.append([one.stage for one in stages]) or start_group(stages, **options),
    )
    last, ends = (generate(model, head, monkeypatch, **settings) for head in HeadPlace)
    assert [[stage.samples for stage in stages] for stages in seen] == [
        [False] * (num_stages - 1) + [True],
        [True] + [False] * (num_stages - 1),
    ]
    reasons = set()
    for one, other in zip(last, ends, strict=True):
        (wanted,), (got,) = one.outputs, other.outputs
        assert (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason)
        reasons.add(got.finish_reason)
        for ours, theirs in zip(got.logprobs or [], wanted.logprobs or [], strict=True):
            assert list(ours) == list(theirs)
            for token_id, entry in ours.items():
                assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=1e-5)
    assert reasons == {"length", "stop"}
    assert any(output.outputs[0].logprobs for output in ends)


def test_a_place_that_is_none_is_refused_before_anything_starts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEAD_VARIABLE, "middle")
    with pytest.raises(ConfigError, match="PIPEMAX_HEAD must be last or ends, got 'middle'"):
        LLM(model, device="cpu", skip_tokenizer_init=True, pipeline_parallel_size=2)


def test_a_head_that_cannot_be_cut_stays_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OddHead(nn.Linear):
        """Whose logits may depend on all rows."""

    whole = random_model(config_of("llama"))
    assert can_cut_head(whole)
    whole.lm_head.__class__ = OddHead
    assert not can_cut_head(whole)
    monkeypatch.setattr(loader, "can_cut_head", lambda _: False)
    monkeypatch.setenv(HEAD_VARIABLE, "ends")
    with LLM(
        model, device="cpu", skip_tokenizer_init=True, pipeline_parallel_size=2, host_memory_gib=0.05, max_model_len=64
    ) as llm:
        executor: Any = llm.engine.executor
        assert executor.shape.head is HeadPlace.LAST
        (output,) = llm.generate([[3, 4, 5]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3


def test_without_a_wish_the_kind_of_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEAD_VARIABLE, raising=False)
    assert possible_heads("cpu") == (HeadPlace.ENDS,)
    assert set(possible_heads("cuda")) == set(HeadPlace)
    monkeypatch.setenv(HEAD_VARIABLE, "last")
    assert possible_heads("cpu") == possible_heads("cuda") == (HeadPlace.LAST,)
