"""The roofline: against GEMM times measured on an H100, and term by term on a card of round figures.

`python -m tests.cost.test_roofline` prints the errors.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipemax.cost.hardware import HardwareProfile, HostLink, PeerLink
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.profiles import gpu_profile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.cost.table import gemm_table
from pipemax.model_spec import ModelSpec
from tests.cost.models import LLAMA_8B, LLAMA_70B, MIXTRAL, QWEN_32B

QWEN_14B = dataclasses.replace(QWEN_32B, name="Qwen2.5-14B", intermediate_size=13824)

# 1 TB/s, 100 TFLOP/s, all of it reached.
ROUND = HardwareProfile(
    name="round",
    memory_gib=24,
    memory_bytes_per_second=1e12,
    tensor_flops_per_second=100e12,
    memory_fraction=1.0,
    tensor_fraction=1.0,
    kv_read_fraction=0.5,
    attention_fraction=0.5,
    pcie_generation=4,
    pcie_lanes=16,
    host_link=HostLink(25e9, 25e9, 20e9),
    peer_link=PeerLink.HOST_MEMORY,
    peer_bytes_per_second=0.0,
    source="made up",
)
MIDDLE = StageShape(range(10, 20), has_embedding=False, head_share=0.0)


MEASURED = (LLAMA_70B, LLAMA_8B, QWEN_14B, QWEN_32B)


def gemm_errors(model: ModelSpec) -> dict[int, float]:
    """Tokens in the step, and the roofline's GEMM time of a layer over the measured one, less 1."""
    gpu = gpu_profile("h100-sxm")
    table = gemm_table(model, gpu, dtype_bytes=2)
    cost = RooflineCostModel(model=model, gpu=gpu)
    return {
        tokens: cost._layer_gemm_seconds(tokens) / measured - 1
        for tokens, measured in zip(table.num_tokens, table.layer_seconds, strict=True)
    }


def decode(num_rows: int, context: int = 450) -> StepLoad:
    return StepLoad.of_decode(num_rows=num_rows, kv_tokens=num_rows * context)


def test_gemms_are_within_12_percent_of_all_measured_points_and_3_percent_on_average():
    errors = [error for model in MEASURED for error in gemm_errors(model).values()]

    assert len(errors) == 60
    assert np.abs(errors).max() < 0.12
    assert np.abs(errors).mean() < 0.035


def test_a_decode_step_reads_weights_and_keys():
    seconds = RooflineCostModel(model=LLAMA_70B, gpu=ROUND).step_seconds(decode(1, 1), MIDDLE)
    # 855.6 M parameters a layer at 2 bytes and 1 TB/s.
    assert seconds == pytest.approx(10 * 1.7113e-3, rel=0.02)

    cost = RooflineCostModel(model=LLAMA_70B, gpu=ROUND)
    more = cost.step_seconds(decode(64, 2000), MIDDLE) - cost.step_seconds(decode(64, 1000), MIDDLE)
    # 64,000 keys more: 4,096 bytes each at 500 GB/s, and 4 x 64 x 128 operations each at 50 TFLOP/s, on ten layers.
    assert more == pytest.approx(10 * 64_000 * (4096 / 500e9 + 4 * 64 * 128 / 50e12))


def test_a_long_prompt_is_arithmetic():
    tokens = 8192
    load = StepLoad.of_rows(np.array([0]), np.array([tokens]), 1)
    seconds = RooflineCostModel(model=LLAMA_70B, gpu=ROUND).step_seconds(load, MIDDLE)
    multiply = 2 * 855.638e6 * tokens / 100e12
    attention = tokens * tokens / 2 * 4 * 64 * 128 / 50e12
    assert seconds == pytest.approx(10 * (multiply + attention), rel=0.03)


def test_the_head_costs_what_samples():
    cost = RooflineCostModel(model=LLAMA_70B, gpu=ROUND)
    last = dataclasses.replace(MIDDLE, head_share=1.0)
    silent = dataclasses.replace(decode(32), num_samples=0)
    assert cost.step_seconds(silent, last) == cost.step_seconds(silent, MIDDLE)
    # 1.05 G parameters at 2 bytes and 1 TB/s, a little arithmetic, and 16 bytes a logit.
    head = cost.step_seconds(decode(32), last) - cost.step_seconds(decode(32), MIDDLE)
    assert head == pytest.approx(2.101e-3 + 0.067e-3 + 32 * 128256 * 16 / 1e12, rel=0.01)


def test_ends_that_share_the_head_wait_for_what_travels():
    cost = RooflineCostModel(model=LLAMA_70B, gpu=dataclasses.replace(ROUND, host_link=HostLink(20e9, 40e9, 20e9)))
    ends = {
        "first": StageShape(range(10), has_embedding=False, head_share=0.5),
        "last": StageShape(range(70, 80), has_embedding=False, head_share=0.5),
    }

    def shared_head_seconds(end: str, load: StepLoad) -> float:
        return cost.step_seconds(load, ends[end]) - cost.step_seconds(load, MIDDLE)

    whole = cost.step_seconds(decode(32), dataclasses.replace(MIDDLE, head_share=1.0))
    half = (whole - cost.step_seconds(decode(32), MIDDLE)) / 2
    travels = 32 * 2 * (8192 + 128256 // 2)  # hidden states, and the last stage's logits
    assert shared_head_seconds("last", decode(32)) == pytest.approx(half + travels / 40e9)
    assert shared_head_seconds("first", decode(32)) == pytest.approx(half + (travels + 32 * 2 * 8192) / 20e9)
    prompt = dataclasses.replace(decode(1), num_tokens=2048, num_samples=0)
    assert shared_head_seconds("last", prompt) == 0
    assert shared_head_seconds("first", prompt) == pytest.approx(2048 * 2 * 8192 / 20e9)


def test_time_grows_with_everything_and_nothing_costs_nothing():
    cost = RooflineCostModel(model=LLAMA_70B, gpu=ROUND)
    times = [cost.step_seconds(decode(rows), MIDDLE) for rows in (1, 2, 8, 32, 64, 128, 512, 2048)]
    assert times == sorted(times)
    assert cost.step_seconds(StepLoad(0, 0, 0, 0, 0), MIDDLE) == 0.0
    longer = dataclasses.replace(MIDDLE, layers=range(10, 30))
    assert cost.step_seconds(decode(8), longer) == pytest.approx(2 * cost.step_seconds(decode(8), MIDDLE))


def test_a_few_tokens_touch_a_few_experts():
    cost = RooflineCostModel(model=MIXTRAL, gpu=ROUND)
    weights_seconds = {tokens: cost.step_seconds(decode(tokens, 1), MIDDLE) - 10 * 17.5e-6 for tokens in (1, 2, 4, 64)}
    expert = 3 * 4096 * 14336 * 2 / 1e12
    attention = 2 * (4096 * 6144 + 4096 * 4096) / 1e12
    # Two experts of eight for one token, 8 (1 - (3/4)^T) for T, all of them for many.
    for tokens, experts in ((1, 2.0), (2, 3.5), (4, 5.47), (64, 8.0)):
        assert weights_seconds[tokens] == pytest.approx(10 * (attention + experts * expert), rel=0.05)


def test_sliding_windows_bound_what_attention_reads():
    windowed = dataclasses.replace(LLAMA_8B, sliding_windows=(512, None) * 16)
    full, cut = (RooflineCostModel(model=model, gpu=ROUND) for model in (LLAMA_8B, windowed))
    short, long = decode(16, 300), decode(16, 8000)
    assert cut.step_seconds(short, MIDDLE) == pytest.approx(full.step_seconds(short, MIDDLE))
    saved = full.step_seconds(long, MIDDLE) - cut.step_seconds(long, MIDDLE)
    per_key = 4096 / 500e9 + 4 * 32 * 128 / 50e12
    assert saved == pytest.approx(5 * 16 * (8000 - 513) * per_key, rel=0.01)


def test_shards_share_weights_and_keys():
    one, two = (RooflineCostModel(model=LLAMA_70B, gpu=ROUND, shards=shards) for shards in (1, 2))
    load = decode(64, 1000)
    assert two.step_seconds(load, MIDDLE) == pytest.approx(one.step_seconds(load, MIDDLE) / 2, rel=0.03)


def _print_errors() -> None:
    for model in MEASURED:
        errors = gemm_errors(model)
        worst = max(errors, key=lambda tokens: abs(errors[tokens]))
        mean = np.mean(np.abs(list(errors.values())))
        print(f"{model.name}: mean {100 * mean:.1f} %, worst {100 * errors[worst]:+.1f} % at {worst} tokens")


if __name__ == "__main__":
    _print_errors()
