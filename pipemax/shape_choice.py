"""`choose_shape`: what the stages of a pipeline on this machine are to be, before anything is loaded.

`cost/stage_split.py` decides about layers; here is what it is asked with. The workload is not known yet, so a request
of middling length stands for it: what matters most is the head, which costs its stage a share of every decode step (on
SmolLM2 eight layers' worth, on Llama-3.1-70B one) and of its memory.

How many rows a step may have is asked of memory too: steps of a small model on a large GPU are worth a thousand rows,
and where KV is short, what rows that never come would take (logits, captured sizes) is KV's.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipemax.config import FEWEST_NUM_SEQS, MOST_NUM_SEQS, OffloadChoice
from pipemax.cost.hardware import GIB
from pipemax.cost.load import StageShape, head_of
from pipemax.cost.memory import HOST_MEMORY_SHARE, RESERVE_BYTES, stage_blocks
from pipemax.cost.stage_split import split_stages
from pipemax.cost.table import best_cost_model
from pipemax.cost.workload import MeanLengths
from pipemax.executor.sizing import WINDOW_SHARE
from pipemax.head_place import HeadPlace, possible_heads
from pipemax.local_hardware import this_server
from pipemax.model_spec import ModelSpec
from pipemax.pipeline_shape import PipelineShape

_LENGTHS = MeanLengths(prompt_tokens=512, output_tokens=256, live_tokens=512 + 256 / 2)


def choose_shape(
    spec: ModelSpec,
    device: str,
    can_cut_head: bool,
    *,
    num_stages: int,
    num_batches: int,
    max_num_seqs: int | None,
    max_num_batched_tokens: int,
    block_size: int,
    kv_offload: OffloadChoice,
    gpu_memory_utilization: float,
) -> PipelineShape:
    """On "cpu" or "cuda" devices of this machine. Parameters are meant as in `EngineConfig`.

    Raises ConfigError when there are more stages than layers.
    """
    heads = possible_heads(device) if can_cut_head else (HeadPlace.LAST,)
    server = this_server(device, num_stages=num_stages)
    usable_share = gpu_memory_utilization if device == "cuda" else 1.0
    memory_bytes = int(server.gpu.memory_bytes * usable_share) - RESERVE_BYTES
    stages = split_stages(
        model=spec,
        cost=best_cost_model(model=spec, gpu=server.gpu),
        memory_bytes=[memory_bytes] * server.num_gpus,
        host_bytes=int(server.host_memory_gib * HOST_MEMORY_SHARE * GIB),
        num_batches=num_batches,
        max_rows=max_num_seqs or MOST_NUM_SEQS,
        prefill_tokens=max_num_batched_tokens,
        lengths=_LENGTHS,
        host_link=None if kv_offload is OffloadChoice.OFF else server.host_link,
        block_size=block_size,
        heads=heads,
    )
    if max_num_seqs is None and device == "cpu":  # at its limit long before
        max_num_seqs = FEWEST_NUM_SEQS
    elif max_num_seqs is None:
        max_num_seqs = rows_that_fit(
            spec, stages, num_batches=num_batches, block_size=block_size, memory_bytes=memory_bytes
        )
    return PipelineShape(head_of(stages), tuple(stage.layers for stage in stages), max_num_seqs)


def rows_that_fit(
    spec: ModelSpec, stages: Sequence[StageShape], *, num_batches: int, block_size: int, memory_bytes: int
) -> int:
    """Rows whose KV is on a GPU while their batch runs, its share and the window: the next power of two, 256 to 1,024.

    `memory_bytes` is what weights and KV of a stage may take.
    """
    geometry = spec.kv_geometry(block_size=block_size, dtype_bytes=2)
    num_blocks = min(
        stage_blocks(model=spec, stage=stage, memory_bytes=memory_bytes, block_bytes=geometry.block_bytes(stage.layers))
        for stage in stages
    )
    window_share = WINDOW_SHARE if num_batches > 1 else 0.0
    batch_share = (1 - window_share) / num_batches + window_share
    rows = num_blocks * batch_share * block_size / _LENGTHS.live_tokens
    size = FEWEST_NUM_SEQS
    while size < min(rows, MOST_NUM_SEQS):
        size *= 2
    return size
