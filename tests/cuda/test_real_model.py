"""The small real model on the example requests: a GPU's tokens in float32 are the CPU's, over one stage and over two.

`make model` fetches the model; without it this is skipped.
"""

from __future__ import annotations

import pytest

from pipemax import LLM, SamplingParams
from tests.cuda.test_tokens import devices
from tests.test_smollm2 import MODEL, prompts  # noqa: F401

NUM_TOKENS = 48

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="`make model` has not been run")


def tokens_of(prompts: list[list[int]], *, num_stages: int, **settings) -> list[list[int]]:  # noqa: F811
    """Greedy tokens, with so few device blocks that those of most requests travel."""
    longest_blocks = -(-(max(map(len, prompts)) + NUM_TOKENS) // 16)
    with LLM(
        MODEL,
        pipeline_parallel_size=num_stages,
        num_batches=2,
        dtype="float32",
        max_model_len=longest_blocks * 16,
        num_device_blocks=longest_blocks + 12,
        num_window_blocks=longest_blocks - 4,
        host_memory_gib=1,
        **settings,
    ) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
        stats = llm.stats()
    assert stats.blocks_refilled > stats.blocks_sent_home > 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(prompts) -> list[list[int]]:  # noqa: F811
    return tokens_of(prompts, num_stages=1, device="cpu")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_stages", "where"), [(1, "one gpu"), (2, "one gpu"), (2, "a gpu each")])
@pytest.mark.parametrize("fast_paths", [False, True])
def test_real_text_has_the_cpus_tokens(prompts, expected, num_stages, where, fast_paths):  # noqa: F811
    settings = {"attention_backend": "reference", "fused_layers": fast_paths, "cuda_graphs": fast_paths}
    placed = devices(num_stages, where)
    assert tokens_of(prompts, num_stages=num_stages, device="cuda", stage_devices=placed, **settings) == expected
