"""`choose_layers`: which layers each stage of a pipeline on this machine gets, before anything is loaded.

`cost/stage_split.py` decides; here is what it is asked with. The workload is not known yet, so a request of middling
length stands for it: what matters most is the head, which costs its stage a share of every decode step (on
SmolLM2 eight layers' worth, on Llama-3.1-70B one) and of its memory.
"""

from __future__ import annotations

from pipemax.config import KVOffload
from pipemax.cost.hardware import GIB
from pipemax.cost.memory import HOST_MEMORY_SHARE, RESERVE_BYTES
from pipemax.cost.stage_split import split_stages
from pipemax.cost.table import best_cost_model
from pipemax.cost.workload import MeanLengths
from pipemax.head_place import HeadPlace
from pipemax.local_hardware import this_server
from pipemax.model_spec import ModelSpec

_LENGTHS = MeanLengths(prompt_tokens=512, output_tokens=256, live_tokens=512 + 256 / 2)


def choose_layers(
    spec: ModelSpec,
    device: str,
    head: HeadPlace,
    *,
    num_stages: int,
    num_batches: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    kv_offload: KVOffload,
) -> list[range]:
    """Layers of each stage on "cpu" or "cuda" devices of this machine. Parameters are meant as in `EngineConfig`.

    Raises ConfigError when there are more stages than layers.
    """
    server = this_server(device, num_stages=num_stages)
    stages = split_stages(
        model=spec,
        cost=best_cost_model(model=spec, gpu=server.gpu),
        memory_bytes=[server.gpu.memory_bytes - RESERVE_BYTES] * server.num_gpus,
        host_bytes=int(server.host_memory_gib * HOST_MEMORY_SHARE * GIB),
        num_batches=num_batches,
        max_rows=max_num_seqs,
        prefill_tokens=max_num_batched_tokens,
        lengths=_LENGTHS,
        host_link=server.host_link if kv_offload is KVOffload.ON else None,
        block_size=block_size,
        head=head,
    )
    return [stage.layers for stage in stages]
