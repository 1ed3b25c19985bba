"""What a pipeline is to be, from models and GPUs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipemax import shape_choice
from pipemax.config import OffloadChoice
from pipemax.cost.hardware import GIB
from pipemax.cost.load import even_stages
from pipemax.cost.profiles import server_profile
from pipemax.head_place import HEAD_VARIABLE, HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.pipeline_shape import PipelineShape
from pipemax.shape_choice import choose_shape, rows_that_fit

CONFIGS = Path(__file__).parents[1] / "benchmarks" / "model_configs"


def choose(
    model: str,
    device: str,
    num_stages: int,
    *,
    can_cut_head: bool = True,
    max_num_seqs: int | None = None,
    gpu_memory_utilization: float = 0.99,
) -> PipelineShape:
    return choose_shape(
        ModelSpec.from_pretrained(CONFIGS / model),
        device,
        can_cut_head,
        num_stages=num_stages,
        num_batches=num_stages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        block_size=16,
        kv_offload=OffloadChoice.AUTO,
        gpu_memory_utilization=gpu_memory_utilization,
    )


@pytest.mark.parametrize(
    ("model", "num_stages", "gib", "rows"),
    [
        ("Llama-3.1-8B", 1, 78, 1024),  # 500,000 tokens of KV
        ("Llama-3.1-8B", 1, 40, 512),
        ("Llama-3.1-8B", 1, 22, 256),
        ("Llama-3.1-8B", 1, 10, 256),  # does not fit: said elsewhere
        ("Llama-3.1-70B", 2, 78, 256),
        ("Llama-3.1-70B", 2, 139, 512),
        ("Llama-3.1-70B", 8, 22, 256),
    ],
)
def test_rows_are_as_many_as_memory_has_kv_for(model: str, num_stages: int, gib: int, rows: int) -> None:
    spec = ModelSpec.from_pretrained(CONFIGS / model)
    stages = even_stages(spec.num_layers, num_stages)
    assert rows_that_fit(spec, stages, num_batches=num_stages, block_size=16, memory_bytes=gib * GIB) == rows


@pytest.mark.parametrize(("asked", "share", "rows"), [(None, 0.995, 1024), (None, 0.5, 512), (7, 0.995, 7)])
def test_rows_on_gpus_are_chosen_within_what_they_may_be_filled_with(
    asked: int | None, share: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_profile("h100-sxm", 1, host_memory_gib=128)
    monkeypatch.setattr(shape_choice, "this_server", lambda device, *, num_stages: server)
    shape = choose("Llama-3.1-8B", "cuda", 1, max_num_seqs=asked, gpu_memory_utilization=share)
    assert shape.max_num_seqs == rows


@pytest.mark.parametrize(
    ("model", "gpu", "share", "can_cut_head", "wish", "head"),
    [
        ("Llama-3.1-70B", "h100-sxm", 0.995, True, None, HeadPlace.ENDS),
        ("Llama-3.1-70B", "h100-sxm", 0.995, False, None, HeadPlace.LAST),
        ("Llama-3.1-70B", "h100-sxm", 0.995, True, HeadPlace.LAST, HeadPlace.LAST),
        ("Llama-3.1-8B", "h100-sxm", 0.995, True, None, HeadPlace.LAST),
        ("Llama-3.1-8B", "h100-sxm", 0.995, True, HeadPlace.ENDS, HeadPlace.ENDS),
        # With as much memory as two of these have there are rows enough; held to 80 GB it is short.
        ("Llama-3.1-70B", "h200", 0.995, True, None, HeadPlace.LAST),
        ("Llama-3.1-70B", "h200", 0.5637, True, None, HeadPlace.ENDS),
    ],
)
def test_on_gpus_the_head_is_where_it_serves_best(
    model: str,
    gpu: str,
    share: float,
    can_cut_head: bool,
    wish: HeadPlace | None,
    head: HeadPlace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(HEAD_VARIABLE, raising=False)
    if wish is not None:
        monkeypatch.setenv(HEAD_VARIABLE, wish)
    server = server_profile(gpu, 2, host_memory_gib=256)
    monkeypatch.setattr(shape_choice, "this_server", lambda device, *, num_stages: server)
    shape = choose(model, "cuda", 2, can_cut_head=can_cut_head, gpu_memory_utilization=share)
    assert shape.head is head


@pytest.mark.parametrize(("asked", "rows"), [(None, 256), (7, 7), (3000, 3000)])
@pytest.mark.parametrize("can_cut_head", [True, False])
def test_the_shape_on_cpus(asked: int | None, rows: int, can_cut_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEAD_VARIABLE, HeadPlace.ENDS)
    spec = ModelSpec.from_pretrained(CONFIGS / "Llama-3.1-8B")
    shape = choose("Llama-3.1-8B", "cpu", 3, can_cut_head=can_cut_head, max_num_seqs=asked)
    assert shape.head is (HeadPlace.ENDS if can_cut_head else HeadPlace.LAST)
    assert [layer for layers in shape.layers for layer in layers] == list(range(spec.num_layers))
    assert len(shape.layers) == 3 and shape.max_num_seqs == rows
