"""The split against every split of a small model, and on models whose ends weigh differently."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest

from pipemax.config import ConfigError
from pipemax.cost.hardware import GIB
from pipemax.cost.load import StageShape, head_of
from pipemax.cost.memory import RESERVE_BYTES, stage_blocks
from pipemax.cost.profiles import server_profile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.cost.stage_split import split_stages
from pipemax.cost.steady_state import KVSpace, SteadyState
from pipemax.cost.workload import MeanLengths
from pipemax.head_place import HeadPlace
from tests.cost.models import LLAMA_1B, LLAMA_8B, LLAMA_70B

CHAT = MeanLengths(prompt_tokens=229, output_tokens=471, live_tokens=556)
PAPERS = MeanLengths(prompt_tokens=10150, output_tokens=129, live_tokens=9052)


def split(model, gpu_name, num_stages, lengths, *, memory_gib=None, heads=(HeadPlace.LAST,)):
    server = server_profile(gpu_name, num_stages)
    memory = int(memory_gib * GIB) if memory_gib else server.gpu.memory_bytes - RESERVE_BYTES
    settings = {
        "cost": RooflineCostModel(model=model, gpu=server.gpu),
        "num_batches": num_stages,
        "max_rows": 1024,
        "prefill_tokens": 2048,
        "lengths": lengths,
        "host_link": server.host_link,
    }
    memory_bytes = [memory] * num_stages
    stages = split_stages(model=model, memory_bytes=memory_bytes, host_bytes=256 * GIB, heads=heads, **settings)
    return stages, settings, memory


def sizes(stages):
    return [stage.num_layers for stage in stages]


def request_seconds(model, stages, settings, memory):
    geometry = model.kv_geometry(block_size=16, dtype_bytes=2)
    block_bytes = [geometry.block_bytes(stage.layers) for stage in stages]
    blocks = [
        stage_blocks(model=model, stage=stage, memory_bytes=memory, block_bytes=of_block)
        for stage, of_block in zip(stages, block_bytes, strict=True)
    ]
    if min(blocks) < 1:
        return float("inf")
    host_blocks = 256 * GIB // geometry.block_bytes(range(model.num_layers))
    space = KVSpace(min(blocks), host_blocks, 16, max(block_bytes))
    return SteadyState.of(stages=stages, space=space, **settings).request_seconds


@pytest.mark.parametrize("lengths", [CHAT, PAPERS], ids=["chat", "papers"])
@pytest.mark.parametrize("memory_gib", [None, 2.2], ids=["roomy", "tight"])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_no_split_of_a_small_model_is_better(lengths, memory_gib, num_stages):
    model = dataclasses.replace(LLAMA_1B, num_layers=12, sliding_windows=(None,) * 12)
    stages, settings, memory = split(model, "rtx-4090", num_stages, lengths, memory_gib=memory_gib)
    best = min(
        request_seconds(
            model,
            [
                StageShape(range(a, b), has_embedding=a == 0, head_share=float(b == 12))
                for a, b in zip((0, *cuts), (*cuts, 12), strict=True)
            ],
            settings,
            memory,
        )
        for cuts in combinations(range(1, 12), num_stages - 1)
    )
    assert request_seconds(model, stages, settings, memory) == pytest.approx(best, rel=1e-6)


def test_stages_hold_all_layers_in_order():
    stages, _, _ = split(LLAMA_8B, "l20", 5, CHAT)
    assert [layer for stage in stages for layer in stage.layers] == list(range(32))
    assert [stage.has_embedding for stage in stages] == [True, False, False, False, False]
    assert [stage.head_share for stage in stages] == [0, 0, 0, 0, 1]


def test_a_head_worth_layers_makes_the_last_stage_short_where_decode_counts():
    # The head of this model weighs four of its layers, and prefill does not compute it.
    chat, _, _ = split(LLAMA_1B, "rtx-4090", 4, CHAT)
    papers, _, _ = split(LLAMA_1B, "rtx-4090", 4, PAPERS)
    assert chat[-1].num_layers < 4
    assert sizes(papers) == [4, 4, 4, 4]


def test_a_head_that_the_ends_share_makes_both_of_them_shorter():
    stages, _, _ = split(LLAMA_1B, "rtx-4090", 4, CHAT, heads=(HeadPlace.ENDS,))
    assert [stage.head_share for stage in stages] == [0.5, 0, 0, 0.5]
    assert sizes(stages)[0] == sizes(stages)[-1] < min(sizes(stages)[1:3])


@pytest.mark.parametrize(
    ("model", "gpu_name", "num_stages", "head"),
    [
        (LLAMA_70B, "h100-sxm", 2, HeadPlace.ENDS),  # room for KV, and an even pipeline, for 2 MB of logits a row
        (LLAMA_70B, "rtx-4090", 8, HeadPlace.ENDS),
        (LLAMA_8B, "h100-sxm", 2, HeadPlace.LAST),  # 600 rows: the logits take longer than half of the head
    ],
)
def test_the_better_place_of_the_head_is_taken(model, gpu_name, num_stages, head):
    chosen, settings, memory = split(model, gpu_name, num_stages, CHAT, heads=tuple(HeadPlace))
    assert head_of(chosen) is head
    seconds = {
        place: request_seconds(model, split(model, gpu_name, num_stages, CHAT, heads=(place,))[0], settings, memory)
        for place in HeadPlace
    }
    assert min(seconds, key=lambda place: seconds[place]) is head
    assert request_seconds(model, chosen, settings, memory) == seconds[head]


def test_one_layer_more_on_a_stage_costs_more_than_the_head():
    assert sizes(split(LLAMA_70B, "rtx-5090", 8, CHAT)[0]) == [10] * 8


def test_memory_of_the_ends_decides_where_an_even_split_does_not_fit():
    # 14 layers over GPUs that hold 4.5 layers each, and an end weighs 1.2 of them.
    model = dataclasses.replace(LLAMA_70B, num_layers=14, sliding_windows=(None,) * 14)
    stages, _, _ = split(model, "rtx-5090", 4, CHAT, memory_gib=4.5 * 855_638_016 * 2 / GIB)
    assert sizes(stages) == [3, 4, 4, 3]


def test_one_gpu_takes_the_whole_model():
    stages, _, _ = split(LLAMA_8B, "h100-sxm", 1, CHAT)
    assert sizes(stages) == [32] and stages[0].has_embedding and stages[0].head_share == 1


def test_more_gpus_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"16 layers.*use at most 16"):
        split(LLAMA_1B, "rtx-4090", 17, CHAT)
