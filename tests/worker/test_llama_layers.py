"""Our own layer forward against Transformers' on the same weights, in float32 on the CPU; which families have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.worker import llama_layers
from pipemax.worker.layer_ops import TorchOps
from tests.worker.families import FAMILIES, VOCAB_SIZE, save_model
from tests.worker.test_stage_model import Pipeline

SERVED = ("llama", "mistral", "qwen2", "qwen3")


def logits_of(pipeline: Pipeline) -> list[torch.Tensor]:
    """Prefill in two chunks beside another row, then decode of both."""
    rng = np.random.default_rng(3)
    first, second = rng.integers(3, VOCAB_SIZE, 21).tolist(), rng.integers(3, VOCAB_SIZE, 6).tolist()
    steps = [
        [(0, 0, first[:13])],
        [(1, 0, second[:5]), (0, 13, first[13:20])],
        [(0, 20, first[20:]), (1, 5, second[5:])],
    ]
    return [pipeline.step(rows) for rows in steps]


@pytest.mark.parametrize("most_mlp_tokens", [5, 1024])  # prompts in parts, and whole
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("family", SERVED)
def test_own_layers_give_what_transformers_gives(family, num_stages, most_mlp_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_layers, "_MOST_MLP_TOKENS", most_mlp_tokens)
    torch.set_num_threads(1)
    save_model(family, tmp_path)
    expected = logits_of(Pipeline(tmp_path, num_stages))
    own = Pipeline(tmp_path, num_stages)
    weight_bytes = [stage.weight_bytes for stage in own.stages]
    for stage in own.stages:
        assert stage.use_own_layers(TorchOps(), max_model_len=64)
    for got, wanted in zip(logits_of(own), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    # The modules look into the merged weights: nothing is held twice, and Transformers' forward still runs on them.
    assert [stage.weight_bytes for stage in own.stages] == weight_bytes
    layer = own.stages[0]._base.layers[0]
    q_proj, k_proj = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    assert q_proj.untyped_storage().data_ptr() == k_proj.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SERVED)))
def test_other_families_keep_their_own_forward(family, tmp_path):
    save_model(family, tmp_path)
    pipeline = Pipeline(tmp_path, 1)
    assert not pipeline.stages[0].use_own_layers(TorchOps(), max_model_len=64)
    assert logits_of(pipeline)[0].isfinite().all()
