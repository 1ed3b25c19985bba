"""Tiny float32 models of every family that is tested: few layers, small vocabulary, windows small enough to matter."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 128

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
_HEADS = {**_SIZES, "head_dim": 16}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def config_of(family: str) -> PretrainedConfig:
    """A fresh config of one of `FAMILIES`."""
    match family:
        case "llama":
            return LlamaConfig(**_SIZES, tie_word_embeddings=True)
        case "qwen2":
            return Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=8, layer_types=_MIXED_LAYERS)
        case "qwen3":
            return Qwen3Config(**_HEADS)
        case "mistral":
            return MistralConfig(**_HEADS, sliding_window=8)
        case "phi3":
            return Phi3Config(**_SIZES, partial_rotary_factor=0.5)
        case "olmo2":
            return Olmo2Config(**_SIZES)
        case "gemma2":
            return Gemma2Config(
                **_HEADS,
                sliding_window=8,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=1.0,
            )
        case "gemma3_text":
            return Gemma3TextConfig(**_HEADS, sliding_window=8, query_pre_attn_scalar=16, layer_types=_MIXED_LAYERS)
        case "qwen3_moe":
            return Qwen3MoeConfig(**_HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        case "mixtral":
            return MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
        case "gpt_oss":
            return GptOssConfig(
                **_HEADS,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=8,
                layer_types=_MIXED_LAYERS,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
    raise KeyError(family)


FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
)


def random_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """The whole model with eager attention; every parameter is random, norms, biases and sinks too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("bias"):
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_model(family: str, folder: Path, *, seed: int = 0, max_shard_size: str = "40KB") -> PreTrainedModel:
    """Writes a random model of `family` to `folder` in several shards, and gives the model."""
    model = random_model(config_of(family), seed=seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
