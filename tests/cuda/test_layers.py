"""Own layers and CUDA graphs against Transformers' forward on the same GPU and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from pipemax.attention import flashinfer
from pipemax.cuda_options import AttentionChoice
from pipemax.worker.gpu_stage import open_attention
from pipemax.worker.layer_ops import FlashInferOps, TorchOps
from tests.worker.families import random_model, save_model
from tests.worker.test_llama_layers import SERVED, logits_of
from tests.worker.test_stage_model import Pipeline

SIZES = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**{**SIZES, "num_attention_heads": 4}),
    "qwen3": Qwen3Config(**SIZES),
}


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("family", SERVED)
def test_in_float32_graphs_give_what_transformers_gives(device, family, num_stages, tmp_path):
    save_model(family, tmp_path)
    expected = logits_of(Pipeline(tmp_path, num_stages, device=device))
    own = Pipeline(tmp_path, num_stages, device=device)
    for stage in own.stages:
        assert stage.use_own_layers(TorchOps(), max_model_len=64)
    for got, wanted in zip(logits_of(own), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=3e-5, rtol=3e-5)
    captured = Pipeline(tmp_path, num_stages, device=device)
    for stage in captured.stages:
        stage.use_own_layers(TorchOps(), max_model_len=64)
        stage.capture_pieces(max_tokens=12)  # 13 and more new tokens run without graphs, fewer with idle rows
    for got, wanted in zip(logits_of(captured), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=3e-5, rtol=3e-5)


@pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")
@pytest.mark.parametrize("family", CONFIGS)
def test_in_bfloat16_every_fast_path_is_as_near_to_float32_as_transformers_is(device, family, tmp_path):
    random_model(CONFIGS[family]).save_pretrained(tmp_path)
    exact = logits_of(Pipeline(tmp_path, 1, device=device, dtype="float32"))
    plain = Pipeline(tmp_path, 1, device=device, dtype="bfloat16")
    plain_errors = errors(logits_of(plain), exact)
    for fused, graphs in ((False, False), (True, False), (True, True)):
        fast = Pipeline(tmp_path, 1, device=device, dtype="bfloat16")
        stage = fast.stages[0]
        fast.backend = open_attention(stage, AttentionChoice.FLASHINFER)
        if fused:
            assert stage.use_own_layers(FlashInferOps(), max_model_len=64)
        if graphs:
            stage.capture_pieces(max_tokens=16)
        assert (errors(logits_of(fast), exact) < 1.3 * plain_errors + 1e-3).all(), (fused, graphs)


def errors(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> np.ndarray:
    return np.array([float((g.float() - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)])
