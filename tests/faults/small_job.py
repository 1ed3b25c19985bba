"""A small real job: a tiny model with a tokenizer on disk, rows of all kinds, and what its files say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_tokenization import save_byte_level

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "a", "stitch", "in", "time", "saves", "nine")

# Two stages, two batches; the device holds little more than one long row, so blocks travel all the time.
ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "pipeline_parallel_size": 2,
    "num_batches": 2,
    "max_model_len": 96,
    "block_size": 4,
    "num_device_blocks": 60,
    "num_window_blocks": 24,
    "host_memory_gib": 0.01,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 48,
    "threads_per_stage": 1,
}


def save_model(folder: Path) -> Path:
    """A llama of four layers whose greedy outputs vary, with a byte-level tokenizer and a chat template."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_level(folder)
    return folder


def line(custom_id: str, url: str, body: dict[str, Any]) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}, ensure_ascii=False)


def row(number: int, rng: random.Random) -> str:
    """Chat and completions; greedy, seeded and unseeded draws; with and without logprobs; some end early."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 14)))
    body: dict[str, Any] = {"max_tokens": rng.randint(2, 24), "ignore_eos": rng.random() < 0.7}
    match rng.randrange(4):
        case 0:
            body["temperature"] = 0
        case 1:
            body |= {"temperature": 0.8, "seed": rng.randrange(1000), "top_k": 20}
        case 2:
            body |= {"temperature": 1.0, "top_p": 0.9}
        case _:
            body |= {"temperature": 0.5, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    if rng.random() < 0.5:
        body |= {"logprobs": True, "top_logprobs": 2}
        return line(f"row-{number}", "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]})
    return line(f"row-{number}", "/v1/completions", {**body, "prompt": text, "logprobs": 1})


def write_input(path: Path, *, num_rows: int, num_bad: int = 0, seed: int = 5) -> None:
    """Good rows, and bad ones in between: broken lines, rows that are too long, wrong values, used ids."""
    rng = random.Random(seed)
    lines = [row(number, rng) for number in range(num_rows)]
    for number in range(num_bad):
        bad = (
            "{broken",
            line(f"long-{number}", "/v1/completions", {"prompt": "a b c d " * 60}),
            line(f"hot-{number}", "/v1/completions", {"prompt": "a", "temperature": -1}),
            lines[0],
            line(f"role-{number}", "/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}),
        )
        lines.insert(rng.randrange(1, len(lines)), bad[number % len(bad)])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tokens(logprobs: dict[str, Any] | None) -> list[str] | None:
    if logprobs is None:
        return None
    tokens: list[str] = logprobs.get("tokens") or [entry["token"] for entry in logprobs["content"]]
    return tokens


def results(*files: Path) -> dict[str, dict[str, Any]]:
    """Row id to what its line says, less what no two runs share. Every line whole, no row twice.

    Of logprobs the tokens stay: their values differ in the last digits with the other rows of a step.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")
        for text in lines[:-1]:  # what follows the last newline is a torn line, which counts for nothing
            record = json.loads(text)
            if record["response"] is not None:
                record["response"].pop("request_id")
                for name in ("id", "created"):
                    record["response"]["body"].pop(name, None)
                for choice in record["response"]["body"].get("choices", ()):
                    choice["logprobs"] = _tokens(choice["logprobs"])
            assert record["id"] not in found, f"{record['custom_id']} is there twice"
            found[record["id"]] = record
    return found
