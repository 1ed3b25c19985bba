"""`EngineConfig`: every setting of an engine in one frozen value.

Read in composition roots only (`llm.py`, `cli.py`, `executor/`'s start). Components take the few values they need.
Names are vLLM's where vLLM has the same thing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pipemax.cuda_options import AttentionChoice, CudaOptions

# Longer than any step, or any part of loading without a sign of life, that has been seen.
DEFAULT_STALL_SECONDS = 600.0
# Between these lies `max_num_seqs` where it is chosen. Steps of more are not captured on GPUs, and more rows add little
# where arithmetic is the limit.
FEWEST_NUM_SEQS = 256
MOST_NUM_SEQS = 1024


class ConfigError(ValueError):
    """The settings cannot work. The message names the setting and the fix; nothing has been started yet."""


class LoadFormat(enum.StrEnum):
    """AUTO reads safetensors or GGUF from the model folder; DUMMY draws random weights from `config.json` alone."""

    AUTO = "auto"
    DUMMY = "dummy"


class KVOffload(enum.StrEnum):
    """ON: blocks have homes in host memory and travel. OFF: KV lives on the device alone."""

    ON = "on"
    OFF = "off"


class OffloadChoice(enum.StrEnum):
    """AUTO: ON where host memory has homes for as many blocks as the device holds, or more, or a window is asked for.
    Every block needs a home, so with fewer of them less KV could be live than without."""

    AUTO = "auto"
    ON = KVOffload.ON.value
    OFF = KVOffload.OFF.value


class PhasePolicyName(enum.StrEnum):
    """How prefill and decode share the steps (`scheduling/phase.py`)."""

    DISAGGREGATED = "disaggregated"
    MIXED = "mixed"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of a pipeline, or of several that are alike.

    model                        folder with config.json and safetensors, or a .gguf file
    pipeline_parallel_size       stages; one process (and one GPU) each
    data_parallel_size           pipelines, each with GPUs of its own; rows go to whichever has room (`replicas.py`)
    num_batches                  batches in flight; default: one per stage
    device                       "auto" | "cpu" | "cuda"
    dtype                        "auto" (the checkpoint's; on GPUs bfloat16 in the place of float32) | "float32" |
                                 "bfloat16" | "float16"
    block_size                   tokens in a KV block
    num_device_blocks            KV blocks on each device, window included; default: from memory
    num_window_blocks            of those, blocks that serve as the window; default: an eighth, 0 without offloading
    host_memory_gib              host memory for KV homes, all stages of all pipelines together; default: from what is
                                 free
    max_num_seqs                 most rows in one step; default: on GPUs what their memory has KV for, 256 to 1,024; on
                                 CPUs 256
    max_num_batched_tokens       most new tokens in one prefill step
    async_scheduling             plan a batch's next step before the tokens of its last one are known
    kv_offload                   "auto" | "on" | "off": whether KV may live in host memory
    phase_policy                 "auto" | "mixed" | "disaggregated": how prefill and decode share the steps
    stall_seconds                a pipeline in which nothing gets on for so long is ended
    threads_per_stage            CPU threads of a stage; default: cores divided by stages of all pipelines
    gpu_memory_utilization       share of each GPU's memory that weights, KV cache and the rest may take together
    attention_backend            "auto" | "flashinfer" | "reference", on a GPU
    fused_layers                 on a GPU: merged GEMMs and fused operations for families that have them
    cuda_graphs                  on a GPU: small steps from CUDA graphs; needs fused_layers
    stage_devices                GPU of each stage, one pipeline after the other; default: stage i on GPU i. Stages that
                                 share one are for tests
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    num_batches: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    load_format: LoadFormat = LoadFormat.AUTO
    trust_remote_code: bool = False
    block_size: int = 16
    num_device_blocks: int | None = None
    num_window_blocks: int | None = None
    host_memory_gib: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    async_scheduling: bool = True
    kv_offload: OffloadChoice = OffloadChoice.AUTO
    phase_policy: PhasePolicyName = PhasePolicyName.AUTO
    threads_per_stage: int | None = None
    stall_seconds: float = DEFAULT_STALL_SECONDS
    gpu_memory_utilization: float = 0.995
    attention_backend: AttentionChoice = AttentionChoice.AUTO
    fused_layers: bool = True
    cuda_graphs: bool = True
    stage_devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        def positive(name: str, *, minimum: int = 1, optional: bool = False) -> None:
            value = getattr(self, name)
            if value is None and optional:
                return
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")

        positive("pipeline_parallel_size")
        positive("data_parallel_size")
        positive("num_batches", optional=True)
        positive("max_model_len", optional=True)
        positive("block_size")
        positive("num_device_blocks", minimum=2, optional=True)
        positive("num_window_blocks", minimum=0, optional=True)
        positive("max_num_seqs", optional=True)
        positive("max_num_batched_tokens")
        positive("threads_per_stage", optional=True)
        if not self.stall_seconds > 0:
            raise ConfigError(f"stall_seconds must be above 0, got {self.stall_seconds!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.host_memory_gib is not None and not self.host_memory_gib > 0:
            raise ConfigError(f"host_memory_gib must be above 0, got {self.host_memory_gib!r}")
        if (
            self.num_device_blocks is not None
            and self.num_window_blocks is not None
            and self.num_window_blocks >= self.num_device_blocks
        ):
            raise ConfigError(
                f"num_window_blocks ({self.num_window_blocks}) must be below num_device_blocks "
                f"({self.num_device_blocks}): the tail block of a live request stays outside the window"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        num_stages = self.pipeline_parallel_size * self.data_parallel_size
        if self.stage_devices is not None and len(self.stage_devices) != num_stages:
            raise ConfigError(
                f"stage_devices names {len(self.stage_devices)} GPUs for {num_stages} stages: give one a stage"
            )
        for name, kind in (
            ("load_format", LoadFormat),
            ("kv_offload", OffloadChoice),
            ("phase_policy", PhasePolicyName),
            ("attention_backend", AttentionChoice),
        ):
            value = getattr(self, name)
            if value not in list(kind):
                raise ConfigError(f"{name} must be {' or '.join(kind)}, got {value!r}")
            object.__setattr__(self, name, kind(value))

    @property
    def cuda_options(self) -> CudaOptions:
        return CudaOptions(
            gpu_memory_utilization=self.gpu_memory_utilization,
            attention_backend=self.attention_backend,
            fused_layers=self.fused_layers,
            cuda_graphs=self.cuda_graphs,
            stage_devices=self.stage_devices,
        )
