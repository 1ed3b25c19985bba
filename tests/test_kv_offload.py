"""A whole engine whose host memory holds less KV than its devices: blocks stay there, and tokens are Transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipemax import LLM, SamplingParams
from tests.worker.families import VOCAB_SIZE, save_model

BLOCK_SIZE = 4
# The first answers are short, so too many of the others are let in.
ANSWER_TOKENS = (*[2] * 8, *[40] * 8)
PROMPT_LENGTHS = (5, 9, 6, 11, 12, 8, 7, 10) * 2
LONGEST_BLOCKS = -(-(max(PROMPT_LENGTHS) + max(ANSWER_TOKENS)) // BLOCK_SIZE)


def test_kv_stays_on_the_devices_and_requests_that_do_not_fit_start_over(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_model("llama", tmp_path)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]
    expected = []
    for prompt, num_tokens in zip(prompts, ANSWER_TOKENS, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
        expected.append(output[0, len(prompt) :].tolist())
    with LLM(
        tmp_path,
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        pipeline_parallel_size=2,
        max_model_len=LONGEST_BLOCKS * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        num_device_blocks=LONGEST_BLOCKS + 6,
        host_memory_gib=3e-5,
        max_num_seqs=7,
        max_num_batched_tokens=24,
        threads_per_stage=1,
    ) as llm:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in ANSWER_TOKENS]
        outputs = llm.generate(prompts, params)
        stats, capacity = llm.stats(), llm.capacity
        assert llm.max_num_seqs == 7
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert (capacity.num_host_blocks, capacity.num_window_blocks) == (0, 0)
    assert (stats.blocks_sent_home, stats.blocks_refilled) == (0, 0)
    assert stats.requests_restarted > 0
