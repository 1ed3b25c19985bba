"""Model sizes that the cost tests use, as in the models' published configurations."""

from __future__ import annotations

import dataclasses

from pipemax.model_spec import ModelSpec

LLAMA_70B = ModelSpec(
    name="Llama-3.1-70B",
    architecture="LlamaForCausalLM",
    num_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=False,
    num_experts=0,
    experts_per_token=0,
    max_position_embeddings=131072,
    sliding_windows=(None,) * 80,
)
LLAMA_8B = dataclasses.replace(
    LLAMA_70B,
    name="Llama-3.1-8B",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    sliding_windows=(None,) * 32,
)
LLAMA_1B = dataclasses.replace(
    LLAMA_8B,
    name="Llama-3.2-1B",
    num_layers=16,
    hidden_size=2048,
    intermediate_size=8192,
    head_dim=64,
    tie_word_embeddings=True,
    sliding_windows=(None,) * 16,
)
QWEN_32B = dataclasses.replace(
    LLAMA_70B,
    name="Qwen2.5-32B",
    num_layers=64,
    hidden_size=5120,
    intermediate_size=27648,
    num_heads=40,
    vocab_size=152064,
    sliding_windows=(None,) * 64,
)
MIXTRAL = dataclasses.replace(
    LLAMA_8B,
    name="Mixtral-8x7B",
    vocab_size=32000,
    num_experts=8,
    experts_per_token=2,
)
