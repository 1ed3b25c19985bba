"""Greedy tokens equal `transformers` `generate`, token by token, for every family, stage count and memory size.

`roomy` keeps everything resident. `tight` has the smallest device pool that the longest request allows, most of it
window, so that every block travels several times. Both run the real thing: stage processes, gloo links, copies beside
compute.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax import LLM, SamplingParams
from pipemax.head_place import HEAD_VARIABLE
from tests.worker.families import FAMILIES, VOCAB_SIZE, save_model

PROMPT_LENGTHS = (3, 17, 9, 40, 26, 33, 5)
NUM_TOKENS = 14
BLOCK_SIZE = 4
LONGEST_BLOCKS = -(-(max(PROMPT_LENGTHS) + NUM_TOKENS) // BLOCK_SIZE)

MEMORY = {
    "roomy": {"num_device_blocks": 256, "num_window_blocks": 0},
    "tight": {"num_device_blocks": LONGEST_BLOCKS + 2, "num_window_blocks": LONGEST_BLOCKS - 2},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, prompts):
    """A random model of a family on disk, and what `generate` makes of the prompts."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    model = save_model(request.param, folder)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "a degenerate model proves nothing"
    return folder, expected


def start(folder, *, num_stages: int, memory: str, **settings) -> LLM:
    return LLM(
        folder,
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        pipeline_parallel_size=num_stages,
        num_batches=max(2, num_stages),
        max_model_len=LONGEST_BLOCKS * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        host_memory_gib=0.05,
        max_num_batched_tokens=24,
        threads_per_stage=1,
        **MEMORY[memory],
        **settings,
    )


CASES = [(num_stages, memory, "last") for num_stages in (1, 2, 3, 4) for memory in MEMORY]


@pytest.mark.parametrize(("num_stages", "memory", "head"), [*CASES, (2, "tight", "ends"), (3, "tight", "ends")])
def test_tokens_equal_transformers(family, prompts, monkeypatch, num_stages, memory, head):
    folder, expected = family
    monkeypatch.setenv(HEAD_VARIABLE, head)
    with start(folder, num_stages=num_stages, memory=memory) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
        stats = llm.stats()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    total_blocks = sum((length + NUM_TOKENS) // BLOCK_SIZE for length in PROMPT_LENGTHS)
    assert stats.blocks_sent_home >= total_blocks // 2
    if memory == "tight":
        assert stats.blocks_refilled >= 3 * total_blocks
    else:
        assert stats.blocks_refilled == 0
