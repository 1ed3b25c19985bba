"""`divide`: a machine's GPUs, cores and host memory among replicas. Never here: what replicas do (`replicas.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipemax.config import ConfigError, EngineConfig
from pipemax.executor.sizing import GIB, HOST_SHARE, HOST_SHARE_OF_CPUS, available_cores, free_host_bytes


def divide(config: EngineConfig) -> list[dict[str, Any]]:
    """Settings of each replica, under the names of `EngineConfig`. Raises ConfigError where there are too few GPUs."""
    num_replicas, num_stages = config.data_parallel_size, config.pipeline_parallel_size
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    shared["data_parallel_size"] = 1
    if num_replicas > 1:
        host_share = HOST_SHARE_OF_CPUS if _device(config) == "cpu" else HOST_SHARE
        if config.threads_per_stage is None:
            shared["threads_per_stage"] = max(1, available_cores() // (num_replicas * num_stages))
        shared["host_memory_gib"] = (config.host_memory_gib or free_host_bytes() * host_share / GIB) / num_replicas
    devices = config.stage_devices or tuple(range(num_replicas * num_stages))
    divided = num_replicas > 1 or config.stage_devices is not None
    return [
        {
            **shared,
            "stage_devices": devices[index * num_stages : (index + 1) * num_stages] if divided else None,
        }
        for index in range(num_replicas)
    ]


def _device(config: EngineConfig) -> str:
    """ "cpu" or "cuda", which then is enough for all replicas. Raises ConfigError."""
    if config.device == "cpu":
        return "cpu"
    from pipemax.worker.device import resolve_device

    num_replicas, num_stages = config.data_parallel_size, config.pipeline_parallel_size
    try:
        return resolve_device(config.device, num_stages=num_replicas * num_stages, stage_devices=config.stage_devices)
    except ConfigError as error:
        if config.stage_devices is not None:
            raise
        raise ConfigError(
            f"data_parallel_size {num_replicas} with pipeline_parallel_size {num_stages} needs "
            f"{num_replicas * num_stages} GPUs, more than this machine shows: lower one of them, or set device to cpu"
        ) from error
