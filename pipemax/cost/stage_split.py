"""`split_stages`: which layers each GPU gets, by the cost model and the memory that is left for KV.

    stage 0                stage 1 ... N-2                 stage N-1
    embedding, f layers    the rest, as even as it goes    l layers, final norm, head

The ends differ from the rest: both hold a matrix of the vocabulary's size, and the last multiplies by it for every row
that samples; or both hold and compute half of the head (`head_place.py`). Every f and l is tried, with the head in
every place where it may be, and the pipeline that needs the least time for a request is taken: its slowest stage sets
the pace of decode and of prefill, its fullest stage the number of rows (`steady_state.py`). In a decode step the head
may be worth a layer or more, in prefill it is worth nothing, so the best split depends on the workload; and with ten
layers a stage, one layer more on one of them costs more than an idle head saves. Equal splits in that sense: more KV
blocks win, then the more even one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from pipemax.config import ConfigError
from pipemax.cost.hardware import HostLink
from pipemax.cost.load import StageShape, even_stages, stages_of
from pipemax.cost.memory import stage_blocks
from pipemax.cost.model import CostModel
from pipemax.cost.steady_state import KVSpace, SteadyState
from pipemax.cost.workload import MeanLengths
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec


def split_stages(
    *,
    model: ModelSpec,
    cost: CostModel,
    memory_bytes: Sequence[int],
    host_bytes: int,
    num_batches: int,
    max_rows: float,
    prefill_tokens: int,
    lengths: MeanLengths,
    host_link: HostLink | None,
    block_size: int = 16,
    dtype_bytes: int = 2,
    kv_dtype_bytes: int = 2,
    heads: Sequence[HeadPlace] = (HeadPlace.LAST,),
) -> tuple[StageShape, ...]:
    """One stage for each entry of `memory_bytes`, which counts what weights and KV may take of that GPU.

    `heads` are the places where the head may be; `host_bytes` is for homes, of all stages together; the rest as in
    `SteadyState.of`. Where no split leaves every stage a KV block it is the even one: `pipeline_capacity` says what is
    missing. Raises ConfigError when there are more GPUs than layers.
    """
    num_stages = len(memory_bytes)
    if num_stages > model.num_layers:
        raise ConfigError(
            f"{model.name} has {model.num_layers} layers, so it cannot be cut into {num_stages} stages; "
            f"use at most {model.num_layers}"
        )
    geometry = model.kv_geometry(block_size=block_size, dtype_bytes=kv_dtype_bytes)
    block_bytes_up_to = [0, *accumulate(geometry.layer_block_bytes(layer) for layer in range(model.num_layers))]
    host_blocks = host_bytes // block_bytes_up_to[-1]
    best: tuple[tuple[int, int, int], tuple[StageShape, ...]] | None = None
    for stages in _candidates(model.num_layers, num_stages, heads):
        blocks, block_bytes = [], []
        for stage, stage_bytes in zip(stages, memory_bytes, strict=True):
            of_block = block_bytes_up_to[stage.layers.stop] - block_bytes_up_to[stage.layers.start]
            blocks.append(
                stage_blocks(
                    model=model, stage=stage, memory_bytes=stage_bytes, block_bytes=of_block, dtype_bytes=dtype_bytes
                )
            )
            block_bytes.append(of_block)
        if min(blocks) < 1:
            continue
        state = SteadyState.of(
            cost=cost,
            stages=stages,
            space=KVSpace(min(blocks), host_blocks, block_size, max(block_bytes)),
            num_batches=num_batches,
            max_rows=max_rows,
            prefill_tokens=prefill_tokens,
            lengths=lengths,
            host_link=host_link,
        )
        unevenness = sum(stage.num_layers**2 for stage in stages)
        # In nanoseconds, so that sums in another order are equal.
        score = (round(state.request_seconds * 1e9), -min(blocks), unevenness)
        if best is None or score < best[0]:
            best = (score, stages)
    return even_stages(model.num_layers, num_stages, head=heads[0]) if best is None else best[1]


def _candidates(num_layers: int, num_stages: int, heads: Sequence[HeadPlace]) -> Iterator[tuple[StageShape, ...]]:
    """Every pair of ends that leaves the rest a layer a stage, with the head in every place; ends never much longer
    than an even share."""
    if num_stages == 1:
        yield even_stages(num_layers, 1)
        return
    longest = num_layers - 1 if num_stages == 2 else -(-num_layers // num_stages) + 1
    for first in range(1, longest + 1):
        for last in range(1, longest + 1):
            between = num_layers - first - last
            if (num_stages == 2 and between) or between < num_stages - 2:
                continue
            sizes = [first, *(len(stage.layers) for stage in _between(between, num_stages - 2)), last]
            ends = list(accumulate(sizes))
            layers = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
            for head in heads:
                yield stages_of(layers, head=head)


def _between(num_layers: int, num_stages: int) -> tuple[StageShape, ...]:
    return even_stages(num_layers, num_stages) if num_stages else ()
