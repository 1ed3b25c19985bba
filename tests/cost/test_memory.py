"""GPU memory: against what vLLM had left for KV, and as a capacity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipemax.config import ConfigError
from pipemax.cost.hardware import GIB
from pipemax.cost.load import even_stages
from pipemax.cost.memory import StageMemory, pipeline_capacity, stage_memory, tensor_parallel_blocks
from pipemax.cost.profiles import server_profile
from tests.cost.models import LLAMA_8B, LLAMA_70B

RUNS = json.loads((Path(__file__).parent / "data" / "vllm_baselines.json").read_text())["runs"]
TP_RUNS = [run for run in RUNS if run["settings"]["tensor_parallel_size"] == 2]


@pytest.mark.parametrize("run", TP_RUNS, ids=lambda run: run["name"])
def test_weights_and_1_25_gb_explain_the_memory_that_vllm_had_for_kv(run):
    # Half the model's weights; half of its 320 KiB of KV a token.
    given = int(run["settings"]["gpu_memory_utilization"] * server_profile("h100-sxm", 2).gpu.memory_bytes)
    memory = StageMemory(given, 70_553_706_496, reserve_bytes=int(1.25e9))
    assert memory.kv_bytes == pytest.approx(run["kv_cache_tokens"] * 327_680 / 2, rel=0.03)


def test_a_capacity_is_what_the_fullest_stage_offers():
    server = server_profile("rtx-5090", 8, host_memory_gib=640)
    stages = even_stages(80, 8)
    capacity = pipeline_capacity(model=LLAMA_70B, server=server, stages=stages, block_size=16, window_blocks=1000)

    assert capacity.num_stages == 8 and capacity.num_window_blocks == 1000
    # 16 tokens x 10 layers x 4 KiB; in host memory 8 times that, of 0.8 of 640 GiB.
    assert capacity.block_bytes == 16 * 10 * 4096
    assert capacity.num_host_blocks == 512 * GIB // (8 * capacity.block_bytes)
    # 31.4 GiB less 10 layers, the head and 2 GiB.
    free = 31.4 * GIB - 2 * (10 * 855_638_016 + 128256 * 8192) - 2 * GIB
    assert capacity.num_device_blocks == int(free // capacity.block_bytes)
    first, middle = (
        stage_memory(model=LLAMA_70B, stage=stage, memory_bytes=server.gpu.memory_bytes) for stage in stages[:2]
    )
    assert middle.kv_bytes - first.kv_bytes == 2 * 128256 * 8192


def test_what_does_not_fit_is_said_with_what_is_missing():
    with pytest.raises(ConfigError, match=r"Llama-3.1-70B does not fit 4 x rtx-4090: .* GiB are missing; use more"):
        pipeline_capacity(
            model=LLAMA_70B,
            server=server_profile("rtx-4090", 4),
            stages=even_stages(80, 4),
            block_size=16,
            window_blocks=0,
        )
    with pytest.raises(ConfigError, match="make the window smaller"):
        pipeline_capacity(
            model=LLAMA_8B,
            server=server_profile("rtx-4090", 2),
            stages=even_stages(32, 2),
            block_size=16,
            window_blocks=10**6,
        )
    with pytest.raises(ConfigError, match="add host memory"):
        pipeline_capacity(
            model=LLAMA_8B,
            server=server_profile("rtx-4090", 2, host_memory_gib=0.001),
            stages=even_stages(32, 2),
            block_size=16,
            window_blocks=0,
        )


def test_tensor_parallel_memory_has_no_fullest_gpu():
    server = server_profile("rtx-5090", 8)
    blocks = tensor_parallel_blocks(model=LLAMA_70B, server=server, block_size=16)
    pipeline = pipeline_capacity(
        model=LLAMA_70B, server=server, stages=even_stages(80, 8), block_size=16, window_blocks=0
    )
    # The ends are spread over all GPUs, so there is more room: 2.1 GB on the fullest stage against 0.5 GB on each.
    assert 1.05 < blocks / pipeline.num_device_blocks < 1.2
