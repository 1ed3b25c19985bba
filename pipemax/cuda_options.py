"""`CudaOptions`: how stages use their GPUs. One frozen value, made from `EngineConfig`, handed to every stage."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class AttentionChoice(enum.StrEnum):
    """AUTO takes FlashInfer on a GPU in half precision where it is installed, else the torch reference."""

    AUTO = "auto"
    FLASHINFER = "flashinfer"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """Named and meant as in `EngineConfig`."""

    gpu_memory_utilization: float = 0.995
    attention_backend: AttentionChoice = AttentionChoice.AUTO
    fused_layers: bool = True
    cuda_graphs: bool = True
    stage_devices: tuple[int, ...] | None = None

    def device_of_stage(self, stage: int) -> int:
        return stage if self.stage_devices is None else self.stage_devices[stage]
