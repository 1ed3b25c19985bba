"""`StageMemory`: what a stage's GPU memory holds, and how many KV blocks are left; `pipeline_capacity` makes a
`Capacity` of it.

    total = weights + reserve + KV blocks            reserve: CUDA context, activations, workspaces

Host memory is cut in equal parts: a block has a home on every stage. Refusals say what would fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipemax.config import ConfigError
from pipemax.cost.hardware import GIB, ServerProfile
from pipemax.cost.load import StageShape
from pipemax.cost.weights import LayerWeights
from pipemax.model_spec import ModelSpec
from pipemax.plan import Capacity

RESERVE_BYTES = 2 * GIB
"""Context, activations and workspaces. vLLM 0.26 used 1.2 to 1.3 GB of the memory it was given beside weights and KV
(70B, two H100), and about 0.6 GB lies outside of what it counts."""

HOST_MEMORY_SHARE = 0.8
"""Of main memory, for KV homes; the rest is the operating system's, the engine's and the file cache's."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on one GPU. `kv_bytes` is negative when the weights alone do not fit."""

    total_bytes: int
    weight_bytes: int
    reserve_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.total_bytes - self.weight_bytes - self.reserve_bytes


def stage_memory(
    *,
    model: ModelSpec,
    stage: StageShape,
    memory_bytes: int,
    dtype_bytes: int = 2,
    reserve_bytes: int = RESERVE_BYTES,
) -> StageMemory:
    """Of one stage on a GPU with `memory_bytes` in all."""
    parameters = LayerWeights.of(model).stage_parameters(stage, tied_ends=model.tie_word_embeddings)
    return StageMemory(memory_bytes, parameters * dtype_bytes, reserve_bytes)


def stage_blocks(
    *, model: ModelSpec, stage: StageShape, memory_bytes: int, block_bytes: int, dtype_bytes: int = 2
) -> int:
    """KV blocks that a stage holds beside its weights, of what both may take; 0 or less when nothing is left."""
    memory = stage_memory(model=model, stage=stage, memory_bytes=memory_bytes, dtype_bytes=dtype_bytes, reserve_bytes=0)
    return memory.kv_bytes // block_bytes


def tensor_parallel_blocks(
    *, model: ModelSpec, server: ServerProfile, block_size: int, dtype_bytes: int = 2, kv_dtype_bytes: int = 2
) -> int:
    """KV blocks over all GPUs of the server when each holds a share of every layer. Raises ConfigError as below."""
    num_gpus = server.num_gpus
    stage = StageShape(range(model.num_layers), has_embedding=True, head_share=1.0)
    total = LayerWeights.of(model).stage_parameters(stage, tied_ends=model.tie_word_embeddings) * dtype_bytes
    memory = StageMemory(server.gpu.memory_bytes, -(-total // num_gpus), RESERVE_BYTES)
    geometry = model.kv_geometry(block_size=block_size, dtype_bytes=kv_dtype_bytes)
    block_bytes = geometry.block_bytes(range(model.num_layers)) // min(num_gpus, model.num_kv_heads)
    return _blocks(model, server, memory, block_bytes)


def pipeline_capacity(
    *,
    model: ModelSpec,
    server: ServerProfile,
    stages: Sequence[StageShape],
    block_size: int,
    window_blocks: int,
    dtype_bytes: int = 2,
    kv_dtype_bytes: int = 2,
) -> Capacity:
    """What a pipeline of these stages offers: the fullest stage decides, as blocks have the same slots everywhere.

    Raises ConfigError when some stage has no room for a single block, or less than the window.
    """
    geometry = model.kv_geometry(block_size=block_size, dtype_bytes=kv_dtype_bytes)
    device_blocks = []
    stage_block_bytes = []
    for stage in stages:
        memory = stage_memory(model=model, stage=stage, memory_bytes=server.gpu.memory_bytes, dtype_bytes=dtype_bytes)
        stage_block_bytes.append(geometry.block_bytes(stage.layers))
        device_blocks.append(_blocks(model, server, memory, stage_block_bytes[-1]))
    num_device_blocks = min(device_blocks)
    if window_blocks >= num_device_blocks:
        raise ConfigError(
            f"a window of {window_blocks} blocks does not leave room in {num_device_blocks} device blocks; "
            "make the window smaller"
        )
    host_bytes = int(server.host_memory_gib * HOST_MEMORY_SHARE * GIB)
    num_host_blocks = host_bytes // sum(stage_block_bytes)
    if num_host_blocks < 1:
        raise ConfigError(f"{server.host_memory_gib:g} GiB of host memory hold no KV block; add host memory")
    return Capacity(
        num_stages=len(stages),
        block_size=block_size,
        num_device_blocks=num_device_blocks,
        num_window_blocks=window_blocks,
        num_host_blocks=num_host_blocks,
        block_bytes=max(stage_block_bytes),
    )


def _blocks(model: ModelSpec, server: ServerProfile, memory: StageMemory, block_bytes: int) -> int:
    blocks = memory.kv_bytes // block_bytes
    if blocks < 1:
        short = (block_bytes - memory.kv_bytes) / GIB
        raise ConfigError(
            f"{model.name} does not fit {server.num_gpus} x {server.gpu.name}: the weights take "
            f"{memory.weight_bytes / GIB:.1f} GiB of a GPU, and {short:.1f} GiB are missing; use more or larger GPUs, "
            "or a smaller model"
        )
    return blocks
