"""Eight stages, each a process, as on a server of eight GPUs: greedy tokens equal those of `transformers`, while all KV
travels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipemax import LLM, SamplingParams

PROMPT_LENGTHS = (3, 17, 9, 30, 26, 5, 12, 21, 8, 14, 29, 2)
NUM_TOKENS = 10
BLOCK_SIZE = 4
LONGEST_BLOCKS = -(-(max(PROMPT_LENGTHS) + NUM_TOKENS) // BLOCK_SIZE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """Ten layers: eight stages cannot be equal."""
    torch.manual_seed(5)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("ten-layers")
    whole = LlamaForCausalLM(config).eval()
    whole.save_pretrained(folder)
    return folder, whole


@pytest.mark.timeout(240)
def test_eight_stages_give_the_tokens_of_the_whole_model(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, whole = model
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 128, length).tolist() for length in PROMPT_LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = whole.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
        )
        expected.append(output[0, len(prompt) :].tolist())
    with LLM(
        folder,
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        pipeline_parallel_size=8,
        max_model_len=LONGEST_BLOCKS * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        num_device_blocks=2 * LONGEST_BLOCKS,
        num_window_blocks=LONGEST_BLOCKS - 2,
        host_memory_gib=0.05,
        max_num_batched_tokens=24,
        threads_per_stage=1,
    ) as llm:
        layers = llm._executor.shape.layers
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
        stats = llm.stats()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len(layers) == 8 and sum(map(len, layers)) == 10 and min(map(len, layers)) == 1
    assert stats.blocks_refilled > sum(-(-length // BLOCK_SIZE) for length in PROMPT_LENGTHS)
