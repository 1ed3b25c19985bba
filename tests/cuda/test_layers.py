"""Own layers, merged GEMMs and CUDA graphs against Transformers' forward on the same GPU and weights."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Olmo2Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from pipemax.attention import flashinfer
from pipemax.attention.flashinfer_plan import SplitWorkspace
from pipemax.cuda_options import AttentionChoice, CudaOptions
from pipemax.worker import llama_layers
from pipemax.worker.decode_graphs import DecodeGraphs
from pipemax.worker.gemm_library import LIBRARY_VARIABLE, BlasLibrary, GemmLibrary, gemm_library
from pipemax.worker.gemm_timer import GemmTimer
from pipemax.worker.gpu_stage import open_attention, use_fast_paths
from pipemax.worker.layer_ops import FlashInferOps, TorchOps
from tests.worker.families import FAMILIES, random_model, save_model
from tests.worker.test_llama_layers import SERVED, logits_of
from tests.worker.test_stage_model import BLOCK_SIZE, Pipeline

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
# Without layers of our own; with biases, norms behind the projections, experts (all of them: a choice may tip over).
OTHER_CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, sliding_window=8),
    "olmo2": Olmo2Config(**{**SIZES, "num_attention_heads": 4, "head_dim": 64}, attention_bias=True),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=128),
}


class _PreferringTimer(GemmTimer):
    """Times everything, and says that the other library is the quicker one."""

    def seconds(self, gemms, num_tokens, library):
        taken = super().seconds(gemms, num_tokens, library)
        assert taken > 0
        return 2.0 if library is BlasLibrary.DEFAULT else 1.0


@pytest.fixture(params=["measured", "cublaslt", "default"])
def library(request, monkeypatch):
    """What GEMMs of captured steps are computed in: as measured, all in the other library, all in torch's own."""
    if request.param == "cublaslt":
        monkeypatch.setattr(llama_layers, "GemmTimer", _PreferringTimer)
    monkeypatch.setenv(LIBRARY_VARIABLE, GemmLibrary.DEFAULT if request.param == "default" else GemmLibrary.QUICKEST)
    gemm_library.cache_clear()
    yield request.param
    gemm_library.cache_clear()


def libraries_of(stage, num_tokens: int) -> set[BlasLibrary]:
    own = stage.own_layers
    return {own._libraries.of(gemm, num_tokens) for gemm in (own._layers[0].qkv, own._layers[0].down)}


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


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SERVED)))
def test_in_float32_merged_gemms_give_what_transformers_gives(device, family, num_stages, tmp_path):
    save_model(family, tmp_path)
    expected = logits_of(Pipeline(tmp_path, num_stages, device=device))
    merged = Pipeline(tmp_path, num_stages, device=device)
    for stage in merged.stages:
        use_fast_paths(stage, CudaOptions(), max_model_len=64, max_num_seqs=12)
        assert stage.own_layers is None
    for got, wanted in zip(logits_of(merged), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=3e-5, rtol=3e-5)
    for stage in merged.stages:
        groups = stage.merge_linears()
        assert groups.num_sharing == groups.num_groups and (groups.num_groups > 0) == (family != "phi3")


@pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")
@pytest.mark.parametrize("family", OTHER_CONFIGS)
def test_in_bfloat16_merged_gemms_are_as_near_to_float32_as_transformers_is(device, family, tmp_path):
    random_model(OTHER_CONFIGS[family]).save_pretrained(tmp_path)
    exact = logits_of(Pipeline(tmp_path, 1, device=device, dtype="float32"))
    results = {}
    for fused in (False, True):
        pipeline = Pipeline(tmp_path, 1, device=device, dtype="bfloat16")
        stage = pipeline.stages[0]
        pipeline.backend = open_attention(stage, AttentionChoice.FLASHINFER)
        allocated = torch.cuda.memory_allocated(device)
        use_fast_paths(stage, CudaOptions(fused_layers=fused), max_model_len=64, max_num_seqs=12)
        # Nothing is held twice: but for rounding to the allocator's pieces, a merged weight takes what its parts took.
        assert torch.cuda.memory_allocated(device) <= allocated + 512 * 2 * stage.spec.num_layers
        results[fused] = errors(logits_of(pipeline), exact)
        if fused:
            assert 0 < stage.merge_linears().num_sharing == stage.merge_linears().num_groups
    assert (results[True] < 1.3 * results[False] + 1e-3).all(), results


@pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")
@pytest.mark.parametrize("family", CONFIGS)
def test_in_bfloat16_every_fast_path_is_as_near_to_float32_as_transformers_is(device, family, library, tmp_path):
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
            if library != "measured":
                assert libraries_of(stage, 16) == {BlasLibrary[library.upper()]}
        assert (errors(logits_of(fast), exact) < 1.3 * plain_errors + 1e-3).all(), (fused, graphs)


def errors(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> np.ndarray:
    return np.array([float((g.float() - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)])


class _RowsSeen:
    """An attention backend that remembers the rows of its plan."""

    def __init__(self, backend):
        self._backend = backend
        self.rows = None

    def plan(self, rows):
        self.rows = rows
        self._backend.plan(rows)

    def __getattr__(self, name):
        return getattr(self._backend, name)


class _DecodeInGraphs:
    """A stage whose decode steps run from graphs."""

    def __init__(self, model, graphs, seen):
        self._model, self._graphs, self._seen = model, graphs, seen
        self.num_served = 0

    def forward(self, *, input_ids_T, hidden_TH, positions_T, step_context):
        if not self._graphs.serves(self._seen.rows):
            return self._model.forward(
                input_ids_T=input_ids_T, hidden_TH=hidden_TH, positions_T=positions_T, step_context=step_context
            )
        self.num_served += 1
        return self._graphs.forward(input_ids_T, positions_T, self._seen.rows, step_context.fences)

    def __getattr__(self, name):
        return getattr(self._model, name)


def decode_steps() -> list[list[tuple[int, int, list[int]]]]:
    """Prefill of six rows of different lengths, then decode of fewer and fewer of them."""
    rng = np.random.default_rng(5)
    lengths = [3, 30, 4, 17, 8, 11]
    steps = [[(row, 0, rng.integers(3, 128, length).tolist()) for row, length in enumerate(lengths)]]
    for turn in range(14):
        alive = range(len(lengths) - turn // 3)
        steps.append([(row, lengths[row] + turn, rng.integers(3, 128, 1).tolist()) for row in alive])
    return steps


@pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("most_split_rows", [32, 2], ids=["planned anew", "from 3 rows on planned once"])
def test_decode_graphs_are_as_near_to_float32_as_steps_without_graphs(
    device, family, library, most_split_rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(SplitWorkspace, "most_split_rows", most_split_rows)
    random_model(CONFIGS[family]).save_pretrained(tmp_path)
    exact_pipeline = Pipeline(tmp_path, 1, device=device, dtype="float32")
    exact = [exact_pipeline.step(rows) for rows in decode_steps()]
    results = {}
    for graphs in (False, True):
        pipeline = Pipeline(tmp_path, 1, device=device, dtype="bfloat16")
        stage = pipeline.stages[0]
        attention = open_attention(stage, AttentionChoice.FLASHINFER)
        pipeline.backend = _RowsSeen(attention)
        stage.use_own_layers(FlashInferOps(), max_model_len=64)
        scratch_slot = max(pipeline.free)
        pipeline.free.remove(scratch_slot)
        if graphs:
            stage.capture_pieces(max_tokens=5)  # measures; the prompts, which are longer, run without graphs
            captured = DecodeGraphs(
                stage.own_layers,
                stage=stage.stage,
                backend=attention,
                pools=pipeline.stores[0],
                scratch_slot=scratch_slot,
                block_size=BLOCK_SIZE,
                max_rows=5,
            )
            pipeline.stages[0] = _DecodeInGraphs(stage, captured, pipeline.backend)
        results[graphs] = errors([pipeline.step(rows) for rows in decode_steps()], exact)
        if graphs:
            assert pipeline.stages[0].num_served == 11  # all but the steps of six rows
    assert (results[True] < 1.5 * results[False] + 2e-3).all(), results


@pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")
def test_measuring_libraries_keeps_no_memory_and_leaves_the_setting_as_it_was(device, tmp_path, monkeypatch):
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    gemm_library.cache_clear()
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    stage = Pipeline(tmp_path, 1, device=device, dtype="bfloat16").stages[0]
    stage.use_own_layers(FlashInferOps(), max_model_len=64)
    before = torch.backends.cuda.preferred_blas_library()
    held = []
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(3):  # at first libraries take workspaces
        with torch.inference_mode(), torch.cuda.stream(stream):
            stage.own_layers.choose_libraries([16, 1024])
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)))
    assert held[2] == held[1]
    assert torch.backends.cuda.preferred_blas_library() == before
    gemm_library.cache_clear()


def test_the_other_library_is_set_inside_only_and_without_a_word():
    """In a process of its own: torch warns once."""
    program = (
        "import torch\n"
        "from pipemax.worker.gemm_library import BlasLibrary, computing_in\n"
        "library = torch.backends.cuda.preferred_blas_library\n"
        "before = library()\n"
        "for _ in range(2):\n"
        "    with computing_in(BlasLibrary.CUBLASLT):\n"
        "        assert library() == torch._C._BlasBackend.Cublaslt\n"
        "    assert library() == before != torch._C._BlasBackend.Cublaslt\n"
        "import sys; print('said', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("said\n") and "experimental" not in done.stderr
