"""Which library computes a GEMM of captured steps: what follows from measured times. Needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.worker import llama_layers
from pipemax.worker.gemm_library import (
    LIBRARY_VARIABLE,
    BlasLibrary,
    GemmLibrary,
    QuickestLibraries,
    computing_in,
    gemm_library,
)
from pipemax.worker.gemm_timer import num_timed
from pipemax.worker.layer_ops import TorchOps
from tests.worker.families import save_model
from tests.worker.test_stage_model import Pipeline

DEFAULT, CUBLASLT = BlasLibrary.DEFAULT, BlasLibrary.CUBLASLT


@pytest.fixture(autouse=True)
def fresh_choice():
    gemm_library.cache_clear()
    yield
    gemm_library.cache_clear()


@dataclass
class FakeGemm:
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        raise AssertionError("the times are given")


def gemm(num_outputs: int, num_inputs: int, bias: bool = False) -> FakeGemm:
    return FakeGemm(torch.empty(num_outputs, num_inputs, device="meta"), torch.empty(num_outputs) if bias else None)


def test_the_choice_comes_from_the_environment(monkeypatch):
    assert gemm_library() is GemmLibrary.QUICKEST
    gemm_library.cache_clear()
    monkeypatch.setenv(LIBRARY_VARIABLE, "default")
    assert gemm_library() is GemmLibrary.DEFAULT
    gemm_library.cache_clear()
    monkeypatch.setenv(LIBRARY_VARIABLE, "cublas")
    with pytest.raises(ConfigError, match="PIPEMAX_GEMM_LIBRARY must be quickest or default, got 'cublas'"):
        gemm_library()


def test_the_other_library_must_be_clearly_quicker_and_is_chosen_for_a_kind_and_a_size():
    wide, tall, biased = gemm(8, 4), gemm(4, 8), gemm(8, 4, bias=True)
    gemms = [wide, tall, biased, gemm(8, 4), gemm(4, 8)]
    timed = []
    others = {("wide", 16): 0.97, ("wide", 32): 0.99, ("tall", 16): 1.2, ("tall", 32): 0.5, ("biased", 16): 1.0}

    def seconds(alike, num_tokens, library):
        timed.append((len(alike), num_tokens))
        name = "biased" if alike[0] is biased else "wide" if alike[0] is wide else "tall"
        return 1.0 if library is DEFAULT else others.get((name, num_tokens), 2.0)

    libraries = QuickestLibraries()
    libraries.measure(gemms, [16, 32], seconds=seconds)

    assert (
        timed == [(2, 16)] * 4 + [(1, 16)] * 2 + [(2, 32)] * 4 + [(1, 32)] * 2
    )  # of all layers, once for each library
    assert [libraries.of(one, 16) for one in gemms] == [CUBLASLT, DEFAULT, DEFAULT, CUBLASLT, DEFAULT]
    assert [libraries.of(one, 32) for one in gemms] == [DEFAULT, CUBLASLT, DEFAULT, DEFAULT, CUBLASLT]
    assert libraries.of(wide, 17) is DEFAULT  # nobody measured it
    assert libraries.of(gemm(2, 2), 16) is DEFAULT


def test_the_default_leaves_the_setting_alone():
    before = torch.backends.cuda.preferred_blas_library()
    with computing_in(DEFAULT):
        assert torch.backends.cuda.preferred_blas_library() == before


def test_a_replay_reads_more_than_a_cache_holds_and_takes_no_longer_for_more_tokens():
    """By hand, for Llama-3.1-70B in two bytes: 160 MiB for q, k and v, 896 MiB for gate and up."""
    qkv, gate_up = (torch.empty(rows, 8192, device="meta", dtype=torch.bfloat16) for rows in (10240, 57344))
    assert [num_timed(qkv, size) for size in (1, 256, 512, 1024)] == [5, 5, 3, 2]
    assert [num_timed(gate_up, size) for size in (1, 256, 1024)] == [1, 1, 1]


@pytest.fixture
def used(monkeypatch):
    """Libraries that layers were told to compute in, CUBLASLT being measured to be the quicker one of all."""

    class FakeTimer:
        def __init__(self, gemms, *, most_tokens):
            pass

        def seconds(self, gemms, num_tokens, library):
            return 2.0 if library is DEFAULT else 1.0

    libraries = []

    def computing_in_fake(library):
        libraries.append(library)
        return computing_in(DEFAULT)

    monkeypatch.setattr(llama_layers, "GemmTimer", FakeTimer)
    monkeypatch.setattr(llama_layers, "computing_in", computing_in_fake)
    return libraries


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("choice", GemmLibrary)
def test_layers_ask_for_it_in_steps_of_measured_sizes_only(used, dtype, choice, tmp_path, monkeypatch):
    monkeypatch.setenv(LIBRARY_VARIABLE, choice)
    monkeypatch.setattr(llama_layers, "_MOST_MLP_TOKENS", 4)  # 8 tokens are computed in two parts of a measured size
    save_model("llama", tmp_path)
    pipeline = Pipeline(tmp_path, 1, dtype=dtype)
    stage = pipeline.stages[0]
    stage.use_own_layers(TorchOps(), max_model_len=64)
    stage.own_layers.choose_libraries([2, 4])

    def libraries_of(num_tokens: int) -> set[BlasLibrary]:
        used.clear()
        pipeline.backend = SimpleNamespace(plan=lambda rows: None, append=lambda *_: None, run=lambda *_: None)
        pipeline.step([(0, 0, list(range(3, 3 + num_tokens)))])
        return set(used)

    chosen = CUBLASLT if choice is GemmLibrary.QUICKEST and dtype == "bfloat16" else DEFAULT
    assert libraries_of(4) == libraries_of(2) == {chosen}
    assert libraries_of(3) == libraries_of(8) == {DEFAULT}
