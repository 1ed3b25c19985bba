"""The small real model on the example requests: greedy tokens equal `transformers` `generate`, prompt by prompt.

Two stages, a device pool and window so small that blocks travel. `make model` fetches the model; without it this is
skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipemax import LLM, SamplingParams

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
NUM_TOKENS = 12

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="`make model` has not been run")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of every example request, by the tokenizer itself and not by ours."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = []
    for line in (ROOT / "examples" / "requests.jsonl").read_text(encoding="utf-8").splitlines():
        body = json.loads(line)["body"]
        if any(not isinstance(message["content"], str) for message in body.get("messages", [])):
            continue  # this template takes texts only; joining parts is ours (tests/test_tokenization.py)
        if "messages" in body:
            prompts.append(
                tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            )
        else:
            prompts.append(tokenizer(body["prompt"])["input_ids"])
    assert len(prompts) >= 20 and max(map(len, prompts)) > 8 * min(map(len, prompts))
    return prompts


@pytest.mark.timeout(600)
def test_tokens_equal_transformers(prompts):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None
        )
        expected.append(output[0, len(prompt) :].tolist())
    longest_blocks = -(-(max(map(len, prompts)) + NUM_TOKENS) // 16)
    with LLM(
        MODEL,
        pipeline_parallel_size=2,
        device="cpu",
        dtype="float32",
        max_model_len=longest_blocks * 16,
        num_device_blocks=longest_blocks + 12,
        num_window_blocks=longest_blocks - 4,
        host_memory_gib=1,
        threads_per_stage=1,
    ) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
        stats = llm.stats()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert stats.blocks_refilled > stats.blocks_sent_home > 0


def test_chat_answers_like_the_templated_prompt():
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(MODEL, device="cpu", dtype="float32", max_model_len=128, host_memory_gib=1, threads_per_stage=1) as llm:
        answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    assert "Paris" in answer.text and answer.finish_reason == "stop"
